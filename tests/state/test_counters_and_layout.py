"""Counters come back whole or not at all; a parallel layout makes up the world or says why not."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.errors import ConfigError, CorruptCopyError
from resilience.state import ParallelLayout, TrainState


def test_the_counters_have_megatron_bridges_names() -> None:
    assert list(TrainState().to_dict()) == [
        "step",
        "consumed_train_samples",
        "skipped_train_samples",
        "consumed_valid_samples",
        "floating_point_operations_so_far",
        "do_train",
        "do_valid",
        "do_test",
    ]


@given(st.integers(0, 2**62), st.floats(allow_nan=False), st.booleans())
def test_counters_come_back(count: int, operations: float, flag: bool) -> None:
    state = TrainState(count, count + 1, 0, count, operations, flag, not flag, flag)
    assert TrainState.from_dict(state.to_dict()) == state


def test_a_whole_number_of_operations_is_a_number_of_operations() -> None:
    assert TrainState.from_dict({**TrainState().to_dict(), "floating_point_operations_so_far": 3}) == TrainState(
        floating_point_operations_so_far=3.0
    )


@pytest.mark.parametrize(
    ("counters", "says"),
    [
        ({"step": None}, "train_state/step is None"),
        ({"step": True}, "train_state/step is True"),
        ({"step": 1.0}, "train_state/step is 1.0"),
        ({"do_test": 1}, "train_state/do_test is 1"),
        ({"floating_point_operations_so_far": "3"}, "so_far is '3'"),
    ],
)
def test_a_wrong_counter_is_a_corrupt_copy_and_changes_none(counters: dict[str, Any], says: str) -> None:
    state = TrainState(step=5)
    with pytest.raises(CorruptCopyError, match=says):
        state.update({**TrainState().to_dict(), "step": 9, **counters})
    assert state == TrainState(step=5)


@pytest.mark.parametrize("counters", [{}, [], None, 3])
def test_missing_counters_are_a_corrupt_copy(counters: Any) -> None:
    with pytest.raises(CorruptCopyError):
        TrainState.from_dict(counters)


def test_by_default_all_ranks_are_data_parallel() -> None:
    layout = ParallelLayout.default(3, 8)
    assert (layout.dp, layout.dp_rank, layout.shard_coordinate) == (8, 3, (0, 0))


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_every_place_is_taken_once_and_replicas_share_a_coordinate(tp: int, cp: int, dp: int, pp: int) -> None:
    world = tp * cp * dp * pp
    layouts = [ParallelLayout(tp=tp, cp=cp, pp=pp).resolve(rank, world) for rank in range(world)]
    places = {(each.tp_rank, each.cp_rank, each.dp_rank, each.pp_rank) for each in layouts}
    assert len(places) == world
    assert {each.dp for each in layouts} == {dp}
    coordinates = [each.shard_coordinate for each in layouts]
    assert all(coordinates.count(each) == dp * cp for each in coordinates)
    assert all(each.resolve(rank, world) == each for rank, each in enumerate(layouts))


def test_ranks_follow_megatrons_order() -> None:
    layout = ParallelLayout(tp=2, cp=2, pp=2, ep=2).resolve(13, 16)
    assert (layout.tp_rank, layout.cp_rank, layout.dp_rank, layout.pp_rank, layout.ep_rank) == (1, 0, 1, 1, 0)


def test_a_place_that_is_given_is_kept() -> None:
    assert ParallelLayout(pp=2, pp_rank=0, dp_rank=1).resolve(3, 4).shard_coordinate == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tp": 0}, r"ParallelLayout.tp is 0"),
        ({"tp": True}, r"ParallelLayout.tp is True"),
        ({"cp": 1.0}, r"ParallelLayout.cp is 1.0"),
        ({"dp": -1}, r"ParallelLayout.dp is -1"),
        ({"tp": 2, "tp_rank": 2}, r"ParallelLayout.tp_rank is 2; with tp=2 it lies below 2"),
        ({"pp_rank": -1}, r"ParallelLayout.pp_rank is -1"),
        ({"dp_rank": -1}, r"ParallelLayout.dp_rank is -1"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        ParallelLayout(**arguments)


@pytest.mark.parametrize(
    ("layout", "says"),
    [
        (ParallelLayout(tp=3), "does not make up the 8 ranks"),
        (ParallelLayout(tp=2, dp=2), "does not make up the 8 ranks"),
        (ParallelLayout(ep=3), "ParallelLayout.ep is 3"),
        (ParallelLayout(dp_rank=8), "dp_rank is 8"),
    ],
)
def test_a_layout_that_does_not_make_up_the_world_is_refused(layout: ParallelLayout, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        layout.resolve(0, 8)
