"""How parameters lie in the flat buckets of a distributed optimizer, and what a flat range is in a tensor's own shape.

The buckets are laid out as Megatron Core lays out its own: parameters in reverse order (that in which gradients become
ready), each on a multiple of 64 elements, a bucket's end on a multiple that every rank can be given an equal part of.

A range of a tensor's elements in C order is no box, but a few boxes make it up: at most 2n − 1 in n dimensions. With
these, a rank writes its part of the optimizer's state into the tensor's own shape without gathering anything.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass

__all__ = ["ALIGNMENT", "Box", "FlatBucket", "Placed", "boxes_of_range", "plan_buckets"]

ALIGNMENT = 64  # elements, as Megatron Core starts its parameters
_END_ALIGNMENT = 128  # elements; Megatron Core pads a bucket to a multiple of this and of the group's size


@dataclass(frozen=True)
class Box:
    """A block of a tensor: `length` elements from `start` on in the range that it was cut from."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    start: int
    length: int


@dataclass(frozen=True)
class Placed:
    """Parameter number `index` lies at `start` to `stop` of its bucket."""

    index: int
    start: int
    stop: int


@dataclass(frozen=True)
class FlatBucket:
    """Parameters of one dtype, one after the other. `numel_unpadded`: up to the end of the last of them."""

    dtype: str
    placed: tuple[Placed, ...]
    numel_unpadded: int
    numel: int

    def share(self, rank: int, size: int) -> range:
        """The elements that `rank` of `size` keeps."""
        part = self.numel // size
        return range(rank * part, (rank + 1) * part)


def plan_buckets(
    numels: Sequence[int],
    dtypes: Sequence[str],
    size: int,
    bucket_numel: int | None = None,
    alone: Collection[int] = (),
) -> tuple[FlatBucket, ...]:
    """Buckets for `size` ranks, dtype by dtype in the order of first appearance.

    `bucket_numel`: a bucket is closed when it holds at least so many elements (None: one bucket for each dtype).
    `alone`: the numbers of parameters that get a bucket for themselves.
    """
    assert len(numels) == len(dtypes), "one dtype for each parameter"
    buckets: list[FlatBucket] = []
    for dtype in dict.fromkeys(dtypes):
        placed: list[Placed] = []
        for index in reversed([index for index, its in enumerate(dtypes) if its == dtype]):
            if placed and index in alone:
                buckets.append(_closed(dtype, placed, size))
                placed = []
            start = _up_to_multiple(placed[-1].stop, ALIGNMENT) if placed else 0
            placed.append(Placed(index, start, start + numels[index]))
            if index in alone or (bucket_numel is not None and placed[-1].stop >= bucket_numel):
                buckets.append(_closed(dtype, placed, size))
                placed = []
        if placed:
            buckets.append(_closed(dtype, placed, size))
    return tuple(buckets)


def boxes_of_range(shape: Sequence[int], start: int, stop: int) -> tuple[Box, ...]:
    """The boxes that elements `start` to `stop` (in C order) of a tensor of `shape` make up, in that order."""
    assert 0 <= start <= stop <= math.prod(shape), f"{start}..{stop} is no range of {list(shape)}"
    if start == stop:
        return ()
    if len(shape) <= 1:
        return (Box((start,) * len(shape), (stop - start,) * len(shape), 0, stop - start),)
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row
    if first > last:  # all in one row
        return _in_row(shape, first - 1, start, stop, 0)
    boxes = _in_row(shape, first - 1, start, first * row, 0) if start < first * row else ()
    if first < last:
        offsets = (first, *(0 for _ in shape[1:]))
        boxes += (Box(offsets, (last - first, *shape[1:]), first * row - start, (last - first) * row),)
    if last * row < stop:
        boxes += _in_row(shape, last, last * row, stop, last * row - start)
    return boxes


def _in_row(shape: Sequence[int], row: int, start: int, stop: int, passed: int) -> tuple[Box, ...]:
    """The boxes of a range within one row; `passed` elements of the whole range come before it."""
    base = row * math.prod(shape[1:])
    return tuple(
        Box((row, *box.offsets), (1, *box.shape), passed + box.start, box.length)
        for box in boxes_of_range(shape[1:], start - base, stop - base)
    )


def _closed(dtype: str, placed: Sequence[Placed], size: int) -> FlatBucket:
    unpadded = placed[-1].stop
    return FlatBucket(dtype, tuple(placed), unpadded, _up_to_multiple(unpadded, math.lcm(size, _END_ALIGNMENT)))


def _up_to_multiple(count: int, of: int) -> int:
    return -(-count // of) * of
