"""What is due at a boundary follows from interval, agreed requests, stop and the end of the run."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from resilience.planning.schedule import Due, due_at, shortest_interval


def due(iteration: int = 7, **changed: Any) -> Due:
    inputs: dict[str, Any] = {
        "save_interval": 100,
        "non_persistent_interval": 10,
        "requested_non_persistent": False,
        "requested_persistent": False,
        "stop_requested": False,
        "last": False,
        "save_set": True,
        "non_persistent_set": True,
    }
    return due_at(iteration, **(inputs | changed))


def test_nothing_is_due_between_intervals() -> None:
    assert due(7) == Due(False, False, False)


def test_a_save_is_due_when_the_interval_divides_the_iteration() -> None:
    assert due(20) == Due(True, False, False)


def test_both_kinds_due_together_are_both_made() -> None:
    assert due(200) == Due(True, True, False)


def test_a_stop_makes_a_persistent_save_where_save_is_set() -> None:
    assert due(stop_requested=True) == Due(False, True, True)


def test_a_stop_makes_a_non_persistent_save_where_save_is_not_set() -> None:
    assert due(stop_requested=True, save_set=False) == Due(True, False, True)


def test_a_stop_without_any_place_to_save_still_stops() -> None:
    assert due(stop_requested=True, save_set=False, non_persistent_set=False) == Due(False, False, True)


def test_the_last_iteration_makes_a_persistent_save_and_finishes_even_if_a_stop_was_asked_for() -> None:
    assert due(last=True, stop_requested=True) == Due(False, True, False)


def test_requests_are_served() -> None:
    assert due(requested_non_persistent=True) == Due(True, False, False)
    assert due(requested_persistent=True) == Due(False, True, False)


@given(st.integers(0, 300), *[st.none() | st.integers(0, 20)] * 2, *[st.booleans()] * 6)
def test_no_kind_is_ever_due_where_it_has_no_place(
    iteration: int, every: int | None, often: int | None, a: bool, b: bool, stop: bool, last: bool, s: bool, n: bool
) -> None:
    answer = due_at(
        iteration,
        save_interval=every,
        non_persistent_interval=often,
        requested_non_persistent=a,
        requested_persistent=b,
        stop_requested=stop,
        last=last,
        save_set=s,
        non_persistent_set=n,
    )
    assert answer.persistent <= s
    assert answer.non_persistent <= n
    assert answer.stop == (stop and not last)
    if answer.stop and (s or n):
        assert answer.persistent or answer.non_persistent


def test_memory_is_there_for_the_closest_saves_that_the_cadence_may_choose() -> None:
    assert shortest_interval(50, "fixed") == 50
    assert shortest_interval(50, "auto") == 1, "it follows what is measured"
    assert shortest_interval(None, "auto") is None, "only on request, whatever is measured"
