"""Every chunk has one writer, every element is in one chunk, and chunks are neither many nor tiny."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.errors import LayoutMismatchError
from resilience.formats.zarr_chunks import Given, plan_chunks
from resilience.formats.zarr_grid import LEAST_BYTES, MOST_CHUNKS, Box, check_parts, plan_grid


def rows(shape: tuple[int, ...], *cuts: int) -> list[Box]:
    """One rank after the other has the rows up to the next cut."""
    ends = [0, *cuts, shape[0]]
    inner = shape[1:]
    return [
        Box(rank, (start, *(0,) * len(inner)), (stop - start, *inner))
        for rank, (start, stop) in enumerate(itertools.pairwise(ends))
    ]


def told(key: str, shape: tuple[int, ...], boxes: list[Box]) -> list[Given]:
    return [Given(key, "float32", 4, shape, box, number) for number, box in enumerate(boxes)]


@pytest.mark.parametrize(
    ("shape", "boxes", "chunk"),
    [
        ((10, 4), rows((10, 4), 3, 6, 9), (3, 4)),  # as FSDP cuts: the last one is shorter
        ((8, 6), [Box(n, (n // 2 * 4, n % 2 * 3), (4, 3)) for n in range(4)], (4, 3)),
        ((12, 2), rows((12, 2), 4, 10), (2, 2)),  # the common divisor of 4 and 10
        ((5,), rows((5,)), (5,)),
        ((), [Box(0, (), ())], ()),
        ((0, 3), [Box(0, (0, 0), (0, 3))], (1, 3)),
    ],
)
def test_chunks_end_where_parts_end(shape: tuple[int, ...], boxes: list[Box], chunk: tuple[int, ...]) -> None:
    assert plan_grid(shape, boxes, 4).chunk == chunk


def test_a_vocabulary_that_is_cut_at_odd_rows_has_few_large_chunks() -> None:
    shape = (50257, 768)
    boxes = rows(shape, 12565, 25129, 37693)
    grid = plan_grid(shape, boxes, 4)
    assert math.prod(grid.counts) <= MOST_CHUNKS
    assert math.prod(grid.chunk) * 4 >= LEAST_BYTES
    plans = [plan_chunks(told("w", shape, boxes), rank) for rank in range(4)]
    shared = [chunk for plan in plans for chunk in plan.chunks if chunk.fragments]
    assert len(shared) == 3, "only a chunk on each cut has bytes of two ranks"
    handed = sum(fragment.nbytes for chunk in shared for fragment in chunk.fragments)
    assert handed < 3 * LEAST_BYTES, "so that little goes from one rank to another"


@st.composite
def layouts(draw: Any) -> tuple[tuple[int, ...], list[Box]]:
    """A tensor cut along each axis at any places, its boxes dealt to any ranks."""
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    axes = []
    for length in shape:
        cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=3))) if length > 1 else []
        ends = [0, *cuts, length]
        axes.append(list(itertools.pairwise(ends)))
    boxes = [Box(0, (), ())]
    for spans in axes:
        boxes = [Box(0, (*box.offsets, start), (*box.sizes, stop - start)) for box in boxes for start, stop in spans]
    return shape, [Box(draw(st.integers(0, 3)), box.offsets, box.sizes) for box in boxes]


@given(layouts())
def test_every_element_is_written_once_by_the_writer_of_its_chunk(layout: Any) -> None:
    shape, boxes = layout
    parts = told("w", shape, boxes)
    plans = [plan_chunks(parts, rank) for rank in range(4)]
    assert all(plan.grids == plans[0].grids and plan.spilled == plans[0].spilled for plan in plans)
    written = [chunk.place for plan in plans for chunk in plan.chunks]
    grid = plans[0].grids["w"]
    assert len(written) == len(set(written)) == math.prod(grid.counts)
    for chunk in (chunk for plan in plans for chunk in plan.chunks):
        pieces = [overlap for _, overlap in chunk.own] + [fragment.overlap for fragment in chunk.fragments]
        inside = grid.overlap(chunk.place, (0,) * len(shape), shape)
        assert sum(piece.elements for piece in pieces) == inside.elements
    for fragments in plans[0].spilled.values():
        assert [fragment.start for fragment in fragments] == [
            sum(before.nbytes for before in fragments[:number]) for number in range(len(fragments))
        ]


def test_parts_that_overlap_leave_a_gap_or_leave_the_tensor_are_refused() -> None:
    with pytest.raises(LayoutMismatchError, match="overlap"):
        check_parts("w", (4, 2), [Box(0, (0, 0), (2, 2)), Box(1, (0, 0), (1, 2)), Box(2, (3, 0), (1, 2))])
    with pytest.raises(LayoutMismatchError, match="6 elements of 8"):
        check_parts("w", (4, 2), [Box(0, (0, 0), (3, 2))])
    with pytest.raises(LayoutMismatchError, match="leaves its shape"):
        check_parts("w", (4, 2), [Box(0, (3, 0), (2, 2)), Box(0, (0, 0), (2, 2))])
