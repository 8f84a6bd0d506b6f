"""What torch's own wrappers saved goes on with another number of ranks, and under another wrapper."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.resharding.layouts import assert_ranks_hold, stored
from tests.resharding.wrappers import WORLDS, Way, run

_QUICK = {("fsdp4", "fsdp3"), ("tp", "alone")}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(before, after, marks=() if (before, after) in _QUICK else pytest.mark.long)
        for before in WORLDS
        for after in WORLDS
        if before != "ddp" or after != "alone"
    ],
)
def test_training_goes_on_under_another_wrapper(tmp_path: Path, before: str, after: str) -> None:
    root, memory = str(tmp_path / "save"), str(tmp_path / "memory")
    saved = run(Way(before, memory, 3, save=root))
    straight = run(Way(before, memory, 6))
    resumed = run(Way(after, memory, 6, load=root))
    assert {ran.resumed for ran in resumed} == {3}
    assert_ranks_hold(resumed, stored(Path(root), 3))
    assert [*saved[0].losses, *resumed[0].losses] == pytest.approx(straight[0].losses, rel=1e-4)
    assert resumed[0].lr == pytest.approx(straight[0].lr, rel=1e-4), "the running average"
    if before == after:
        assert resumed[0].notes == ()
        assert resumed[0].losses == straight[0].losses[3:]
