"""What the commands make of parity: it counts where it rebuilds, is verified, and goes with its save."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resilience.stores.digest import digest_of
from resilience.stores.records import decode_record, encode_record
from tests.cli.stores import ask, ask_json, flip
from tests.core import training
from tests.core.training import Act, die
from tests.ranks import killed, values

NODES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[training.World, training.Plan]]:
    """A job with `rs` over four nodes, killed after iteration 8: 3 and 6 are kept."""
    root = tmp_path_factory.mktemp("parity")
    world = training.World(root / "memory", root / "disk")
    plan = world.plan(
        *NODES, kind="disk", settle=(6,), acts=(Act(8, die),), checkpoint={"replication_factor": 4},
        resiliency={"redundancy": "rs"},
    )  # fmt: skip
    assert all(killed(outcome) for outcome in world.run(plan))
    yield world, plan
    shutil.rmtree(root)


@pytest.fixture
def nodes(job: tuple[training.World, training.Plan], tmp_path: Path) -> Path:
    """A copy of what the nodes hold, to be spoilt."""
    world, _ = job
    for node in NODES:
        shutil.copytree(world.disk / node, tmp_path / node)
    return tmp_path


def local(nodes: Path, *lost: str) -> list[str]:
    return [word for node in NODES if node not in lost for word in ("--local", str(nodes / node))]


def parity(nodes: Path, node: str, iteration: int = 6) -> Path:
    (found,) = (nodes / node).glob(f"run/{node}/iter_{iteration:07d}/*/parity_*.safetensors")
    return found


def test_ls_counts_what_can_be_rebuilt(capsys: Any, nodes: Path) -> None:
    whole = ask_json(capsys, "ls", *local(nodes))["saves"][0]
    assert (whole["iteration"], whole["complete"], whole["copies"], whole["parity"]) == (6, True, 1, 4)
    left = ask_json(capsys, "ls", *local(nodes, "b", "d"))["saves"][0]
    assert (left["complete"], left["owners_present"], left["copies"], left["rebuildable"]) == (True, 2, 0, 2)
    assert "2 to be rebuilt from parity" in ask(capsys, "ls", *local(nodes, "b", "d")).out.replace("\n", " ")
    lost = ask_json(capsys, "ls", *local(nodes, "a", "b", "d"))["saves"][0]
    assert (lost["complete"], lost["rebuildable"]) == (False, 0)


def test_explain_tells_from_where_what_is_rebuilt_comes(capsys: Any, nodes: Path) -> None:
    document = ask_json(capsys, "explain", *local(nodes, "b", "d"))
    assert document["decision"]["iteration"] == 6
    assert document["rebuilt"] == [1, 3]
    assert {(move["owner"], move["from_node"]) for move in document["retrieval"] if move["to_rank"] == 1} >= {
        (1, "a"), (1, "c"),
    }  # fmt: skip
    assert all(move["bytes"] > 0 for move in document["retrieval"])


@pytest.mark.parametrize("lie", [False, True])
def test_explain_passes_over_what_bad_parity_cannot_rebuild(capsys: Any, nodes: Path, lie: bool) -> None:
    """Damaged, or telling a lie that only the owner's digest gives away: then the save before is the one."""
    path = parity(nodes, "a")
    flip(path, at=5000)
    if lie:
        record = decode_record(path.with_suffix(".json").read_bytes())
        path.with_suffix(".json").write_bytes(encode_record(replace(record, digest=digest_of(path.read_bytes()))))
    document = ask_json(capsys, "explain", *local(nodes, "b", "d"))
    assert document["decision"]["iteration"] == 3
    bad = document["bad_copies"]
    assert all(copy["parity"] for copy in bad)
    assert 0 in {copy["owner"] for copy in bad}
    assert {passed["iteration"] for passed in document["passed_over"]} == {6}


def test_inspect_tells_what_parity_covers(capsys: Any, nodes: Path) -> None:
    document = ask_json(capsys, "inspect", "6", *local(nodes))
    parities = [record for record in document["records"] if record["role"] == "parity"]
    assert [record["owner"] for record in parities] == [0, 1, 2, 3]
    assert {tuple(record["cover"]["members"]) for record in parities} == {(0, 1, 2, 3)}
    alone = ask_json(capsys, "inspect", parity(nodes, "c"))
    assert (alone["items"], alone["records"][0]["owner"]) == ([], 2)
    assert document["items"]


def test_verify_reads_parity_too(capsys: Any, nodes: Path) -> None:
    everything = ask_json(capsys, "verify", *local(nodes), "--deep")
    assert everything["ok"]
    flip(parity(nodes, "c"), at=-1)
    assert ask_json(capsys, "verify", *local(nodes))["ok"], "its header and size are as they should be"
    (damage,) = ask_json(capsys, "verify", *local(nodes), "--deep", status=1)["damaged"]
    assert damage["path"] == str(parity(nodes, "c"))
    assert "maker computed" in damage["reason"]
    flip(parity(nodes, "c"), at=100)
    assert not ask_json(capsys, "verify", *local(nodes), status=1)["ok"]


def test_prune_takes_parity_along_and_counts_it(capsys: Any, nodes: Path) -> None:
    freed = sum(path.stat().st_size for path in nodes.glob("*/run/*/iter_0000003/*/*.safetensors"))
    document = ask_json(capsys, "prune", *local(nodes), "--keep-last", 1)
    assert [save["iteration"] for save in document["deleted"]] == [3]
    assert document["deleted"][0]["bytes"] == freed
    assert not list(nodes.glob("*/run/*/iter_0000003"))
    assert parity(nodes, "a").exists()


def test_a_save_that_only_parity_completes_is_the_newest_complete_one(capsys: Any, nodes: Path) -> None:
    document = ask_json(capsys, "prune", *local(nodes, "d"), "--keep-last", 1)
    assert {save["iteration"]: save["reason"] for save in document["kept"]} == {6: "the newest complete save"}


@pytest.mark.long
@pytest.mark.parametrize("lost", ["", "b", "bd"])
def test_a_real_restart_resumes_from_what_was_told(
    capsys: Any, job: tuple[training.World, training.Plan], nodes: Path, lost: str
) -> None:
    _, plan = job
    world = training.World(nodes / "memory", nodes)
    told = ask_json(capsys, "explain", *local(nodes, *lost))
    for node in lost:
        world.lose(node)
    again = replace(plan, memory=str(nodes / "memory"), disk=str(nodes), settle=(), acts=(), seed=1)
    for ran in values(world.run(again)):
        assert ran.resumed.iteration == told["decision"]["iteration"]
        assert ran.resumed.rebuilt == len(told["rebuilt"]) == len(lost)
