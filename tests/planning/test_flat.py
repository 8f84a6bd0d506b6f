"""Flat buckets keep every parameter once, and the boxes of a flat range are that range."""

from __future__ import annotations

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from resilience.planning.flat import ALIGNMENT, boxes_of_range, plan_buckets

shapes = st.lists(st.integers(1, 6), max_size=4).map(tuple)


@given(shapes, st.data())
def test_the_boxes_of_a_range_hold_its_elements_in_order_and_no_others(
    shape: tuple[int, ...], data: st.DataObject
) -> None:
    count = math.prod(shape)
    start = data.draw(st.integers(0, count))
    stop = data.draw(st.integers(start, count))
    whole = np.arange(count).reshape(shape)
    boxes = boxes_of_range(shape, start, stop)
    found: list[int] = []
    for box in boxes:
        part = whole[tuple(slice(at, at + length) for at, length in zip(box.offsets, box.shape, strict=True))]
        assert (part.size, box.start) == (box.length, len(found))
        found += part.reshape(-1).tolist()
    assert found == list(range(start, stop))
    assert len(boxes) <= max(1, 2 * len(shape) - 1)


@given(
    st.lists(st.tuples(st.integers(1, 500), st.sampled_from(["bfloat16", "float32"])), min_size=1, max_size=12),
    st.integers(1, 7),
    st.one_of(st.none(), st.integers(1, 800)),
)
def test_every_parameter_lies_in_one_bucket_of_its_dtype_and_ranks_share_it_evenly(
    parameters: list[tuple[int, str]], size: int, bucket_numel: int | None
) -> None:
    numels, dtypes = [numel for numel, _ in parameters], [dtype for _, dtype in parameters]
    buckets = plan_buckets(numels, dtypes, size, bucket_numel)
    placed = sorted(each.index for bucket in buckets for each in bucket.placed)
    assert placed == list(range(len(parameters)))
    for bucket in buckets:
        end = 0
        for each in bucket.placed:
            assert each.start >= end
            assert each.start % ALIGNMENT == 0
            assert (each.stop - each.start, bucket.dtype) == parameters[each.index]
            end = each.stop
        assert end == bucket.numel_unpadded <= bucket.numel
        shares = [bucket.share(rank, size) for rank in range(size)]
        assert [index for share in shares for index in share] == list(range(bucket.numel))
        assert len({len(share) for share in shares}) == 1


def test_a_bucket_is_closed_when_it_is_full() -> None:
    first, second = plan_buckets([100, 100, 100], ["float32"] * 3, 2, bucket_numel=200)
    assert [each.index for each in first.placed] == [2, 1]
    assert [(each.index, each.start, each.stop) for each in second.placed] == [(0, 0, 100)]
