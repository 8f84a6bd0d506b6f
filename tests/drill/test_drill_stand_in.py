"""Whole drills with a stand-in script: real torchrun agents and real kills; only the training is pretended."""

from __future__ import annotations

import io
import os
import time
from pathlib import Path
from typing import Any

import pytest

from resilience.drill.drill import run_drill
from resilience.drill.environment import Plan
from resilience.drill.orchestrate import Sources
from resilience.drill.result import DrillResult
from resilience.drill.scenario import Scenario, parse_fault
from resilience.drill.story import Story

pytestmark = pytest.mark.drill
STAND_IN = str(Path(__file__).with_name("stand_in.py"))


def drill(
    root: Path, *specs: str, script: tuple[str, ...] = (STAND_IN,), explain: Any = None
) -> tuple[DrillResult, str]:
    faults = tuple(parse_fault(spec) for spec in specs)
    told = io.StringIO()
    plan = Plan(Scenario(nodes=2, train_iters=24, faults=faults), root, script, timeout_s=250, stalled_after_s=120)
    return run_drill(plan, Story(told), explain=explain), told.getvalue()


def nothing_is_left_behind(root: Path) -> bool:
    """No process still knows the work directory, once those that were killed are gone."""
    until = time.monotonic() + 60
    while known_to_a_process(root) and time.monotonic() < until:
        time.sleep(0.05)
    return not known_to_a_process(root)


def known_to_a_process(root: Path) -> bool:
    for entry in Path("/proc").iterdir():
        try:
            environment = (entry / "environ").read_bytes() if entry.name.isdigit() else b""
        except OSError:
            continue
        if str(root).encode() in environment and int(entry.name) != os.getpid():
            return True
    return False


def test_a_killed_rank_restarts_in_place_and_a_spare_replaces_a_lost_node(tmp_path: Path) -> None:
    asked: list[Sources] = []

    def explain(sources: Sources) -> dict[str, Any]:
        asked.append(sources)
        return {"iteration": 5 if len(asked) == 1 else 15, "generation": len(asked), "tier": "local"}

    result, story = drill(tmp_path, "kill:rank=1@8", "lose:node=0@17", explain=explain)
    assert result.problems == []
    assert result.passed
    assert result.bit_identical
    killed, lost = result.faults
    assert (killed.resumed_from, killed.lost_iterations) == ({"iteration": 5, "generation": 1, "tier": "local"}, 3)
    assert (lost.resumed_from, lost.lost_iterations) == ({"iteration": 15, "generation": 2, "tier": "local"}, 2)
    assert (killed.predicted, lost.predicted) == (True, True)
    assert result.unplanned_restarts == 0
    # The restart after the loss finds the spare's directories, not those of the lost node.
    assert asked[1].local[1] == tmp_path / "nodes" / "node2" / "disk"
    assert list((tmp_path / "nodes" / "node0" / "disk").iterdir()) == []
    assert "node0 is lost for good" in story
    assert "2: training is started again on node2, node1" in story
    assert nothing_is_left_behind(tmp_path)


def test_a_hanging_rank_a_damaged_copy_and_a_full_disk(tmp_path: Path) -> None:
    faults = ["hang:rank=0@7", "corrupt:node=1@12"] + ["full:node=0@18"] * (os.geteuid() == 0)
    result, story = drill(tmp_path, *faults)
    assert result.problems == []
    assert [fault.lost_iterations for fault in result.faults[:2]] == [2, 2]
    assert "bytes flipped in the primary copy of rank 1's iteration 10 on node1" in story
    if os.geteuid() == 0:
        full = result.faults[2]
        assert (full.resumed_from, full.lost_iterations, full.detect_s) == (None, 0, None)
        assert result.saves_failed > 0
        assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
    assert nothing_is_left_behind(tmp_path)


def test_an_end_that_differs_is_told_and_the_reference_run_is_used_again(tmp_path: Path) -> None:
    result, _ = drill(tmp_path, script=(STAND_IN, "--broken"))
    assert not result.passed
    assert not result.bit_identical
    assert result.final_digest != result.reference_digest
    again, story = drill(tmp_path, script=(STAND_IN, "--broken"))
    assert "of an earlier drill with the same parameters is used" in story
    assert again.reference_digest == result.reference_digest


def test_a_script_that_fails_by_itself_fails_the_drill_with_its_last_words(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit('the learning rate is missing')\n")
    result, story = drill(tmp_path / "out", script=(str(script),))
    assert not result.passed
    assert "does not run even undisturbed" in result.problems[0]
    assert "the learning rate is missing" in story
    assert nothing_is_left_behind(tmp_path)
