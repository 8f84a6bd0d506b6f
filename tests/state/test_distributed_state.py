"""The state of an optimizer that is divided over the ranks is saved by the parts and goes on under any division."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.resharding.layouts import assert_ranks_hold, stored
from tests.state.distributed_ranks import Way, run, whole_of


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_division_goes_on_to_the_bit(tmp_path: Path, dtype: str) -> None:
    root, memory = str(tmp_path / "save"), str(tmp_path / "memory")
    run(Way(2, memory, 3, save=root, dtype=dtype))
    straight = run(Way(2, memory, 6, dtype=dtype))
    resumed = run(Way(2, memory, 6, load=root, dtype=dtype))
    assert {ran.resumed for ran in resumed} == {3}
    assert_ranks_hold(resumed, stored(tmp_path / "save", 3))
    assert [ran.losses for ran in resumed] == [ran.losses[3:] for ran in straight]
    before, after = (whole_of([ran.last for ran in rans]) for rans in (straight, resumed))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert ("optimizer/0/state/up/param" in after) == (dtype == "bfloat16")
    assert sum(ran.kept for ran in resumed) == sum(after[key].numel() for key in after if key.startswith("model/"))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3), (3, 2)])
def test_another_number_of_ranks_has_the_same_state_to_the_bit(tmp_path: Path, before: int, after: int) -> None:
    root, memory = str(tmp_path / "save"), str(tmp_path / "memory")
    dtype = "bfloat16" if before == 2 else "float32"
    saved = run(Way(before, memory, 3, save=root, dtype=dtype))
    resumed = run(Way(after, memory, 5, load=root, dtype=dtype, bucket_numel=40))
    assert {ran.resumed for ran in resumed} == {3}
    assert_ranks_hold(resumed, stored(tmp_path / "save", 3))
    last, loaded = whole_of([ran.last for ran in saved]), whole_of([ran.parts for ran in resumed])
    assert last.keys() == loaded.keys()
    assert all(torch.equal(last[key], loaded[key]) for key in last)
