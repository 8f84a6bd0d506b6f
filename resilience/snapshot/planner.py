"""The plan of this rank's shard, kept while the structure of the state stays the same.

Making a plan is collective (it finds out what is equal on which ranks); using it is not. A save that
finds another structure fails, and the next one makes a new plan on all ranks, because "a save failed" is agreed and "my
structure changed" is not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resilience.errors import DivergedRanksError, LayoutMismatchError, ResilienceError
from resilience.replication.communicator import Agreements
from resilience.snapshot.arena import Arena
from resilience.snapshot.copying import Pair, Part
from resilience.snapshot.equality import Across, RotatingShare, Sample, agree_across, agree_shared
from resilience.snapshot.layout import Layout, plan_layout
from resilience.snapshot.pieces import pieces_of
from resilience.snapshot.sources import Sources
from resilience.state.items import Collected, Item

__all__ = ["PlanGroups", "SnapshotPlanner"]


@dataclass(frozen=True)
class PlanGroups:
    """With whom a plan is made: this rank's data-parallel group and, if there are `several` that have to know of each
    other, the first ranks of all of them (`leaders`, on those ranks)."""

    own: Agreements
    several: bool = False
    leaders: Agreements | None = None

    def anywhere(self, here: bool) -> bool:
        """Whether it holds on any rank. Collective."""
        found = self.own.maximum([int(here)])
        if self.several:
            found = self.own.maximum(self.leaders.maximum(found) if self.leaders is not None else found)
        return bool(found[0])


class SnapshotPlanner:
    """Plans this rank's shards, and says what goes into them."""

    def __init__(self, group_ranks: Sequence[int], part: int, *, split: bool) -> None:
        """`part` is this rank's place in `group_ranks`, the data-parallel group."""
        self._ranks = tuple(group_ranks)
        self._part = part
        self.split = split and len(self._ranks) > 1
        self.layout: Layout | None = None
        self.shared: frozenset[str] = frozenset()
        self.across = Across()  # what other groups have too
        self._unequal: frozenset[str] = frozenset()  # told already
        self._items: tuple[Item, ...] = ()  # that were found to fit the plan last
        self._share = RotatingShare((), frozenset())
        self._sources = Sources()

    def plan(self, collected: Collected | ResilienceError, groups: PlanGroups) -> frozenset[str]:
        """Make a new plan. Collective over the groups; a rank whose state could not be collected passes the error.

        Returns the keys that differ between ranks and were not known to. Raises on all ranks if one passed an error.
        """
        failed = groups.anywhere(isinstance(collected, ResilienceError))
        if isinstance(collected, ResilienceError):
            raise collected
        if failed:
            raise DivergedRanksError("another rank could not collect its state.", advice="See that rank's log.")
        self.shared, differ = agree_shared(collected.items, groups.own)
        self.across = Across()
        if groups.several:
            self.across = agree_across(collected.items, self.shared, groups.own, groups.leaders)
            self.shared, differ = self.shared - self.across.differ, differ | self.across.differ
        news, self._unequal = differ - self._unequal, self._unequal | differ
        self._items = collected.items
        self._share = RotatingShare(collected.items, self.shared)
        self._place(collected)
        return news

    def fit(self, collected: Collected) -> Layout:
        """The layout for `collected`; LayoutMismatchError if its structure is not the planned one. Not collective."""
        if self.layout is None or not _alike(collected.items, self._items):
            raise LayoutMismatchError(
                "the structure of the training state changed since the last save (names, shapes or dtypes).",
                advice="This save is given up; the next one plans anew.",
            )
        self._items = collected.items
        if len(collected.values) > self.layout.values_capacity:
            self._place(collected)  # only this rank's file grows: nobody else need know
        return self.layout

    def part(self, collected: Collected, arena: Arena) -> Part:
        """All items as what is to be copied into `arena`, which has the values already."""
        if self.layout is None:
            raise ValueError("no plan was made")
        arena.use(self.layout)
        arena.write_values(collected.values)
        return Part(arena, self.layout, self._sources.of(collected.items, self.layout))

    def sample(self, collected: Collected, turn: int) -> tuple[Sample, list[Pair]]:
        """The rotating share, and what is to be copied into it."""
        return self._share.choose(collected.items, turn)

    def _place(self, collected: Collected) -> None:
        pieces = pieces_of(
            collected.items, self.shared, part=self._part, parts=len(self._ranks), split=self.split
        )  # fmt: skip
        aliases = {item.key: item.alias_of for item in collected.items if item.alias_of is not None}
        self.layout = plan_layout(pieces, aliases, len(collected.values), self._ranks)


def _alike(items: Sequence[Item], known: Sequence[Item]) -> bool:
    """Whether they have one structure. Most are the very items that are known."""
    if len(items) != len(known):
        return False
    others = [(new, old) for new, old in zip(items, known, strict=True) if new is not old]
    return all(_structure(new) == _structure(old) for new, old in others)


def _structure(item: Item) -> tuple[object, ...]:
    return item.key, item.tensor.dtype, item.tensor.shape, item.global_shape, item.offsets, item.alias_of
