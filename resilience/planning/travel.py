"""Which bytes of a shard must travel to a holder that has the others itself. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from resilience.planning.pacing import LARGEST_PIECE

__all__ = ["MOST_RANGES", "Range", "are_ranges", "pieces_of_ranges", "rest_of", "spans_of", "worth_it"]

#: First byte and the byte after the last.
Range = tuple[int, int]

MOST_RANGES: Final = 1 << 16  #: of one shard, that one peer names to another

_JOINED_BYTES: Final = 64 << 10  # a gap that costs less to send than one more message
_LEAST_SPAN: Final = 4 << 10
_LARGE_SPAN: Final = 1 << 20  # worth a digest of its own in any shard
_SPANS: Final = 64  # of a small shard


def rest_of(nbytes: int, covered: Sequence[Range], *, joined_bytes: int | None = None) -> tuple[Range, ...]:
    """What is left of `nbytes` bytes without the ranges `covered`, which do not overlap; small gaps are joined."""
    gap = _JOINED_BYTES if joined_bytes is None else joined_bytes
    rest: list[Range] = []
    at = 0
    for start, stop in [*sorted(covered), (nbytes, nbytes)]:
        if start > at:
            if rest and at - rest[-1][1] < gap:
                rest[-1] = (rest[-1][0], start)
            else:
                rest.append((at, start))
        at = max(at, stop)
    return tuple(rest)


def worth_it(nbytes: int, rest: Sequence[Range]) -> bool:
    """Whether so little must travel that copying the others pays: less than half."""
    return 2 * sum(stop - start for start, stop in rest) < nbytes


def spans_of(pieces: Sequence[Range], nbytes: int) -> tuple[Range, ...]:
    """The parts of a shard of `nbytes` that are compared with those of another save: large pieces by themselves, small
    ones together with their neighbours, as many as are worth it. `pieces` lie in order, without gaps."""
    large = max(_LEAST_SPAN, min(_LARGE_SPAN, nbytes // _SPANS))
    spans: list[Range] = []
    begun = stopped = pieces[0][0] if pieces else 0
    for start, stop in pieces:
        if stop - start >= large:
            spans += [(begun, start)] if start > begun else []
            spans.append((start, stop))
            begun = stop
        elif stop - begun >= large:
            spans.append((begun, stop))
            begun = stop
        stopped = stop
    return (*spans, (begun, stopped)) if stopped > begun else tuple(spans)


def are_ranges(ranges: Sequence[Range], nbytes: int) -> bool:
    """Whether they lie in order, apart from each other, in a shard of `nbytes`."""
    edges = [edge for each in ranges for edge in each]
    inside = not edges or (edges[0] >= 0 and edges[-1] <= nbytes)
    return inside and all(start < stop for start, stop in ranges) and edges == sorted(edges)


def pieces_of_ranges(ranges: Sequence[Range], piece_bytes: int = LARGEST_PIECE) -> Iterator[Range]:
    """The messages in which ranges are sent: none reaches over a multiple of `piece_bytes`, which divides a segment."""
    for start, stop in ranges:
        at = start
        while at < stop:
            end = min(stop, (at // piece_bytes + 1) * piece_bytes)
            yield at, end
            at = end
