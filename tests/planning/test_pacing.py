"""A cap of the rate is never passed, whatever the clock does; pieces fit the cap; a hopeless cap is told in words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.planning.pacing import (
    LARGEST_PIECE,
    SMALLEST_PIECE,
    falls_behind,
    is_piece,
    piece_bytes,
    ready_at,
)

RATES = st.floats(1.0, 1e11)
SIZES = st.integers(0, 1 << 40)


@given(SIZES, st.integers(0, 16), RATES)
def test_every_piece_is_one_that_a_peer_accepts_and_few_enough(nbytes: int, holders: int, rate: float) -> None:
    piece = piece_bytes(nbytes, holders, rate)
    assert is_piece(piece)
    assert LARGEST_PIECE % piece == 0
    assert nbytes / piece <= 4096 or piece == LARGEST_PIECE


@given(st.integers(1, 1 << 28), st.integers(1, 4), st.floats(1 << 20, 1e11))
def test_a_round_of_pieces_takes_half_a_second_at_most(nbytes: int, holders: int, rate: float) -> None:
    piece = piece_bytes(nbytes, holders, rate)
    assert piece == SMALLEST_PIECE or piece * holders / rate <= 0.5 or nbytes / piece > 2048


def test_without_a_cap_a_piece_is_a_segment_of_the_digest() -> None:
    assert piece_bytes(1 << 30, 3, None) == LARGEST_PIECE


@pytest.mark.parametrize("odd", [0, -1, 1, SMALLEST_PIECE - 1, SMALLEST_PIECE + 1, 3 << 20, LARGEST_PIECE * 2])
def test_other_sizes_are_refused(odd: int) -> None:
    assert not is_piece(odd)


@given(RATES, st.lists(st.tuples(st.integers(1, 1 << 25), st.floats(0.0, 10.0)), min_size=1, max_size=50))
def test_from_any_moment_of_rest_no_more_has_gone_than_the_cap_allows(
    rate: float, turns: list[tuple[int, float]]
) -> None:
    ready, now, began, gone = 0.0, 0.0, 0.0, 0
    for nbytes, idle_s in turns:
        if idle_s > 5.0:  # rest: count anew
            now += idle_s
            if now >= ready:
                began, gone = now, 0
        ready = ready_at(ready, now, nbytes, rate)
        now = max(now, ready)
        gone += nbytes
        assert gone <= rate * (now - began + 1e-9 * (1 + now)) + 1e-6


def test_a_cap_that_cannot_keep_up_is_told_with_its_figures() -> None:
    assert falls_behind(24 << 20, 4 << 20, every_s=6.0) == ""
    told = falls_behind(48 << 20, 4 << 20, every_s=6.0)
    assert "12 s" in told
    assert "6 s apart" in told
