"""When a person should worry: a healthy job never hears of it, and an unprotected one always does."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from resilience.lookout import Lookout
from resilience.planning.book import Change
from resilience.planning.cadence import best_interval, expected_goodput
from resilience.planning.caution import Standing, cautions
from resilience.planning.inventory import SaveId

HEALTHY = Standing(100, 0, 10, replicated=True, complete=100, protected=90)
counts = st.integers(0, 10_000)


def kinds(standing: Standing) -> list[str]:
    return [caution.kind for caution in cautions(standing)]


@given(counts, st.integers(1, 100), st.integers(0, 20_000), st.none() | counts, st.booleans())
def test_a_job_is_unprotected_exactly_when_a_failure_loses_more_than_two_intervals(
    begun: int, interval: int, since: int, safe: int | None, replicated: bool
) -> None:
    iteration = begun + since
    standing = Standing(iteration, begun, interval, replicated, complete=safe, protected=safe)
    lost = iteration - max(begun, safe or 0)
    assert ("not_protected" in kinds(standing)) == (lost > 2 * interval)
    assert kinds(replace(standing, interval=None)) == []


def test_work_of_a_few_seconds_is_nobody_s_worry() -> None:
    late = replace(HEALTHY, iteration=130, complete=100, protected=100)
    assert kinds(late) == ["not_protected"], "nothing is known of the steps' time"
    assert kinds(replace(late, step_s=0.3)) == []
    assert kinds(replace(late, step_s=0.4)) == ["not_protected"]


def test_a_complete_save_without_replicas_protects_only_where_none_are_wanted() -> None:
    late = replace(HEALTHY, iteration=130, complete=130, protected=100)
    assert kinds(late) == ["not_protected"]
    assert "of iteration 100; a failure now loses 30 iterations" in cautions(late)[0].what
    assert kinds(replace(late, replicated=False)) == []


def test_a_missing_replica_is_told() -> None:
    assert kinds(replace(HEALTHY, lacking=True)) == ["replica_missing"]
    assert kinds(HEALTHY) == []


@given(st.integers(1, 5000), st.floats(0.01, 100), st.floats(0.001, 100), st.floats(60, 1e7))
def test_an_interval_is_too_long_where_the_best_one_is_shorter_and_worth_a_percent(
    interval: int, step_s: float, save_s: float, mtbf_s: float
) -> None:
    standing = replace(HEALTHY, interval=interval, step_s=step_s, save_s=save_s, mtbf_s=mtbf_s)
    best = best_interval(save_s=save_s, step_s=step_s, mtbf_s=mtbf_s)
    worth = [expected_goodput(every, save_s=save_s, step_s=step_s, mtbf_s=mtbf_s) for every in (best, interval)]
    assert ("interval_too_long" in kinds(standing)) == (best < interval and worth[0] - worth[1] > 0.01)
    assert "interval_too_long" not in kinds(replace(standing, mtbf_s=None))


def test_a_caution_is_said_when_it_begins_and_when_it_is_over_and_not_in_between() -> None:
    told: list[tuple[str, str, int]] = []
    lookout = Lookout(
        lambda name, **fields: told.append((name, fields.get("kind", ""), fields["iteration"])), begun=0,
        replicated=True, mtbf_hours=None,
    )  # fmt: skip

    def look(iteration: int) -> None:
        lookout.look(iteration, 5, step_s=60.0, save_s=0.0)

    lookout.note(Change(SaveId(5, 1, "a"), "complete"), "local")
    lookout.note(Change(SaveId(5, 1, "a"), "protected"), "local")
    for iteration in range(6, 15):
        look(iteration)
    lookout.note(Change(SaveId(10, 1, "a"), "complete"), "local")
    lookout.note(Change(SaveId(10, 1, "a"), "unprotected"), "local")
    for iteration in range(15, 19):
        look(iteration)
    lookout.note(Change(SaveId(15, 1, "a"), "protected"), "local")
    look(19)
    assert told == [
        ("replicated", "", 5),
        ("caution", "replica_missing", 15),
        ("caution", "not_protected", 16),
        ("replicated", "", 15),
        ("caution_over", "not_protected", 19),
        ("caution_over", "replica_missing", 19),
    ]
