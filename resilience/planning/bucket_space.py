"""Where a parameter lies in the one-dimensional buckets in which Megatron Core keeps an optimizer's state.

Megatron Core lays parameters out in reverse order, each on a multiple of 64 elements, and closes a bucket when it is
full. What it stores (`dp_reshardable`) are the buckets' lengths and contents, not which parameter lies where: that
follows from the order of the parameters, if the lengths agree.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from resilience.errors import LayoutMismatchError
from resilience.planning.flat import ALIGNMENT

__all__ = [
    "Flattened",
    "InBucket",
    "LocalBlock",
    "Run",
    "bucket_number",
    "common_box",
    "places_in_buckets",
    "runs_of_box",
    "stem_of",
]


@dataclass(frozen=True)
class InBucket:
    """A parameter begins at element `start` of bucket number `bucket`."""

    bucket: int
    start: int


@dataclass(frozen=True)
class Run:
    """`length` elements of a box that follow each other in the whole: from `start` there, from `at` in the box."""

    start: int
    at: int
    length: int


@dataclass(frozen=True)
class LocalBlock:
    """A box of a rank's part of a tensor (`start`, `sizes`), and where it lies in the whole (`offsets`)."""

    start: tuple[int, ...]
    sizes: tuple[int, ...]
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Flattened:
    """A rank's part of a tensor, of shape `shape`, lies in C order in a one-dimensional one, `stored`, from `start` on.

    `blocks` say where it lies in the whole. Of the whole nothing else is there.
    """

    stored: str
    start: int
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    blocks: tuple[LocalBlock, ...]


def bucket_number(tp: tuple[int, int], pp: tuple[int, int], ep: tuple[int, int] = (0, 1)) -> int:
    """Which buckets belong to the ranks at a place of the model: Megatron's `dp_group_idx`. Each place as (rank, size).

    `ep` for an optimizer of experts alone, whose ranks differ in the experts that they have.
    """
    return tp[0] + tp[1] * (ep[0] + ep[1] * pp[0])


def stem_of(number: int, buffer: int, dtype: str, bucket: int, chained: int | None = None) -> str:
    """What the keys of a bucket's tensors begin with; `dtype` of its parameters, gradients are float32.

    `chained`: the optimizer's position, where there are several.
    """
    prefix = "" if chained is None else f"chained_{chained}."
    return (
        f"{prefix}optimizer.distributed.dp_group_idx_{number}.gbuf_idx_{buffer}"
        f".dtype_(torch.{dtype}, torch.float32).bucket_idx_{bucket}"
    )


def places_in_buckets(numels: Sequence[int], lengths: Sequence[int]) -> list[InBucket]:
    """Where each of the parameters lies, in the order given; `lengths` of the buckets without what pads their end.

    LayoutMismatchError unless every bucket ends with the end of a parameter, and all parameters have a place.
    """
    places: dict[int, InBucket] = {}
    bucket, end = 0, 0
    for index in reversed(range(len(numels))):
        start = -(-end // ALIGNMENT) * ALIGNMENT
        end = start + numels[index]
        if bucket >= len(lengths) or end > lengths[bucket]:
            raise LayoutMismatchError(
                f"parameter {index} of {len(numels)} does not fit into the buckets: they hold {list(lengths)[:8]} "
                f"elements, and in bucket {bucket} it would end at {end}"
            )
        places[index] = InBucket(bucket, start)
        if end == lengths[bucket]:
            bucket, end = bucket + 1, 0
    if bucket != len(lengths):
        raise LayoutMismatchError(f"the parameters fill {bucket} of {len(lengths)} buckets only")
    return [places[index] for index in range(len(numels))]


_Box = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]


def common_box(block: LocalBlock, offsets: Sequence[int], sizes: Sequence[int]) -> _Box | None:
    """What a block and a box of the whole have in common: where in the box, where in the rank's part, how large."""
    inside, local, lengths = [], [], []
    for first, count, at, start, size in zip(offsets, sizes, block.offsets, block.start, block.sizes, strict=True):
        low, high = max(first, at), min(first + count, at + size)
        if low >= high:
            return None
        inside.append(low - first)
        local.append(low - at + start)
        lengths.append(high - low)
    return tuple(inside), tuple(local), tuple(lengths)


def runs_of_box(shape: Sequence[int], offsets: Sequence[int], sizes: Sequence[int]) -> Iterator[Run]:
    """The runs that a box of a tensor of `shape` is in C order, first to last."""
    if 0 in sizes:
        return
    inner = len(shape)  # from this axis on the box has all that the tensor has
    while inner > 0 and sizes[inner - 1] == shape[inner - 1]:
        inner -= 1
    inner = max(inner - 1, 0)
    length = math.prod(sizes[inner:])
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    first = sum(offset * stride for offset, stride in zip(offsets, strides, strict=True))
    for number in range(math.prod(sizes[:inner])):
        start, left = first, number
        for axis in reversed(range(inner)):
            left, place = divmod(left, sizes[axis])
            start += place * strides[axis]
        yield Run(start, number * length, length)
