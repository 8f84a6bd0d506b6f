"""Who keeps a wait waiting is given up when it is dead or stuck, never because it is slow, and always in the end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.planning.patience import LOOKS_PER_BOUND, STALL_BOUNDS, GivenUp, Patience

BOUND_S = 8.0
GAPS = st.floats(0.01, 50.0)


def wait(
    patience: Patience, gaps: list[float], beat_every_s: dict[int, float], dies_at: dict[int, float] | None = None
) -> tuple[float, GivenUp | None]:
    """Look after each gap at hearts that beat every so often, until they die. When somebody was given up, and who."""
    now = 0.0
    for gap in gaps:
        now += gap
        beats = {}
        for rank, every_s in beat_every_s.items():
            lived = min(now, (dies_at or {}).get(rank, now))
            beats[rank] = str(int(lived / every_s)).encode()
        if given_up := patience.look(now, beats):
            return now, given_up
    return now, None


@given(st.lists(GAPS, min_size=1, max_size=200), st.floats(0.1, BOUND_S / 4))
def test_nobody_whose_heart_beats_is_given_up_however_seldom_we_look(gaps: list[float], every_s: float) -> None:
    gaps = [max(gap, 1.01 * every_s) for gap in gaps]  # so that each look finds a new beat
    patience = Patience([3, 5], BOUND_S, None, 0.0)
    assert wait(patience, gaps, {3: every_s, 5: every_s})[1] is None


@given(st.lists(st.floats(0.01, BOUND_S / 8), min_size=1, max_size=50), st.floats(0.1, BOUND_S / 4))
def test_a_peer_that_lives_and_does_not_move_is_given_up_at_the_longer_bound(gaps: list[float], every_s: float) -> None:
    patience = Patience([3], BOUND_S, STALL_BOUNDS * BOUND_S, 0.0)
    gaps = gaps * int(2 + STALL_BOUNDS * BOUND_S / sum(gaps))
    at, given_up = wait(patience, gaps, {3: every_s})
    assert given_up is not None
    assert (given_up.why, given_up.ranks) == ("stalled", (3,))
    assert STALL_BOUNDS * BOUND_S - 1e-6 <= at <= STALL_BOUNDS * BOUND_S + BOUND_S / 8


@given(st.lists(st.floats(0.01, BOUND_S / 4), min_size=50, max_size=50), st.floats(0.0, 20.0))
def test_a_dead_peer_is_named_within_two_bounds_of_its_death_and_the_living_are_not(
    gaps: list[float], dies_at: float
) -> None:
    patience = Patience([3, 5, 7], BOUND_S, None, 0.0)
    every = dict.fromkeys((3, 5, 7), BOUND_S / 16)
    for rank in (3, 7):
        every[rank] = 0.009  # new at each look
    gaps += [BOUND_S / 8] * 40
    at, given_up = wait(patience, gaps, every, {5: dies_at})
    assert given_up is not None
    assert (given_up.why, given_up.ranks) == ("silent", (5,))
    assert dies_at + BOUND_S - BOUND_S / 16 - 1e-6 <= at + BOUND_S / 4
    assert at <= max(dies_at, gaps[0]) + 2 * BOUND_S


@given(st.floats(BOUND_S, 1e6))
def test_a_process_that_slept_accuses_nobody_when_it_wakes(slept_s: float) -> None:
    patience = Patience([3], BOUND_S, STALL_BOUNDS * BOUND_S, 0.0)
    assert patience.look(1.0, {3: b"1"}) is None
    assert patience.look(1.0 + slept_s, {3: b"1"}) is None, "the peer may have beaten as soon as we look again"
    assert patience.look(2.0 + slept_s, {3: b"2"}) is None


def test_so_many_looks_at_least_are_taken_before_anybody_is_given_up() -> None:
    patience = Patience([3], BOUND_S, None, 0.0)
    looks = [patience.look(1e3 * (turn + 1), {}) for turn in range(LOOKS_PER_BOUND)]
    assert looks[:-1] == [None] * (LOOKS_PER_BOUND - 1)
    assert looks[-1] == GivenUp((3,), "silent", BOUND_S)


@pytest.mark.parametrize("beats", [{}, {3: b"9"}])
def test_the_first_beat_that_is_seen_may_be_the_last(beats: dict[int, bytes]) -> None:
    patience = Patience([3], BOUND_S, None, 0.0)
    seconds = next(now for now in range(1, 100) if patience.look(float(now), beats))
    assert BOUND_S <= seconds <= BOUND_S + 1


def test_a_clock_that_goes_backwards_counts_for_nothing() -> None:
    patience = Patience([3], BOUND_S, BOUND_S, 100.0)
    assert patience.look(0.0, {3: b"1"}) is None
    assert patience.look(100.0, {3: b"2"}) is None
