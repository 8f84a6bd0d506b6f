"""However a tensor was cut when it was saved, and however it is cut now: what comes back is what was saved."""

from __future__ import annotations

import itertools
import math
import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import resilience
from resilience import TrainingState
from tests.resharding.worlds import Holder, load, place, save

_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None

Grid = tuple[tuple[int, ...], ...]  # of each dimension: where its parts begin, and its end


@st.composite
def shapes_and_grids(draw: st.DrawFn) -> tuple[tuple[int, ...], Grid, Grid]:
    shape = tuple(draw(st.lists(st.integers(0, 7), min_size=1, max_size=3)))
    return shape, draw(grids(shape)), draw(grids(shape))


@st.composite
def grids(draw: st.DrawFn, shape: tuple[int, ...]) -> Grid:
    """Uneven parts, some of them empty; at most eight."""
    cuts = []
    for length in shape:
        inner = draw(st.lists(st.integers(0, length), max_size=1 if len(shape) > 2 else 2))
        cuts.append((0, *sorted(inner), length))
    return tuple(cuts)


def boxes(grid: Grid) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """(offsets, shape) of each part."""
    ranges = [list(itertools.pairwise(cuts)) for cuts in grid]
    return [
        (tuple(start for start, _ in box), tuple(stop - start for start, stop in box))
        for box in itertools.product(*ranges)
    ]


def cut(whole: torch.Tensor, offsets: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
    return whole[tuple(slice(start, start + length) for start, length in zip(offsets, shape, strict=True))].clone()


@settings(max_examples=settings().max_examples // 3)
@given(shapes_and_grids())
def test_any_part_of_a_tensor_is_read_from_any_parts(case: tuple[tuple[int, ...], Grid, Grid]) -> None:
    shape, before, after = case
    whole = torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)
    with tempfile.TemporaryDirectory(dir=_MEMORY) as folder:
        parts = boxes(before)
        states = [
            place(TrainingState(Holder(held=said(cut(whole, *box), shape, box[0]))), rank, len(parts), tp=len(parts))
            for rank, box in enumerate(parts)
        ]
        save(Path(folder), states)
        wanted = boxes(after)
        for rank, (offsets, lengths) in enumerate(wanted):
            held = said(torch.full(lengths, -1.0), shape, offsets)
            load(Path(folder), place(TrainingState(Holder(held=held)), rank, len(wanted), tp=len(wanted)))
            assert torch.equal(held, cut(whole, offsets, lengths))


def said(part: torch.Tensor, shape: tuple[int, ...], offsets: tuple[int, ...]) -> torch.Tensor:
    return resilience.shard_at(part, global_shape=shape, offsets=offsets)


@settings(max_examples=settings().max_examples // 3)
@given(
    st.lists(st.integers(1, 2), min_size=1, max_size=3),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4]),
    st.integers(0, 1),
)
def test_stacked_sections_are_read_under_any_count(sections: list[int], before: int, after: int, dim: int) -> None:
    lengths = [4 * each for each in sections]
    whole = torch.arange(3 * sum(lengths)).reshape((-1, 3) if dim == 0 else (3, -1))

    def part(index: int, count: int) -> torch.Tensor:
        pieces = [section.chunk(count, dim)[index] for section in whole.split(lengths, dim)]
        local = torch.cat(pieces, dim).clone()
        return resilience.shard(local, dim, index, count, stacked=[length // count for length in lengths])

    with tempfile.TemporaryDirectory(dir=_MEMORY) as folder:
        saving = [Holder(held=part(rank, before)) for rank in range(before)]
        save(Path(folder), [place(TrainingState(each), r, before, tp=before) for r, each in enumerate(saving)])
        for rank in range(after):
            expected = part(rank, after).clone()
            holder = Holder(
                held=resilience.shard(
                    torch.zeros_like(expected), dim, rank, after, stacked=[length // after for length in lengths]
                )
            )
            load(Path(folder), place(TrainingState(holder), rank, after, tp=after))
            assert torch.equal(holder.held, expected)
