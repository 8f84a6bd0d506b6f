"""Which bytes travel: what a holder does not have itself, and not much more."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from resilience.planning.pacing import SMALLEST_PIECE
from resilience.planning.travel import Range, pieces_of_ranges, rest_of, worth_it

LENGTH = 1 << 20
CUTS = st.lists(st.integers(0, LENGTH), max_size=12, unique=True).map(sorted)


def ranges(cuts: list[int]) -> list[Range]:
    return list(zip(cuts[::2], cuts[1::2], strict=False))


def bytes_of(each: Range) -> int:
    return each[1] - each[0]


@given(CUTS)
def test_what_is_not_covered_travels_and_covered_bytes_only_where_a_message_would_cost_more(cuts: list[int]) -> None:
    covered = ranges(cuts)
    rest = rest_of(LENGTH, covered)
    assert list(rest) == sorted(rest)
    assert all(before[1] < after[0] for before, after in itertools.pairwise(rest)), "apart from each other"
    for start, stop in covered:
        needless = sum(max(0, min(stop, last) - max(start, first)) for first, last in rest)
        assert needless in (0, stop - start), "a gap is joined whole"
        assert needless < 64 << 10
    edges = sorted({0, LENGTH, *cuts})
    for start, stop in itertools.pairwise(edges):
        is_covered = any(first <= start and stop <= last for first, last in covered)
        travels = any(first <= start and stop <= last for first, last in rest)
        assert travels or is_covered


@given(CUTS, st.sampled_from([SMALLEST_PIECE, 4 * SMALLEST_PIECE, 32 << 20]))
def test_pieces_are_the_ranges_in_order_and_end_at_multiples(cuts: list[int], piece_bytes: int) -> None:
    wanted = [each for each in ranges(cuts) if bytes_of(each)]
    pieces = list(pieces_of_ranges(wanted, piece_bytes))
    assert sum(map(bytes_of, pieces)) == sum(map(bytes_of, wanted))
    assert pieces == sorted(pieces)
    for start, stop in pieces:
        assert start // piece_bytes == (stop - 1) // piece_bytes
        assert any(first <= start and stop <= last for first, last in wanted)


def test_composing_pays_while_less_than_half_travels() -> None:
    assert worth_it(100, [(0, 10), (60, 90)])
    assert not worth_it(100, [(0, 50)])
