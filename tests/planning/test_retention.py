"""The newest complete and the newest protected save survive every history of saves, failures and deletions."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from resilience.planning.inventory import SaveId
from resilience.planning.retention import Progress, SaveState, deletable
from tests.planning.world import save


def states(*progress: Progress) -> list[SaveState]:
    return [SaveState(save(10 * (place + 1)), each) for place, each in enumerate(progress)]


def gone(saves: list[SaveState], keep_last: int = 2, need_one: bool = False) -> list[int]:
    return [each.iteration for each in deletable(saves, keep_last=keep_last, need_one=need_one)]


def test_only_protected_saves_count_towards_keep_last() -> None:
    assert gone(states("protected", "protected", "protected")) == [10]
    assert gone(states("protected", "primary", "primary", "primary")) == []


def test_unprotected_saves_older_than_the_kept_ones_go_with_them() -> None:
    assert gone(states("primary", "protected", "primary", "protected", "pending")) == [10]


def test_failed_saves_always_go_and_pending_ones_never() -> None:
    assert gone(states("pending", "failed", "protected"), need_one=True) == [20]


def test_without_a_free_arena_the_oldest_save_goes_even_below_keep_last() -> None:
    assert gone(states("protected", "protected", "pending"), need_one=True) == [10]


def test_without_a_free_arena_the_newest_protected_and_the_newest_complete_still_stay() -> None:
    assert gone(states("protected", "primary", "pending"), need_one=True) == []
    assert gone(states("protected", "primary", "primary"), need_one=True) == [20]


def test_an_abandoned_save_goes_and_counts_for_nothing() -> None:
    left = SaveState(save(90), "protected")
    kept = [*states("protected", "protected"), left]
    assert deletable(kept, keep_last=2, abandoned={left.save}) == (left.save,)


PROGRESS = st.sampled_from(["pending", "primary", "protected", "failed"])


@given(
    st.lists(st.tuples(st.integers(1, 60), st.integers(1, 4), PROGRESS), unique_by=lambda each: each[:2]),
    st.integers(1, 4),
    st.booleans(),
    st.sets(st.integers(0, 30)),
)
def test_the_newest_complete_and_the_newest_protected_save_are_never_deleted(
    drawn: list[tuple[int, int, Progress]], keep_last: int, need_one: bool, left: set[int]
) -> None:
    saves = [SaveState(save(iteration, generation), progress) for iteration, generation, progress in drawn]
    abandoned = {each.save for place, each in enumerate(saves) if place in left}
    deleted = deletable(saves, keep_last=keep_last, need_one=need_one, abandoned=abandoned)
    counted = [each for each in saves if each.save not in abandoned]
    complete = [each.save for each in counted if each.progress in ("primary", "protected")]
    protected = [each.save for each in counted if each.progress == "protected"]
    assert not {max(complete, default=None), max(protected, default=None)} & set(deleted)
    assert not {each.save for each in saves if each.progress == "pending"} & set(deleted)
    assert {each.save for each in saves if each.progress == "failed"} <= set(deleted)
    assert len(set(protected) - set(deleted)) >= min(keep_last, len(protected)) - need_one


@given(
    st.lists(st.tuples(st.sampled_from(["primary", "protected", "failed"]), st.booleans()), max_size=40),
    st.integers(1, 3),
)
def test_a_run_with_as_many_arenas_as_planned_always_finds_one_for_the_next_save(
    outcomes: list[tuple[Progress, bool]], keep_last: int
) -> None:
    """Simulates saves one after the other in max(keep_last, 2) + 1 arenas; the two untouchable saves always survive."""
    arenas = max(keep_last, 2) + 1
    held: dict[SaveId, Progress] = {}
    for step, (outcome, prune_now) in enumerate(outcomes):
        for need_one in [False] * prune_now + [True] * (len(held) >= arenas):
            listed = [SaveState(which, progress) for which, progress in held.items()]
            for which in deletable(listed, keep_last=keep_last, need_one=need_one):
                del held[which]
        assert len(held) < arenas, "no arena is free for the next save"
        complete = [which for which, progress in held.items() if progress in ("primary", "protected")]
        before = [which for which, progress in held.items() if progress == "protected"]
        held[save(step + 1)] = outcome
        assert not complete or max(complete) in held
        assert not before or max(before) in held
