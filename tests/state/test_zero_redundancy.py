"""torch's ZeroRedundancyOptimizer: each rank saves what it keeps, and the state goes on however it is shared out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.resharding.layouts import assert_ranks_hold, stored
from tests.state.distributed_ranks import Way, run, whole_of


def test_the_same_ranks_go_on_to_the_bit_and_each_saves_its_own_state_once(tmp_path: Path) -> None:
    root, memory = str(tmp_path / "save"), str(tmp_path / "memory")
    saved = run(Way(2, memory, 3, save=root, kind="zero"))
    straight = run(Way(2, memory, 6, kind="zero"))
    resumed = run(Way(2, memory, 6, load=root, kind="zero"))
    assert {ran.resumed for ran in resumed} == {3}
    assert_ranks_hold(resumed, stored(tmp_path / "save", 3))
    assert [ran.losses for ran in resumed] == [ran.losses[3:] for ran in straight]
    before, after = (whole_of([ran.last for ran in rans]) for rans in (straight, resumed))
    assert all(torch.equal(before[key], after[key]) for key in before)
    moments = [{part[0] for part in ran.parts if part[0].endswith("/exp_avg")} for ran in resumed]
    assert all(moments)
    assert not moments[0] & moments[1]
    assert sum(ran.kept for ran in saved) == sum(part.numel() for key, part in after.items() if key.startswith("model"))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("zero", 3), ("zero", 2)),
        pytest.param(("zero", 2), ("plain", 1), marks=pytest.mark.long),
        pytest.param(("plain", 1), ("zero", 2), marks=pytest.mark.long),
        pytest.param(("zero", 2), ("divided", 3), marks=pytest.mark.long),
        pytest.param(("divided", 3), ("zero", 2), marks=pytest.mark.long),
    ],
)
def test_any_sharing_goes_on_as_any_other(tmp_path: Path, before: tuple[str, int], after: tuple[str, int]) -> None:
    root, memory = str(tmp_path / "save"), str(tmp_path / "memory")
    saved = run(Way(before[1], memory, 3, save=root, kind=before[0]))
    resumed = run(Way(after[1], memory, 5, load=root, kind=after[0]))
    assert {ran.resumed for ran in resumed} == {3}
    last, loaded = whole_of([ran.last for ran in saved]), whole_of([ran.parts for ran in resumed])
    assert last.keys() == loaded.keys()
    assert all(torch.equal(last[key], loaded[key]) for key in last)


@pytest.mark.long
def test_it_goes_on_at_another_tensor_parallel_size(tmp_path: Path) -> None:
    root, memory = str(tmp_path / "save"), str(tmp_path / "memory")
    saved = run(Way(4, memory, 2, save=root, kind="zero", tp=2))
    resumed = run(Way(2, memory, 3, load=root, kind="zero"))
    last, loaded = whole_of([ran.last for ran in saved]), whole_of([ran.parts for ran in resumed])
    assert last.keys() == loaded.keys()
    assert all(torch.equal(last[key], loaded[key]) for key in last)


def test_saves_on_nodes_have_it_too(tmp_path: Path) -> None:
    options = (("non_persistent_ckpt_type", "in_memory"), ("non_persistent_save_interval", 2))
    way = Way(2, str(tmp_path / "memory"), 4, kind="zero", options=options, run_id="shared-out")
    saved = run(way)
    resumed = run(way)
    assert {ran.tier for ran in resumed} == {"in_memory"}
    last, loaded = whole_of([ran.last for ran in saved]), whole_of([ran.parts for ran in resumed])
    assert all(torch.equal(last[key], loaded[key]) for key in last)
