"""The saves that the job knows of, as all ranks agree on them: what is in the making, kept, and to be deleted.

Every rank holds an equal `Book` and changes it only by agreed events (a boundary at which a save began, the outcome of
a control exchange), so that every rank comes to the same deletions and to the same answer to "is an arena free?".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from resilience.planning.control import SLOTS, ControlAgreement
from resilience.planning.inventory import SaveId
from resilience.planning.retention import Progress, SaveState, deletable

__all__ = ["Book", "Change", "Entry", "drain_slot", "unsettled"]

Drain = Literal["none", "pending", "done", "failed"]
_DRAIN = "drain"


@dataclass(frozen=True)
class Entry:
    """One save: `progress` of its non-persistent copies ("none" if it has none) and of its way to shared storage."""

    save: SaveId
    progress: Progress | Literal["none"]
    settled: bool
    drain: Drain = "none"

    @property
    def outstanding(self) -> bool:
        return self.drain == "pending" or (self.progress != "none" and not self.settled)


@dataclass(frozen=True)
class Change:
    """What a control exchange brought to light about one save."""

    save: SaveId
    what: Literal["complete", "protected", "unprotected", "failed", "persistent", "persistent_failed"]


@dataclass(frozen=True)
class Book:
    """`entries` in the order in which the saves began, those kept from earlier attempts first."""

    entries: tuple[Entry, ...] = ()

    def begin(self, save: SaveId, *, non_persistent: bool, drain: bool) -> Book:
        entry = Entry(save, "pending" if non_persistent else "none", not non_persistent, "pending" if drain else "none")
        return Book((*self.entries, entry))

    def slots(self) -> tuple[SaveId, ...]:
        """What the control exchange reports on: each save's replication, then its drain."""
        slots: list[SaveId] = []
        for entry in self.entries:
            if entry.progress != "none" and not entry.settled:
                slots.append(entry.save)
            if entry.drain == "pending":
                slots.append(drain_slot(entry.save))
        return tuple(slots)

    def has_room(self) -> bool:
        """Whether one more save (two slots) fits into the control exchange."""
        return len(self.slots()) + 2 <= SLOTS

    def agree(self, agreement: ControlAgreement, slots: Sequence[SaveId]) -> tuple[Book, tuple[Change, ...]]:
        """Take in the outcome of the exchange that reported on `slots`; the very same book if on none."""
        if not slots:
            return self, ()
        entries = {entry.save: entry for entry in self.entries}
        changes: list[Change] = []
        for slot, seen in zip(slots, agreement.saves, strict=False):
            if slot.attempt == _DRAIN:
                save = next(s for s in entries if drain_slot(s) == slot)
                if seen.settled:
                    failed = seen.progress == "failed"
                    entries[save] = replace(entries[save], drain="failed" if failed else "done")
                    changes.append(Change(save, "persistent_failed" if failed else "persistent"))
            else:
                entry = entries[slot]
                changes += _changes(entry, seen.progress, seen.settled)
                # a failed save stays outstanding until every rank is done with it: only then may it be deleted
                entries[slot] = replace(entry, progress=seen.progress, settled=seen.settled)
        return Book(tuple(entries.values())), tuple(changes)

    def deletions(self, keep_last: int, *, need_one: bool = False) -> tuple[SaveId, ...]:
        """Non-persistent saves to delete now; see `retention.deletable`."""
        states = [
            SaveState(entry.save, entry.progress if entry.settled or entry.progress == "pending" else "pending")
            for entry in self.entries
            if entry.progress != "none"
        ]
        return deletable(states, keep_last=keep_last, need_one=need_one)

    def without(self, saves: Sequence[SaveId]) -> Book:
        """After the deletion of `saves` was ordered; one that still drains stays known until that is over."""
        entries = [
            replace(entry, progress="none", settled=True) if entry.save in saves else entry for entry in self.entries
        ]
        return Book(tuple(entry for entry in entries if entry.progress != "none" or entry.drain == "pending"))

    def arenas_in_use(self, *, file_is_arena: bool) -> int:
        """How many of a rank's arenas hold bytes that are still needed."""
        return sum(
            entry.outstanding or (file_is_arena and entry.progress not in ("none", "failed")) for entry in self.entries
        )

    def draining(self) -> int:
        return sum(entry.drain == "pending" for entry in self.entries)

    def settled(self) -> bool:
        return not any(entry.outstanding for entry in self.entries)


def drain_slot(save: SaveId) -> SaveId:
    """The slot under which a save's way to shared storage is reported, beside its replication's."""
    return SaveId(save.iteration, save.generation, _DRAIN)


def _changes(entry: Entry, progress: Progress, settled: bool) -> list[Change]:
    changes: list[Change] = []
    if progress == "failed":
        return [Change(entry.save, "failed")] if settled else []
    if entry.progress == "pending" and progress in ("primary", "protected"):
        changes.append(Change(entry.save, "complete"))
    if entry.progress != "protected" and progress == "protected":
        changes.append(Change(entry.save, "protected"))
    elif settled and progress == "primary" and not entry.settled:
        changes.append(Change(entry.save, "unprotected"))
    return changes


def unsettled(book: Book, running: Sequence[str]) -> str:
    """Which saves wait for what, in words. `running`: what this rank's background lanes are doing."""
    waits: list[str] = []
    for entry in book.entries:
        if entry.progress != "none" and not entry.settled:
            missing = "its commit on every node" if entry.progress == "pending" else "its replicas"
            waits.append(f"that of iteration {entry.save.iteration} waits for {missing}")
        if entry.drain == "pending":
            waits.append(f"that of iteration {entry.save.iteration} waits for shared storage")
    here = ", ".join(repr(what) for what in running) or "nothing, so that another rank is behind"
    return f"{'; '.join(waits)}; under way on this rank: {here}"
