"""Replicated items are cut evenly at row boundaries, and every row is stored by exactly one rank."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from resilience.planning.split import split_rows

ITEMS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 64)), max_size=12)


@given(ITEMS, st.integers(1, 9))
def test_every_row_is_covered_exactly_once_and_in_order(items: list[tuple[int, int]], parts: int) -> None:
    covered: list[list[int]] = [[] for _ in items]
    for part in split_rows(items, parts):
        for item, start, stop in part:
            covered[item] += range(start, stop)
    assert covered == [list(range(rows)) for rows, _ in items]


@given(ITEMS, st.integers(1, 9))
def test_parts_differ_from_an_even_share_by_less_than_the_largest_row(items: list[tuple[int, int]], parts: int) -> None:
    total = sum(rows * row_bytes for rows, row_bytes in items)
    largest = max((row_bytes for rows, row_bytes in items if rows), default=0)
    for part in split_rows(items, parts):
        size = sum((stop - start) * items[item][1] for item, start, stop in part)
        assert abs(size - total / parts) <= largest


@given(ITEMS, st.integers(1, 9))
def test_an_item_without_bytes_is_stored_by_the_first_rank(items: list[tuple[int, int]], parts: int) -> None:
    first = {item for item, _, _ in split_rows(items, parts)[0]}
    assert first >= {item for item, (rows, row_bytes) in enumerate(items) if rows * row_bytes == 0}


def test_one_huge_item_is_shared_by_all() -> None:
    assert split_rows([(10, 4)], 2) == [[(0, 0, 5)], [(0, 5, 10)]]


def test_one_row_larger_than_everything_else_stays_whole() -> None:
    assert split_rows([(1, 100), (4, 1)], 4) == [[(0, 0, 1)], [], [], [(1, 0, 4)]]
