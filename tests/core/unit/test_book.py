"""The book of saves: whatever happens in whatever order, all ranks agree, and the last good save stays."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.planning.book import Book, Change, Entry, drain_slot
from resilience.planning.control import SLOTS, ControlReport, SlotReport, decode, encode, merge
from resilience.planning.inventory import SaveId
from resilience.planning.memory import arenas_per_rank

ATTEMPT = "a" * 32


def save_at(iteration: int) -> SaveId:
    return SaveId(iteration, 1, ATTEMPT)


def heard(book: Book, *reports: list[SlotReport]) -> tuple[Book, tuple[Change, ...]]:
    """What comes of an exchange in which each rank gives these reports."""
    slots = book.slots()
    vectors = [encode(ControlReport(1, saves=tuple(each)), slots) for each in reports]
    return book.agree(decode(merge(vectors)), slots)


def done(save: SaveId, progress: str = "protected") -> SlotReport:
    return SlotReport(save, progress, failed=progress == "failed", settled=True)  # type: ignore[arg-type]


def test_a_save_is_complete_when_the_slowest_rank_has_committed_and_protected_later() -> None:
    book = Book().begin(save_at(5), non_persistent=True, drain=False)
    book, changes = heard(book, [SlotReport(save_at(5), "primary")], [])
    assert changes == ()
    book, changes = heard(book, [done(save_at(5))], [SlotReport(save_at(5), "primary")])
    assert changes == (Change(save_at(5), "complete"),)
    assert not book.settled()
    book, changes = heard(book, [done(save_at(5))], [done(save_at(5))])
    assert changes == (Change(save_at(5), "protected"),)
    assert book.settled()
    assert book.slots() == ()


def test_a_save_that_failed_on_one_rank_failed_and_is_deleted_when_all_are_done_with_it() -> None:
    book = Book().begin(save_at(5), non_persistent=True, drain=False)
    book, changes = heard(book, [done(save_at(5), "failed")], [])
    assert changes == ()
    assert book.deletions(2) == ()
    book, changes = heard(book, [done(save_at(5), "failed")], [done(save_at(5))])
    assert changes == (Change(save_at(5), "failed"),)
    assert book.deletions(2) == (save_at(5),)


def test_without_its_replicas_a_save_is_settled_as_unprotected() -> None:
    book = Book().begin(save_at(5), non_persistent=True, drain=False)
    _, changes = heard(book, [done(save_at(5), "primary")], [done(save_at(5))])
    assert changes == (Change(save_at(5), "complete"), Change(save_at(5), "unprotected"))


def test_both_ways_of_one_snapshot_are_told_apart() -> None:
    book = Book().begin(save_at(5), non_persistent=True, drain=True)
    assert book.slots() == (save_at(5), drain_slot(save_at(5)))
    assert book.draining() == 1
    book, changes = heard(book, [done(save_at(5)), done(drain_slot(save_at(5)), "failed")])
    assert {change.what for change in changes} == {"complete", "protected", "persistent_failed"}
    assert book.draining() == 0


def test_a_save_that_still_drains_is_known_after_its_copies_were_deleted() -> None:
    book = Book().begin(save_at(5), non_persistent=True, drain=True)
    book, _ = heard(book, [done(save_at(5))])
    book = book.without([save_at(5)])
    assert book.slots() == (drain_slot(save_at(5)),)
    assert book.arenas_in_use(file_is_arena=True) == 1, "the drain reads it"
    book, changes = heard(book, [done(drain_slot(save_at(5)))])
    assert changes == (Change(save_at(5), "persistent"),)
    assert book.without([]) == Book()


def test_where_the_file_is_the_arena_kept_saves_take_arenas_and_on_a_disk_only_those_in_the_making() -> None:
    book = Book((Entry(save_at(5), "protected", True), Entry(save_at(10), "protected", True)))
    book = book.begin(save_at(15), non_persistent=True, drain=False)
    assert book.arenas_in_use(file_is_arena=True) == 3
    assert book.arenas_in_use(file_is_arena=False) == 1


@dataclass
class Ranks:
    """What two ranks have to say, and a model of what must never be lost."""

    book: Book = field(default_factory=Book)
    reports: list[dict[SaveId, SlotReport]] = field(default_factory=lambda: [{}, {}])
    complete: set[SaveId] = field(default_factory=set)
    protected: set[SaveId] = field(default_factory=set)
    deleted: set[SaveId] = field(default_factory=set)
    iteration: int = 0

    def boundary(self, keep_last: int, capacity: int, want: bool, drain: bool) -> None:
        slots = self.book.slots()
        assert len(slots) <= SLOTS
        says = [ControlReport(1, saves=tuple(mine.values())) for mine in self.reports]
        agreement = decode(merge([encode(each, slots) for each in says]))
        self.book, changes = self.book.agree(agreement, slots)
        for change in changes:
            if change.what == "complete":
                self.complete.add(change.save)
            if change.what == "protected":
                self.protected.add(change.save)
        self._delete(self.book.deletions(keep_last))
        self.iteration += 1
        if not want or not self.book.has_room():
            return
        while self.book.arenas_in_use(file_is_arena=True) >= capacity:
            doomed = self.book.deletions(keep_last, need_one=True)
            if not doomed:
                return
            self._delete(doomed)
        self.book = self.book.begin(save_at(self.iteration), non_persistent=True, drain=drain)
        assert self.book.arenas_in_use(file_is_arena=True) <= capacity

    def _delete(self, saves: tuple[SaveId, ...]) -> None:
        for save in saves:
            if save in self.complete:
                assert save != max(self.complete), "the newest complete save is never deleted"
            if save in self.protected:
                assert save != max(self.protected), "the newest protected save is never deleted"
            entry = next(each for each in self.book.entries if each.save == save)
            assert entry.settled, "a save in the making is left alone"
            self.deleted.add(save)
        self.book = self.book.without(saves)


@settings(max_examples=200)
@given(data=st.data(), keep_last=st.integers(1, 4))
def test_the_last_good_save_survives_any_course_of_events(data: st.DataObject, keep_last: int) -> None:
    ranks = Ranks()
    capacity = arenas_per_rank(keep_last, 10, True)
    for _ in range(data.draw(st.integers(1, 30))):
        for mine in ranks.reports:
            for slot in ranks.book.slots():
                before = mine.get(slot, SlotReport(slot))
                if before.settled:
                    continue
                steps = ["stay", "primary", "protected", "failed", "unreplicated"]
                match data.draw(st.sampled_from(steps)):
                    case "primary":
                        mine[slot] = SlotReport(slot, "primary")
                    case "protected":
                        mine[slot] = done(slot)
                    case "failed" if before.progress == "pending":
                        mine[slot] = done(slot, "failed")
                    case "unreplicated":
                        mine[slot] = done(slot, "primary")
        ranks.boundary(keep_last, capacity, data.draw(st.booleans()), data.draw(st.booleans()))
    kept = [entry for entry in ranks.book.entries if entry.progress == "protected" and entry.settled]
    assert len(kept) <= max(keep_last, 1) + 1
