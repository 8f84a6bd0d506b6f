"""Whole drills with real training: whatever breaks, the run ends in the bits of an undisturbed one."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest

from resilience.cli_drill import predict
from resilience.config import ResiliencyConfig
from resilience.drill.drill import run_drill
from resilience.drill.environment import Plan
from resilience.drill.result import LOSS_TOLERANCE, DrillResult
from resilience.drill.scenario import Scenario, parse_fault
from resilience.drill.story import Story

pytestmark = [pytest.mark.drill, pytest.mark.timeout(600)]


def drill(
    root: Path, repository: Path, *specs: str, train_iters: int = 24, settings: ResiliencyConfig | None = None,
    **shape: Any,
) -> DrillResult:  # fmt: skip
    scenario = Scenario(faults=tuple(map(parse_fault, specs)), train_iters=train_iters, **shape)
    script = (str(repository / "examples" / "gpt.py"), "--batch", "2")
    told = io.StringIO()
    given = {} if settings is None else {"resiliency": settings}
    result = run_drill(Plan(scenario, root / "out", script, timeout_s=500, **given), Story(told), explain=predict)
    assert result.problems == [], told.getvalue()
    assert result.passed
    assert result.bit_identical
    assert result.unplanned_restarts == 0, told.getvalue()
    assert all(fault.predicted for fault in result.faults if fault.resumed_from)
    return result


def test_a_lost_node_is_recovered_from_its_replica_on_the_other(tmp_path: Path, repository: Path) -> None:
    (lost,) = drill(tmp_path, repository, "lose:node=1@13", nodes=2).faults
    assert lost.resumed_from == {"iteration": 10, "generation": 1, "tier": "local"}
    assert lost.lost_iterations == 3
    assert lost.replica_copies > 0
    assert lost.retrieved_bytes > 0


@pytest.mark.long
@pytest.mark.parametrize(
    ("specs", "shape"),
    [
        pytest.param(
            ["lose:node=1@13"],
            {"nodes": 3, "ranks_per_node": 2, "replication_jump": 2},
            id="3 nodes of 2 ranks, jump 2",
        ),
        pytest.param(
            ["lose:node=1@13", "lose:node=0@18"], {"nodes": 3, "spares": 2, "replication_factor": 3}, id="factor 3"
        ),
        pytest.param(
            ["stop:node=0@13"], {"nodes": 2, "save_type": "in_memory"}, id="every process killed, saves in memory"
        ),
        pytest.param(["kill:rank=0@8", "lose:node=1@13"], {"nodes": 2}, id="two faults in a row"),
        pytest.param(["corrupt:node=1@13"], {"nodes": 2}, id="the primary corrupted"),
        pytest.param(["torn:node=0@13"], {"nodes": 2}, id="a torn file"),
        pytest.param(["hang:rank=1@13"], {"nodes": 2}, id="a hanging rank"),
    ],
)
def test_the_newest_save_is_resumed(specs: list[str], shape: dict[str, Any], tmp_path: Path, repository: Path) -> None:
    result = drill(tmp_path, repository, *specs, **shape)
    for fault in result.faults:
        assert fault.resumed_from is not None
        assert fault.resumed_from["iteration"] == fault.iteration // 5 * 5


@pytest.mark.long
@pytest.mark.parametrize(
    "specs",
    [
        pytest.param(["corrupt:node=1@13", "corrupt:node=0,copy=replica@13"], id="primary and replica of one rank"),
        pytest.param(["corrupt:node=0,copy=all@13", "torn:node=1,copy=all@13"], id="every copy"),
    ],
)
def test_the_older_save_is_resumed_when_the_newest_cannot_be(
    specs: list[str], tmp_path: Path, repository: Path
) -> None:
    for fault in drill(tmp_path, repository, *specs, nodes=2).faults:
        assert fault.resumed_from == {"iteration": 5, "generation": 1, "tier": "local"}
        assert fault.lost_iterations == 8
        assert {passed["iteration"] for passed in fault.passed_over} <= {10}


@pytest.mark.long
def test_with_saves_on_shared_storage_no_node_matters(tmp_path: Path, repository: Path) -> None:
    (lost,) = drill(tmp_path, repository, "lose:node=1@13", nodes=2, save_type="global").faults
    assert lost.resumed_from == {"iteration": 10, "generation": 1, "tier": "global"}


@pytest.mark.long
def test_overlapped_snapshots_survive_what_eager_ones_do(tmp_path: Path, repository: Path) -> None:
    faults = ["lose:node=2@13", "corrupt:node=1@19", "kill:rank=0@25"]
    settings = ResiliencyConfig(snapshot_mode="overlapped")
    result = drill(tmp_path, repository, *faults, nodes=3, save_every=2, train_iters=30, settings=settings)
    assert [fault.lost_iterations for fault in result.faults] <= [3, 3, 3]


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
@pytest.mark.parametrize("save_type", ["local", "in_memory"])
def test_training_goes_on_where_a_nodes_mount_is_full(save_type: str, tmp_path: Path, repository: Path) -> None:
    result = drill(tmp_path, repository, "full:node=1@12", nodes=2, save_type=save_type)
    (full,) = result.faults
    assert (full.resumed_from, full.lost_iterations) == (None, 0)
    if save_type == "local":  # in memory, what was reserved before is enough
        assert result.saves_failed > 0


@pytest.mark.long
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
def test_a_restart_beside_a_full_disk_loads_what_it_cannot_keep(tmp_path: Path, repository: Path) -> None:
    result = drill(tmp_path, repository, "full:node=0@12", "stop:node=1@18", nodes=3, spares=0, save_type="local")
    assert result.faults[1].lost_iterations <= 10, "no save was possible since iteration 10"


@pytest.mark.long
@pytest.mark.parametrize("redundancy", ["xor", "rs"])
def test_nodes_of_one_clique_that_are_lost_are_rebuilt_from_parity(
    redundancy: str, tmp_path: Path, repository: Path
) -> None:
    """`rs`: two at once, each replaced by a spare."""
    specs = ["lose:node=1@13", "lose:node=2@13"] if redundancy == "rs" else ["lose:node=1@13"]
    result = drill(
        tmp_path, repository, *specs, nodes=4, spares=2, redundancy=redundancy, replication_factor=4, train_iters=18
    )
    for fault in result.faults:
        assert fault.resumed_from == {"iteration": 10, "generation": 1, "tier": "local"}
        assert fault.rebuilt == len(specs)


@pytest.mark.long
def test_nodes_shrink_from_four_to_three_to_two_and_grow_again_while_training_goes_on(
    tmp_path: Path, repository: Path
) -> None:
    """The end is not that of an undisturbed run, bit for bit, and the drill says so; its loss is."""
    specs = ("lose:node=3@13", "lose:node=1@23", "join:node=4@33", "join:node=3@33")
    scenario = Scenario(
        nodes=4, spares=0, elastic=True, train_iters=45, persist_every=0, faults=tuple(map(parse_fault, specs))
    )
    script = (str(repository / "examples" / "gpt.py"), "--batch", "8")
    told = io.StringIO()
    result = run_drill(Plan(scenario, tmp_path / "out", script, timeout_s=550), Story(told), explain=predict)
    assert result.problems == [], told.getvalue()
    assert result.passed
    assert result.world_sizes == [4, 3, 2, 4]
    assert result.bit_identical is None
    assert "4 → 3 → 2 → 4" in result.why_not_bits
    assert result.loss_difference is not None
    assert result.loss_difference < LOSS_TOLERANCE
    resumed = [(fault.resumed_from or {}).get("iteration") for fault in result.faults]
    assert resumed == [10, 20, 30, 30], "from the nodes alone: there is no persistent checkpoint"
    assert all(fault.predicted for fault in result.faults)
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert [size in page for size in ("3 ranks", "2 ranks")] == [True, True]
    assert 'class="climb undisturbed"' in page
    assert "Its bits are not compared" in page
