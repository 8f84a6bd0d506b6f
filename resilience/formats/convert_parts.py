"""In which parts a stored tensor is read, so that each stored box is read once and little is in memory. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

__all__ = ["Extent", "parts_of", "rows_of"]

#: Offsets and sizes of a part of a tensor.
Extent = tuple[tuple[int, ...], tuple[int, ...]]


def rows_of(shape: Sequence[int], boxes: Sequence[Extent], row_bytes: int, most_bytes: int) -> list[tuple[int, int]]:
    """Ranges of rows (first, count), in order, that together are the tensor (which has at least one axis).

    No range cuts a stored box in two. A range has at most `most_bytes`, unless a stored box has more.
    """
    ranges: list[tuple[int, int]] = []
    for start, stop in _uncut(shape[0], boxes):
        if ranges and (stop - ranges[-1][0]) * row_bytes <= most_bytes:
            ranges[-1] = (ranges[-1][0], stop - ranges[-1][0])
        else:
            ranges.append((start, stop - start))
    return ranges


def _uncut(length: int, boxes: Sequence[Extent]) -> Iterator[tuple[int, int]]:
    """The shortest ranges of rows of which none ends inside a box; rows that no box has are ranges too."""
    start = reach = 0
    for offset, size in sorted((offsets[0], sizes[0]) for offsets, sizes in boxes if 0 not in sizes):
        if offset >= reach and reach > start:
            yield start, reach
            start = reach
        if offset > reach:
            yield start, offset
            start = offset
        reach = max(reach, offset + size)
    if reach > start:
        yield start, reach
    if length > reach or length == 0:
        yield reach, length


def parts_of(shape: Sequence[int], boxes: Sequence[Extent], itemsize: int, most_bytes: int) -> list[Extent]:
    """Parts that cover the tensor exactly once: ranges of rows, or single boxes where a range would be too large."""
    whole: Extent = ((0,) * len(shape), tuple(shape))
    if not shape or math.prod(shape) * itemsize <= most_bytes:
        return [whole]
    inner = tuple(shape[1:])
    row_bytes = math.prod(inner) * itemsize
    parts: list[Extent] = []
    for start, count in rows_of(shape, boxes, row_bytes, most_bytes):
        inside = [box for box in boxes if start <= box[0][0] < start + count and 0 not in box[1]]
        covered = sum(math.prod(sizes) for _, sizes in inside) == count * math.prod(inner)
        if count * row_bytes > most_bytes and covered:
            parts += sorted(inside)
        else:
            parts.append(((start, *(0,) * len(inner)), (count, *inner)))
    return parts
