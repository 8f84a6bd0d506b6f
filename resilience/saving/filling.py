"""From a collected state to a filled arena, and to the replicas that this rank can compose of what it has itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from resilience.assembly import Start
from resilience.errors import SaveFailedError
from resilience.planning.inventory import SaveId
from resilience.planning.travel import Range
from resilience.replication.protection import SaveJob
from resilience.saving.wish import Snapshot, Wish
from resilience.snapshot.copying import DONE, Copying, Part
from resilience.snapshot.layout import ShardIdentity
from resilience.snapshot.overlap import Overlap
from resilience.snapshot.planner import SnapshotPlanner
from resilience.snapshot.twins import Twin, Twins, rest_for
from resilience.state.items import Collected
from resilience.state.training_state import TrainingState
from resilience.stores.keeper import ShardKeeper

__all__ = ["ArenaRoom", "Filling"]


@dataclass(frozen=True)
class ArenaRoom:
    """How many arenas this rank has, how long one may be waited for, and whether those of kept saves count."""

    capacity: int
    bound_s: float
    held_count: bool


class Filling:
    """Fills this rank's arenas, one save after the other. For the training thread."""

    def __init__(
        self,
        start: Start,
        state: TrainingState,
        planner: SnapshotPlanner,
        copying: Copying,
        overlap: Overlap | None,
        twins: Twins | None,
    ) -> None:
        """`overlap`: where copies may go on while training does. `twins`: where replicas are composed."""
        self._start = start
        self._state = state
        self._planner = planner
        self._copying = copying
        self._overlap = overlap
        self._twins = twins
        self._rest: tuple[Range, ...] = ()  # what of this rank's shard a holder that composes it needs

    def fill(
        self, save: SaveId, collected: Collected, wish: Wish, turn: int, room: ArenaRoom, *, waited_for: bool
    ) -> Snapshot:
        """Copy `collected` into an arena, or begin to. `turn`: of which share of what is equal everywhere is compared.

        `waited_for`: training waits for what is made of the snapshot, so that nothing is won by a copy that goes on.
        LayoutMismatchError, SaveFailedError, StoreError, and whatever `healthy` raises; then no arena is taken.
        """
        layout = self._planner.fit(collected)
        keeper = self._start.keeper
        if keeper is None:
            raise SaveFailedError("no directory for arenas is configured")
        arena = keeper.take_arena(layout.nbytes, room.capacity, room.bound_s, held_count=room.held_count)
        composed: dict[int, tuple[Twin, Part]] = {}
        try:
            healthy = self._state.healthy is None or bool(self._state.healthy())
            identity = self._identity(save, collected)
            own = self._planner.part(collected, arena)
            composed = self._compose(collected, keeper) if wish.on_nodes else {}
            sample, pairs = self._planner.sample(collected, turn)
            parts = [own, *(part for _, part in composed.values())]
            copy, seal = DONE, lambda: arena.seal(identity)
            if self._overlap is not None and self._overlap.works and not waited_for:
                copy = self._overlap.start(parts, collected.items, sample, pairs, seal)
            else:
                self._copying.start(parts, pairs, seal)
        except BaseException:
            for owner, (twin, _) in composed.items():
                keeper.discard(owner, twin.slot, reusable=True)
            keeper.unpin(arena)
            raise
        if wish.on_nodes and wish.drain:
            keeper.pin(arena)
        job = SaveJob(
            save, arena, sample, self._planner.split, healthy, "", layout.layout_id, self._rest, _twins_of(composed),
            copy,
        )  # fmt: skip
        return Snapshot(arena, collected, job, self._planner.across)

    def _identity(self, save: SaveId, collected: Collected) -> ShardIdentity:
        job = self._start.job
        return ShardIdentity(
            self._start.run_id, save.attempt, save.generation, save.iteration, job.rank, job.world_size,
            len(collected.values),
        )  # fmt: skip

    def _compose(self, collected: Collected, keeper: ShardKeeper) -> dict[int, tuple[Twin, Part]]:
        """Replicas of others' shards, as far as this rank has the same; nothing where they come over the network."""
        if self._twins is None or self._planner.layout is None:
            return {}
        self._rest = rest_for(self._planner.layout)
        return self._twins.compose(self._planner.layout, collected.items, self._planner.shared, keeper.warm_slot)


def _twins_of(composed: Mapping[int, tuple[Twin, Part]]) -> dict[int, Twin]:
    return {owner: twin for owner, (twin, _) in composed.items()}
