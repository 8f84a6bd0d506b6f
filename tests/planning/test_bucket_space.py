"""Places in flat buckets follow from the order of the parameters, and a box of a tensor from its runs in C order."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resilience.errors import LayoutMismatchError
from resilience.planning.bucket_space import (
    InBucket,
    LocalBlock,
    bucket_number,
    common_box,
    places_in_buckets,
    runs_of_box,
)
from resilience.planning.flat import plan_buckets


@st.composite
def boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    starts = tuple(draw(st.integers(0, length - 1)) for length in shape)
    sizes = tuple(draw(st.integers(0, length - start)) for length, start in zip(shape, starts, strict=True))
    return shape, starts, sizes


@given(boxes())
def test_the_runs_of_a_box_are_its_elements_in_order_and_as_few_as_can_be(
    box: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]],
) -> None:
    shape, offsets, sizes = box
    whole = torch.arange(math.prod(shape)).view(shape)
    part = whole[tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))].flatten()
    runs = list(runs_of_box(shape, offsets, sizes))
    found = [whole.flatten()[run.start : run.start + run.length] for run in runs]
    assert torch.equal(torch.cat(found) if found else part[:0], part)
    assert [run.at for run in runs] == [sum(run.length for run in runs[:number]) for number in range(len(runs))]
    assert all(before.start + before.length <= after.start for before, after in itertools.pairwise(runs))


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=12),
    st.integers(1, 5),
    st.none() | st.integers(1, 400),
    st.data(),
)
def test_places_are_those_in_which_the_optimizer_lays_its_parameters_out(
    numels: list[int], size: int, bucket_numel: int | None, data: st.DataObject
) -> None:
    alone = data.draw(st.sets(st.integers(0, len(numels) - 1), max_size=2))
    buckets = plan_buckets(numels, ["float32"] * len(numels), size, bucket_numel, alone)
    expected = {
        placed.index: InBucket(number, placed.start) for number, each in enumerate(buckets) for placed in each.placed
    }
    found = places_in_buckets(numels, [bucket.numel_unpadded for bucket in buckets])
    assert found == [expected[index] for index in range(len(numels))]
    assert all(len(bucket.placed) == 1 for bucket in buckets if alone & {placed.index for placed in bucket.placed})


@pytest.mark.parametrize("lengths", [[], [63], [65], [10, 64], [128], [64, 1]])
def test_lengths_that_no_order_of_these_parameters_makes_are_refused(lengths: list[int]) -> None:
    with pytest.raises(LayoutMismatchError):
        places_in_buckets([10, 64], lengths)


def test_a_place_of_the_model_has_one_number_and_experts_are_counted_between_tensor_and_pipeline() -> None:
    assert [bucket_number((tp, 2), (pp, 2)) for pp in range(2) for tp in range(2)] == [0, 1, 2, 3]
    places = [bucket_number((tp, 2), (pp, 2), (ep, 3)) for pp in range(2) for ep in range(3) for tp in range(2)]
    assert places == list(range(12))


def test_what_a_box_and_a_block_have_in_common_is_told_in_the_words_of_both() -> None:
    block = LocalBlock(start=(4, 0), sizes=(2, 3), offsets=(10, 5))
    assert common_box(block, (11, 4), (5, 3)) == ((0, 1), (5, 0), (1, 2))
    assert common_box(block, (12, 5), (1, 1)) is None
