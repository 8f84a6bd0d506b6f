"""Which chunks one rank writes from its own bytes, which it completes with others' fragments, and what it hands over.

Computed by every rank from what all of them have, so that all agree without asking again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from resilience.errors import LayoutMismatchError
from resilience.formats.zarr_grid import Box, Grid, Overlap, check_parts, plan_grid, writers

__all__ = ["Fragment", "Given", "Plan", "WholeChunk", "plan_chunks"]


@dataclass(frozen=True)
class Given:
    """A rank's part of a tensor, as it tells the others; `part` is its number among that rank's parts."""

    key: str
    dtype: str
    itemsize: int
    shape: tuple[int, ...]
    box: Box
    part: int


@dataclass(frozen=True)
class Fragment:
    """Bytes of a chunk that another rank than its writer has; they lie from `start` on in that rank's spill file."""

    rank: int
    part: int
    overlap: Overlap
    start: int
    nbytes: int


@dataclass(frozen=True)
class WholeChunk:
    """A chunk that this rank writes: what it has of it by the number of the part, and what others hand over."""

    key: str
    place: tuple[int, ...]
    own: Sequence[tuple[int, Overlap]]
    fragments: Sequence[Fragment] = ()


@dataclass(frozen=True)
class Plan:
    """`grids` and `dtypes` of all arrays; `chunks` are this rank's.

    `spilled`: the fragments of every rank, in the order in which they lie in its spill file.
    """

    grids: Mapping[str, Grid]
    dtypes: Mapping[str, str]
    chunks: Sequence[WholeChunk]
    spilled: Mapping[int, Sequence[Fragment]] = field(default_factory=dict)


def plan_chunks(given: Sequence[Given], rank: int) -> Plan:
    """What `rank` does. LayoutMismatchError unless the parts fit together."""
    by_key: dict[str, list[Given]] = {}
    for each in given:
        by_key.setdefault(each.key, []).append(each)
    grids: dict[str, Grid] = {}
    chunks: list[WholeChunk] = []
    spilled: dict[int, list[Fragment]] = {}
    for key, parts in sorted(by_key.items()):
        first = parts[0]
        if any((part.dtype, part.shape) != (first.dtype, first.shape) for part in parts):
            told = sorted({f"{part.dtype} {part.shape}" for part in parts})
            raise LayoutMismatchError(f"Ranks disagree on {key}: {', '.join(told[:8])}.")
        boxes = [part.box for part in parts if 0 not in part.shape]  # of one without elements all may give the whole
        check_parts(key, first.shape, boxes)
        grids[key] = plan_grid(first.shape, boxes, first.itemsize)
        chunks += _chunks(key, grids[key], parts, rank, spilled)
    return Plan(grids, {key: parts[0].dtype for key, parts in by_key.items()}, chunks, spilled)


def _chunks(
    key: str, grid: Grid, parts: Sequence[Given], rank: int, spilled: dict[int, list[Fragment]]
) -> list[WholeChunk]:
    writer_of = writers(grid, [part.box for part in parts])
    own: dict[tuple[int, ...], list[tuple[int, Overlap]]] = {}
    handed: dict[tuple[int, ...], list[Fragment]] = {}
    for part in sorted(parts, key=lambda part: (part.box, part.part)):
        box = part.box
        for place in grid.touched(box.offsets, box.sizes):
            writer = writer_of[place]
            if box.rank == rank == writer:
                own.setdefault(place, []).append((part.part, grid.overlap(place, box.offsets, box.sizes)))
            if box.rank != writer:
                overlap = grid.overlap(place, box.offsets, box.sizes)
                before = spilled.setdefault(box.rank, [])
                start = before[-1].start + before[-1].nbytes if before else 0
                fragment = Fragment(box.rank, part.part, overlap, start, overlap.elements * part.itemsize)
                before.append(fragment)
                if writer == rank:
                    handed.setdefault(place, []).append(fragment)
    return [WholeChunk(key, place, own[place], handed.get(place, ())) for place in sorted(own)]
