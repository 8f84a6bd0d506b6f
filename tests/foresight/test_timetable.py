"""The timetable's arithmetic says what walking through the steps one by one says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.errors import ConfigError
from resilience.foresight.timetable import Timetable
from resilience.planning.schedule import Due, due_at

EVERY = st.one_of(st.none(), st.integers(1, 12))
QUARTERS = st.integers(0, 12).map(lambda quarters: quarters / 4)  # sums of them are exact


@st.composite
def timetables(draw: st.DrawFn) -> Timetable:
    return Timetable(draw(st.integers(1, 60)), draw(st.integers(1, 8)) / 4, draw(EVERY), draw(QUARTERS), draw(EVERY), draw(QUARTERS))  # noqa: E501  # fmt: skip


def due(table: Timetable, step: int) -> Due:
    return due_at(
        step, save_interval=table.persist_every, non_persistent_interval=table.save_every,
        requested_non_persistent=False, requested_persistent=False, stop_requested=False, last=step == table.steps,
        save_set=table.persist_every is not None, non_persistent_set=table.save_every is not None,
    )  # fmt: skip


def walk(table: Timetable) -> list[tuple[float, float]]:
    """Of each step from 0 on: when it is done, and when the next one may begin."""
    found, now = [(0.0, 0.0)], 0.0
    for step in range(1, table.steps + 1):
        done = now + table.step_s
        save = due(table, step)
        now = done + max(table.stall_s * save.non_persistent, table.persist_stall_s * save.persistent)
        found.append((done, now))
    return found


@given(timetables(), st.integers(0, 2000).map(lambda eighths: eighths / 8))
def test_every_answer_is_that_of_a_walk_through_all_steps(table: Timetable, at_s: float) -> None:
    walked = walk(table)
    assert [table.ready_s(step) for step in range(table.steps + 1)] == [ready for _, ready in walked]
    copied = max(step for step, (_, ready) in enumerate(walked) if ready <= at_s)
    assert table.finished_by(at_s) == max(step for step, (done, _) in enumerate(walked) if done <= at_s)
    assert table.copied_by(at_s) == copied
    saves = [step for step in range(1, copied + 1) if due(table, step).non_persistent]
    persistent = [step for step in range(1, copied + 1) if due(table, step).persistent]
    assert table.saved_by(at_s) == max(saves, default=0)
    assert table.persisted_by(at_s) == max(persistent, default=0)
    assert table.saves(1, copied) == len({*saves, *persistent})


def test_intervals_that_meet_too_rarely_are_refused_before_memory_is_spent_on_them() -> None:
    with pytest.raises(ConfigError, match="too far to look"):
        Timetable(10**15, 1.0, 1_000_003, 0.0, 999_983, 0.0)


def test_a_million_million_steps_cost_no_more_than_a_few() -> None:
    table = Timetable(10**12, 1.0, 50, 0.5, 1000, 0.5)
    assert table.ready_s(10**12) == 10**12 * 1.01
    assert table.saved_by(1.01 * 10**9 + 0.1) == 10**9
