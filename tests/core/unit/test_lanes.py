"""Background work in order, with an end that is bounded."""

from __future__ import annotations

import threading

from hypothesis import given
from hypothesis import strategies as st

from resilience.runtime.worker import Lane
from tests.core.training import wait_until


def test_tasks_run_one_after_the_other_in_the_order_they_came() -> None:
    lane, seen = Lane("test", lambda what, error: None), []
    for number in range(50):
        lane.submit(str(number), lambda number=number: seen.append(number))  # type: ignore[misc]
    assert lane.wait(60)
    assert seen == list(range(50))
    assert lane.close(60)


def test_a_task_that_raises_is_told_and_the_next_one_runs() -> None:
    told, seen = [], []
    lane = Lane("test", lambda what, error: told.append((what, str(error))))
    lane.submit("breaks", lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    lane.submit("goes on", lambda: seen.append(1))
    assert lane.wait(60)
    assert told == [("breaks", "division by zero")]
    assert seen == [1]
    assert lane.close(60)


def test_waiting_is_bounded_and_says_whether_all_is_done() -> None:
    release = threading.Event()
    lane = Lane("test", lambda what, error: None)
    lane.submit("slow", lambda: release.wait(60) and None)
    assert not lane.wait(0.1)
    assert not lane.close(0.1), "it did not end in time"
    release.set()
    assert lane.wait(60)


def test_closing_finishes_what_is_queued_and_dropping_only_what_runs() -> None:
    for drop, expected in ((False, [1, 2]), (True, [1])):
        seen: list[int] = []
        running, release = threading.Event(), threading.Event()
        lane = Lane("test", lambda what, error: None)

        def first(
            seen: list[int] = seen, running: threading.Event = running, release: threading.Event = release
        ) -> None:
            running.set()
            release.wait(60)
            seen.append(1)

        lane.submit("first", first)
        lane.submit("second", lambda seen=seen: seen.append(2))  # type: ignore[misc]
        running.wait(60)
        threading.Thread(target=lambda: (wait_until(lambda: lane._closing == drop), release.set())).start()  # noqa: B023
        assert lane.close(60, drop=drop)
        assert seen == expected


@given(st.lists(st.booleans(), max_size=20))
def test_whatever_fails_every_task_is_finished_once(failing: list[bool]) -> None:
    done: list[int] = []
    lane = Lane("test", lambda what, error: None)

    def task(number: int, fails: bool) -> None:
        done.append(number)
        if fails:
            raise ValueError(number)

    for number, fails in enumerate(failing):
        lane.submit("task", lambda number=number, fails=fails: task(number, fails))  # type: ignore[misc]
    assert lane.wait(60)
    assert done == list(range(len(failing)))
    assert lane.close(60)
