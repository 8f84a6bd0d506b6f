"""Into which chunks a tensor is cut, and which rank writes each of them. Pure; equal on all ranks.

A chunk is one file and has one writer. Where the ranks' parts allow it, every chunk lies inside one part: per axis it
is as long as the greatest common divisor of the places at which parts begin. Where that gives too many chunks, or very
small ones (a vocabulary of 50257 rows, cut at 12565), chunks are made larger; one that then touches parts of several
ranks is written by the rank that has most of it, and the others hand it their fragments.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from resilience.errors import LayoutMismatchError

__all__ = ["Box", "Grid", "Overlap", "check_parts", "plan_grid", "writers"]

MOST_CHUNKS = 4096
LEAST_BYTES = 1 << 20  # a chunk that is smaller costs more as a file than as bytes
_CHUNKS_PER_PART = 4  # as many chunks are made whatever their size, rather than move bytes between ranks


@dataclass(frozen=True, order=True)
class Box:
    """A part of a tensor, and the rank that has it."""

    rank: int
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Grid:
    """A regular grid; the last chunk along an axis may reach beyond the tensor."""

    shape: tuple[int, ...]
    chunk: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Chunks along each axis; none where the tensor has no elements."""
        return tuple(-(-length // step) for length, step in zip(self.shape, self.chunk, strict=True))

    def touched(self, offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Places in the grid of the chunks that a region touches, in order."""
        if 0 in sizes:
            return iter(())
        return itertools.product(
            *(
                range(start // step, (start + size - 1) // step + 1)
                for start, size, step in zip(offsets, sizes, self.chunk, strict=True)
            )
        )

    def overlap(self, place: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> Overlap:
        """What a chunk and a region have in common; not empty if the region touches the chunk."""
        starts = [max(at * step, start) for at, step, start in zip(place, self.chunk, offsets, strict=True)]
        stops = [
            min((at + 1) * step, start + size)
            for at, step, start, size in zip(place, self.chunk, offsets, sizes, strict=True)
        ]
        lengths = tuple(stop - start for start, stop in zip(starts, stops, strict=True))
        in_chunk = tuple(start - at * step for start, at, step in zip(starts, place, self.chunk, strict=True))
        return Overlap(tuple(starts), lengths, in_chunk)


@dataclass(frozen=True)
class Overlap:
    """A region of the tensor from `starts` on, and where it begins in a chunk."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    in_chunk: tuple[int, ...]

    @property
    def elements(self) -> int:
        return math.prod(self.lengths)


def check_parts(key: str, shape: Sequence[int], boxes: Sequence[Box]) -> None:
    """LayoutMismatchError unless the boxes cover the tensor exactly once."""
    for box in boxes:
        if len(box.offsets) != len(shape) or any(
            start < 0 or size < 0 or start + size > whole
            for start, size, whole in zip(box.offsets, box.sizes, shape, strict=True)
        ):
            raise LayoutMismatchError(f"A part {box.sizes} at {box.offsets} of {key} leaves its shape {tuple(shape)}.")
    given, whole = sum(math.prod(box.sizes) for box in boxes), math.prod(shape)
    if given != whole:
        raise LayoutMismatchError(f"The ranks' parts of {key} have {given} elements of {whole}.")
    open_boxes: list[Box] = []
    for box in sorted((box for box in boxes if 0 not in box.sizes), key=lambda box: box.offsets):
        open_boxes = [other for other in open_boxes if not shape or other.offsets[0] + other.sizes[0] > box.offsets[0]]
        if any(_meet(box, other) for other in open_boxes):
            raise LayoutMismatchError(f"The ranks' parts of {key} overlap at {box.offsets}.")
        open_boxes.append(box)


def _meet(one: Box, other: Box) -> bool:
    return all(
        first < second + more and second < first + size
        for first, size, second, more in zip(one.offsets, one.sizes, other.offsets, other.sizes, strict=True)
    )


def plan_grid(shape: tuple[int, ...], boxes: Sequence[Box], itemsize: int) -> Grid:
    """The grid of a tensor whose parts are `boxes`."""
    finest = tuple(_step(axis, length, boxes) for axis, length in enumerate(shape))
    exact = Grid(shape, finest)
    count = math.prod(exact.counts)
    large = math.prod(finest) * itemsize >= LEAST_BYTES
    if count <= MOST_CHUNKS and (large or count <= _CHUNKS_PER_PART * len(boxes)):
        return exact
    elements = max(1, LEAST_BYTES // itemsize, math.prod(shape) // MOST_CHUNKS)
    while True:
        merged = Grid(shape, _merged(shape, finest, elements))
        if math.prod(merged.counts) <= MOST_CHUNKS:
            return merged
        elements *= 2


def _step(axis: int, length: int, boxes: Sequence[Box]) -> int:
    """The longest chunk along an axis whose ends fall on all ends of parts; an end of the tensor needs none."""
    ends = {end for box in boxes for end in (box.offsets[axis], box.offsets[axis] + box.sizes[axis])}
    return math.gcd(*(ends - {0, length})) or max(1, length)


def _merged(shape: Sequence[int], finest: Sequence[int], elements: int) -> tuple[int, ...]:
    """Chunks of about `elements`: whole along the last axes, so that their bytes lie together in a rank's part."""
    chunk = [1] * len(shape)
    inside = 1
    for axis in reversed(range(len(shape))):
        length = max(1, shape[axis])
        wanted = -(-elements // inside)
        aligned = -(-wanted // finest[axis]) * finest[axis]
        chunk[axis] = min(length, aligned)
        inside *= chunk[axis]
        if chunk[axis] < length:
            break
    return tuple(chunk)


def writers(grid: Grid, boxes: Sequence[Box]) -> Mapping[tuple[int, ...], int]:
    """The rank that writes each chunk: it has most of it, of equals the lowest."""
    shares: dict[tuple[int, ...], dict[int, int]] = {}
    for box in boxes:
        for place in grid.touched(box.offsets, box.sizes):
            of_chunk = shares.setdefault(place, {})
            of_chunk[box.rank] = of_chunk.get(box.rank, 0) + grid.overlap(place, box.offsets, box.sizes).elements
    return {place: min(had, key=lambda rank: (-had[rank], rank)) for place, had in shares.items()}
