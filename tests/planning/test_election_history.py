"""Forks, rolled-back runs and restarts in vain: what the attempt logs forbid to resume from."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.errors import CheckpointNotFoundError, NoProgressError, NoUsableSaveError
from resilience.planning.election import Decision, ElectionPolicy, Strike, abandoned_saves
from resilience.planning.history import fruitless_bases
from resilience.planning.inventory import AttemptLog, Inventory, SaveId, SharedSave
from tests.planning.world import chosen, decide, folder, log, pair, save, sources

FORK = ElectionPolicy(ckpt_step=20, fork_id="job-7")


# --- Abandoned saves -------------------------------------------------------------------------------------------------


def test_a_rolled_back_run_never_returns_to_what_it_left_behind() -> None:
    """Attempt 2 started from 20 because 40 was out of reach then, and has completed 30 since; now 40 is back."""
    logs = [log(1, completed=save(40)), log(2, base=save(20), completed=save(30, 2))]
    decision = decide(sources(*pair(save(40)), *pair(save(30, 2)), attempts=logs))
    assert chosen(decision) == (30, 2, "in_memory")
    assert decision.passed_over[0].reason == f"abandoned: attempt {save(0, 2).folder} went on from iteration 20"


def test_an_attempt_from_an_older_base_that_completed_nothing_abandons_nothing() -> None:
    logs = [log(1, completed=save(40)), log(2, base=save(20))]
    assert chosen(decide(sources(*pair(save(40)), attempts=logs)))[0] == 40


def test_a_certificate_proves_that_an_attempt_completed_a_save_even_if_its_log_is_behind() -> None:
    logs = [log(1, completed=save(40)), log(2, base=save(20))]
    inventories = sources(*pair(save(40)), *pair(save(20)), attempts=logs, certificates=[save(30, 2)])
    assert chosen(decide(inventories))[0] == 20


def test_a_fork_abandons_what_lies_beyond_it_at_once() -> None:
    logs = [log(1, completed=save(40)), log(2, base=save(20), fork=(20, "job-7"))]
    inventories = sources(*pair(save(40)), shared=[folder(save(20))], attempts=logs)
    assert chosen(decide(inventories)) == (20, 1, "persistent")


def test_a_start_over_abandons_everything_once_it_has_completed_a_save() -> None:
    logs = [log(1, completed=save(40)), log(2, base=None, completed=save(5, 2))]
    assert chosen(decide(sources(*pair(save(40)), *pair(save(5, 2)), attempts=logs)))[0] == 5


def test_the_log_that_was_rewritten_after_a_second_election_is_the_one_that_counts() -> None:
    stale = Inventory("n8", attempts=(log(2, base=save(40)),))
    logs = [log(1, completed=save(40)), log(2, base=save(20), completed=save(30, 2))]
    inventories = [stale, *sources(*pair(save(40)), *pair(save(30, 2)), attempts=logs)]
    assert chosen(decide(inventories))[0] == 30


LOGS = st.lists(
    st.builds(
        lambda generation, base, completed, forked: log(
            generation,
            save(*base) if base else None,
            save(completed, generation) if completed else None,
            fork=(base[0], "f") if forked and base else None,
        ),
        st.integers(1, 8),
        st.none() | st.tuples(st.integers(1, 5), st.integers(1, 8)),
        st.none() | st.integers(1, 6),
        st.booleans(),
    ),
    max_size=7,
    unique_by=lambda each: each.generation,
)


@given(LOGS, st.sets(st.builds(save, st.integers(1, 6), st.integers(1, 8)), max_size=12))
def test_abandoned_is_exactly_what_the_rule_says(logs: list[AttemptLog], saves: set[SaveId]) -> None:
    """Brute force over all pairs; a save that a user forked to counts as used by that fork."""

    def is_abandoned(which: SaveId) -> bool:
        used = max([which.generation, *(each.generation for each in logs if each.fork and each.base == which)])
        return any(
            each.generation > used
            and (each.base is None or each.base < which)
            and (each.fork is not None or each.completed is not None)
            for each in logs
        )

    assert abandoned_saves(saves, logs) == {which for which in saves if is_abandoned(which)}


# --- Forks -----------------------------------------------------------------------------------------------------------


def test_ckpt_step_loads_the_persistent_one_although_newer_saves_exist() -> None:
    decision = decide(sources(*pair(save(40)), *pair(save(20)), shared=[folder(save(20))]), policy=FORK)
    assert chosen(decision) == (20, 1, "persistent")
    assert decision.fork == (20, "job-7")
    assert [(each.iteration, each.reason) for each in decision.passed_over] == [
        (40, "ckpt_step=20 asks for an older one")
    ]


def test_ckpt_step_overrides_the_tracker() -> None:
    decision = decide(sources(shared=[folder(save(20), tracker=10), folder(save(10), tracker=10)]), policy=FORK)
    assert chosen(decision)[0] == 20


def test_an_automatic_restart_of_a_fork_keeps_the_work_done_since() -> None:
    logs = [log(1, completed=save(40)), log(2, base=save(20), fork=(20, "job-7"), completed=save(30, 2))]
    inventories = sources(*pair(save(40)), *pair(save(30, 2)), shared=[folder(save(20))], attempts=logs)
    decision = decide(inventories, policy=FORK)
    assert chosen(decision)[:2] == (30, 2)
    assert decision.fork is None
    again = decide(inventories, policy=dataclasses.replace(FORK, fork_id="job-8"))
    assert chosen(again)[0] == 20


def test_a_fork_to_a_save_that_was_once_left_behind_holds_over_its_restarts() -> None:
    logs = [
        log(1, completed=save(20)),
        log(2, base=save(10), completed=save(15, 2)),
        log(3, base=save(20), fork=(20, "job-7")),
    ]
    inventories = sources(*pair(save(15, 2)), shared=[folder(save(20))], attempts=logs)
    assert chosen(decide(inventories, policy=FORK))[0] == 20
    assert chosen(decide(sources(*pair(save(15, 2)), shared=[folder(save(20))], attempts=logs[:2])))[0] == 15


def theirs(iteration: int) -> SharedSave:
    return folder(save(iteration, 7, "f" * 32), run="theirs", source="load")


def test_a_fork_to_another_run_s_checkpoint_holds_over_its_restarts() -> None:
    base = theirs(20)
    logs = [log(1, completed=save(12)), log(2, base=base.save, fork=(20, "job-7"))]
    inventories = sources(*pair(save(12)), shared=[base, theirs(9000)], attempts=logs)
    assert chosen(decide(inventories, policy=FORK))[0] == 20
    later = [*logs[:1], dataclasses.replace(logs[1], completed=save(25, 2))]
    decision = decide(sources(*pair(save(25, 2)), shared=[base, theirs(9000)], attempts=later), policy=FORK)
    assert chosen(decision)[0] == 25


def test_a_ckpt_step_that_is_not_there_says_what_is() -> None:
    decision = decide(sources(*pair(save(40)), shared=[folder(save(10)), folder(save(30))]), policy=FORK)
    with pytest.raises(CheckpointNotFoundError, match="ckpt_step=20 is not in `save`; there is 10, 30"):
        decision.raise_if_error()


def test_ckpt_step_looks_under_load_where_that_is_another_place() -> None:
    inventories = sources(shared=[folder(save(20)), theirs(10)])
    assert decide(inventories, policy=FORK).error is not None


@pytest.mark.parametrize("damage", ["torn", "struck"])
def test_a_ckpt_step_that_cannot_be_used_is_an_error_and_not_another_save(damage: str) -> None:
    named = folder(save(20), problem="torn" if damage == "torn" else "", world=2)
    strikes = [Strike("save", "persistent", save(20))] if damage == "struck" else []
    decision = decide(sources(*pair(save(40)), shared=[named]), policy=FORK, strikes=strikes)
    with pytest.raises(NoUsableSaveError, match="ckpt_step=20"):
        decision.raise_if_error()


# --- Restarts without progress ---------------------------------------------------------------------------------------


def in_vain(bases: list[SaveId | None], *, first: AttemptLog | None = None) -> list[AttemptLog]:
    first = first or log(1, completed=save(40))
    return [first, *(log(2 + place, base=base) for place, base in enumerate(bases))]


def held(logs: list[AttemptLog]) -> Decision:
    return decide(sources(*pair(save(40)), *pair(save(30)), *pair(save(20)), attempts=logs))


def test_restarts_without_progress_fall_back_to_the_next_older_save_and_then_stop() -> None:
    assert chosen(held(in_vain([save(40)] * 2)))[0] == 40
    fallen_back = held(in_vain([save(40)] * 3))
    assert chosen(fallen_back)[0] == 30
    assert fallen_back.passed_over[0].reason == "3 restarts from it completed no newer save"
    assert chosen(held(in_vain([save(40)] * 3 + [save(30)] * 2)))[0] == 30
    with pytest.raises(NoProgressError, match="3 from iteration 30, 3 from iteration 40"):
        held(in_vain([save(40)] * 3 + [save(30)] * 3)).raise_if_error()


def test_a_newer_save_begins_a_new_count() -> None:
    logs = [*in_vain([save(40)] * 2), log(9, base=save(40), completed=save(50, 9))]
    inventories = sources(*pair(save(50, 9)), *pair(save(40)), attempts=[*logs, log(10, base=save(50, 9))])
    assert chosen(decide(inventories))[0] == 50


def test_an_older_save_that_only_led_back_to_the_same_point_does_not_begin_a_new_count() -> None:
    """From 40 nothing goes on; from 30 the run reaches 40 again and fails there again: it must stop some day."""
    again = save(40, 5)
    logs = [*in_vain([save(40)] * 3), log(5, base=save(30), completed=again)]
    logs += [log(6 + place, base=again) for place in range(3)]
    decision = decide(sources(*pair(again), *pair(save(40)), *pair(save(30)), attempts=logs))
    with pytest.raises(NoProgressError):
        decision.raise_if_error()


def test_a_fork_begins_a_new_count() -> None:
    logs = [*in_vain([save(40)] * 3), log(9, base=save(30), fork=(30, "x"))]
    inventories = sources(*pair(save(30)), *pair(save(20)), attempts=logs)
    assert chosen(decide(inventories))[0] == 30
    got_further = [*logs, log(10, base=save(30), completed=save(35, 10))]
    got_further += [log(11 + place, base=save(35, 10)) for place in range(3)]
    inventories = sources(*pair(save(35, 10)), *pair(save(30)), attempts=got_further)
    assert chosen(decide(inventories))[0] == 30


def test_attempts_stopped_on_request_are_not_failed_restarts() -> None:
    logs = [log(1, completed=save(40))] + [log(2 + n, base=save(40), end="stopped") for n in range(5)]
    assert chosen(held(logs))[0] == 40


def test_a_run_that_never_completes_anything_stops_too() -> None:
    three_restarts = [log(1), *(log(2 + n) for n in range(3))]
    assert decide(sources(empty=["n0"], attempts=three_restarts[:3])).fresh
    with pytest.raises(NoProgressError, match="3 from the beginning"):
        decide(sources(empty=["n0"], attempts=three_restarts)).raise_if_error()


@given(st.integers(1, 4), st.lists(st.sampled_from([10, 20, 30, None]), max_size=12))
def test_a_base_is_fruitless_after_as_many_failed_restarts_as_allowed(limit: int, bases: list[int | None]) -> None:
    tried = [None if base is None else save(base) for base in bases]
    counts = fruitless_bases(in_vain(tried), limit)
    assert counts == {base: tried.count(base) for base in set(tried) if tried.count(base) >= limit}
