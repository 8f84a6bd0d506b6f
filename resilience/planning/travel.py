"""Which bytes of a shard must travel to a holder that has the others itself. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from resilience.planning.pacing import LARGEST_PIECE

__all__ = ["Range", "pieces_of_ranges", "rest_of", "worth_it"]

#: First byte and the byte after the last.
Range = tuple[int, int]

_JOINED_BYTES: Final = 64 << 10  # a gap that costs less to send than one more message


def rest_of(nbytes: int, covered: Sequence[Range]) -> tuple[Range, ...]:
    """What is left of `nbytes` bytes without the ranges `covered`, which do not overlap; small gaps are joined."""
    rest: list[Range] = []
    at = 0
    for start, stop in [*sorted(covered), (nbytes, nbytes)]:
        if start > at:
            if rest and at - rest[-1][1] < _JOINED_BYTES:
                rest[-1] = (rest[-1][0], start)
            else:
                rest.append((at, start))
        at = max(at, stop)
    return tuple(rest)


def worth_it(nbytes: int, rest: Sequence[Range]) -> bool:
    """Whether so little must travel that copying the others pays: less than half."""
    return 2 * sum(stop - start for start, stop in rest) < nbytes


def pieces_of_ranges(ranges: Sequence[Range], piece_bytes: int = LARGEST_PIECE) -> Iterator[Range]:
    """The messages in which ranges are sent: none reaches over a multiple of `piece_bytes`, which divides a segment."""
    for start, stop in ranges:
        at = start
        while at < stop:
            end = min(stop, (at // piece_bytes + 1) * piece_bytes)
            yield at, end
            at = end
