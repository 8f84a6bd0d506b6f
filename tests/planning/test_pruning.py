"""What `prune` may delete, whatever lies in sight: never the newest complete save, nor the one with the most copies."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from resilience.planning.catalog import CatalogEntry
from resilience.planning.inventory import SaveId, Tier
from resilience.planning.pruning import verdicts
from tests.planning.world import save

WORLD = 2


def entry(
    which: SaveId, copies: int = 2, *, tier: Tier = "local", present: int = WORLD, abandoned: bool = False
) -> CatalogEntry:
    complete = present == WORLD
    return CatalogEntry(
        which, tier, "run", WORLD, present, copies if complete else 0, 100, 200, complete, ("a",),
        abandoned="an attempt left it behind" if abandoned else "",
    )  # fmt: skip


@st.composite
def sights(draw: st.DrawFn) -> list[CatalogEntry]:
    """Any saves of two generations on nodes, and some on shared storage."""
    places = draw(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 2)), unique=True, max_size=9))
    return [
        entry(
            save(10 * iteration, generation),
            draw(st.integers(1, 3)),
            tier=draw(st.sampled_from(["in_memory", "local", "local", "persistent"])),  # type: ignore[arg-type]
            present=draw(st.integers(0, WORLD)),
            abandoned=draw(st.booleans()),
        )
        for iteration, generation in places
    ]


KNOWN = st.lists(st.builds(save, st.integers(0, 12).map(lambda number: 10 * number), st.integers(1, 2)), max_size=3)


@given(sights(), KNOWN, st.none() | st.integers(1, 4))
def test_the_two_saves_that_count_most_are_never_deleted(
    entries: list[CatalogEntry], known: list[SaveId], keep_last: int | None
) -> None:
    found, _ = verdicts(entries, known_complete=known, keep_last=keep_last)
    deleted = {verdict.entry.save for verdict in found if verdict.delete}
    counted = [each for each in entries if each.on_nodes and each.complete and not each.abandoned]
    if counted:
        most = max(each.copies for each in counted)
        assert max(each.save for each in counted) not in deleted
        assert max(each.save for each in counted if each.copies == most) not in deleted
    assert [verdict.entry for verdict in found] == [each for each in entries if each.on_nodes], "each is judged once"
    assert all(verdict.reason for verdict in found)


@given(sights(), KNOWN, st.none() | st.integers(1, 4))
def test_where_something_is_out_of_sight_only_abandoned_saves_go(
    entries: list[CatalogEntry], known: list[SaveId], keep_last: int | None
) -> None:
    found, restraint = verdicts(entries, known_complete=known, keep_last=keep_last)
    abandoned = {each.save for each in entries if each.abandoned}
    in_sight = [each.save for each in entries if each.complete and not each.abandoned]
    out_of_sight = [which for which in known if which not in abandoned and which > max(in_sight, default=save(0))]
    if not any(each.on_nodes and each.complete and not each.abandoned for each in entries) or out_of_sight:
        assert restraint
    if restraint:
        assert all(verdict.entry.abandoned for verdict in found if verdict.delete)
    assert all(verdict.delete for verdict in found if verdict.entry.abandoned)


@given(sights(), KNOWN)
def test_without_a_number_to_keep_no_complete_save_goes(entries: list[CatalogEntry], known: list[SaveId]) -> None:
    found, _ = verdicts(entries, known_complete=known, keep_last=None)
    assert not [each for each in found if each.delete and each.entry.complete and not each.entry.abandoned]


def test_surplus_goes_from_the_oldest_and_a_half_save_behind_a_whole_one_goes_too() -> None:
    whole = [entry(save(number)) for number in (10, 20, 30)]
    entries = [*whole, entry(save(25), present=1), entry(save(40), present=1)]
    found, restraint = verdicts(entries, known_complete=[], keep_last=2)
    assert restraint == ""
    assert {each.entry.save.iteration for each in found if each.delete} == {10, 25}
