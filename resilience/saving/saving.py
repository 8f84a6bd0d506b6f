"""One rank's machinery for saves: the plan of its shard, arenas, the lanes that do the background work.

The controller says what happens when; this file carries it out on this rank and keeps what is local to it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace

from resilience.assembly import Start, agree_all
from resilience.config import CheckpointConfig, ResiliencyConfig
from resilience.errors import ConfigError, PeerLostError, ResilienceError, StoreError
from resilience.formats.registry import checkpoint_format
from resilience.formats.saver import SharedSaver
from resilience.planning.book import Book, Change, Entry, drain_slot
from resilience.planning.inventory import AttemptLog, Kept, SaveId, Tier
from resilience.planning.memory import arenas_per_rank
from resilience.planning.patience import STILL_BOUNDS
from resilience.planning.schedule import Due, shortest_interval
from resilience.replication.communicator import Agreements
from resilience.replication.protection import Board, SaveJob
from resilience.reports import SaveReport
from resilience.restore import Plan
from resilience.runtime.clock import Clock
from resilience.runtime.worker import Lane
from resilience.saving.afterwards import Afterwards
from resilience.saving.budget import Budget
from resilience.saving.charge import in_charge_of
from resilience.saving.drain import Drain
from resilience.saving.filling import ArenaRoom, Filling
from resilience.saving.lanes import Lanes
from resilience.saving.outcomes import error_of, report_of, state_of
from resilience.saving.progress import Stillness
from resilience.saving.replicas import Replicas
from resilience.saving.reservation import Buffers, Reservation
from resilience.saving.wish import Snapshot, Wish
from resilience.snapshot.copying import Copying
from resilience.snapshot.overlap import Overlap, WatchSteps
from resilience.snapshot.planner import PlanGroups, SnapshotPlanner
from resilience.snapshot.twins import Twins
from resilience.state.items import Collected
from resilience.state.training_state import TrainingState
from resilience.stores.filesystem import FileSystem
from resilience.stores.keeper import ShardKeeper

__all__ = ["Saving", "Wish"]

_LOOK_S = 1.0
_WORTH_A_WORD_S = 1e-4


class Saving:
    """The saves of one start on one rank. Methods are local unless they say otherwise."""

    no_wish = Wish()

    def __init__(
        self,
        start: Start,
        state: TrainingState,
        checkpoint: CheckpointConfig,
        resiliency: ResiliencyConfig,
        log: AttemptLog,
        clock: Clock,
        fs: FileSystem,
        tell: Callable[..., None],
        watch_steps: WatchSteps,
    ) -> None:
        """Collective: opens the groups of the lanes."""
        self._start = start
        self._state = state
        self._checkpoint = checkpoint
        self._resiliency = resiliency
        self._clock = clock
        self._fs = fs
        self.tell = tell
        self.board = Board(start.threads)
        members = start.job.data_parallel()
        name = f"{members[0]}-{len(members)}"
        # a snapshot serves both kinds of save: where one rank writes all that is replicated, it must have all of it
        split = checkpoint.non_persistent_local_ckpt_algo == "fully_parallel" and checkpoint.fully_parallel_save
        self._planner = SnapshotPlanner(members, members.index(start.job.rank), split=split)
        self._plan_groups = groups = self._join_plan_groups(name, members)
        self._replan = True
        self._budgeted = False
        self._turn = 0
        self._begun: SaveReport | None = None  # of the newest snapshot
        overlapped = resiliency.snapshot_mode == "overlapped"
        self.lanes = Lanes(tell, start.threads, overlapped=overlapped)
        self._copying = Copying(self.lanes.copy, start.threads, tell)
        self._overlap = Overlap(state, self._copying, tell, clock.now, watch_steps) if overlapped else None
        self.afterwards = Afterwards(start, log, self.lanes, fs, tell)
        equality = start.communicator.agreements(f"equality/{name}", members)
        drain = start.communicator.agreements("drain")
        self._groups = [each for each in (groups.own, groups.leaders, equality, drain) if each is not None]
        self._twins: Twins | None = None
        self.replicas: Replicas | None = None
        self._reservation: Reservation | None = None
        if start.keeper is not None:
            self._keep_on_nodes(start.keeper, members, equality)
        self._filling = Filling(start, state, self._planner, self._copying, self._overlap, self._twins)
        self._budget = Budget(
            start, checkpoint, resiliency, fs, tell, split=self._planner.split, file_is_arena=self._file_is_arena,
            again=log.generation > 1,
        )  # fmt: skip
        self._kept_here: Mapping[Kept, int] = {}  # what this rank keeps of a save for others: bytes of each file
        self.drain = self._make_drain(drain, None if self.keeps_on_nodes else equality)

    # -- at the start -------------------------------------------------------------------------------------------------

    def _join_plan_groups(self, name: str, members: tuple[int, ...]) -> PlanGroups:
        """Collective. Groups need to know of each other only where their parts come together: on shared storage."""
        job, communicator, config = self._start.job, self._start.communicator, self._checkpoint
        own = communicator.agreements(f"layout/{name}", members)
        leaders = job.group_leaders()
        several = len(leaders) > 1 and (config.save is not None or config.non_persistent_ckpt_type == "global")
        if not several or job.rank not in leaders:
            return PlanGroups(own, several)
        return PlanGroups(own, several, communicator.agreements("layout-leaders", leaders))

    def _keep_on_nodes(self, keeper: ShardKeeper, members: Sequence[int], equality: Agreements) -> None:
        """Have what copies on nodes need: buffers ahead of time, and the way to the clique."""
        start, lanes = self._start, self.lanes
        if self._resiliency.replicas_from == "live":
            self._twins = Twins(members, start.threads)
        self.replicas = Replicas(
            start, keeper, equality, self.board, lanes.protect, self._clock, self.tell, self._twins
        )  # fmt: skip
        self._reservation = Reservation(keeper, lanes.reserve, self.tell)
        if any(device.type == "cuda" for device in self._state.devices):
            keeper.prepare = self._copying.prepare
        lanes.give_up = self._reservation.stop

    def _make_drain(self, group: Agreements, equality: Agreements | None) -> Drain:
        checkpoint = self._checkpoint
        form = checkpoint_format(checkpoint.ckpt_format)
        form = form.keeping_plans() if checkpoint.ckpt_assume_constant_structure else form
        return Drain(
            self._start, self._state, checkpoint, SharedSaver(form, group, self._fs), self.board, self.lanes.drain,
            self._clock, self.tell, save_frozen=self._resiliency.save_frozen, equality=equality,
        )  # fmt: skip

    def adopt(self, plan: Plan) -> Book:
        """Take charge of what the nodes keep, note the attempt, and start to replicate again. Collective."""
        kept = self.afterwards.kept = plan.standing.kept
        self.afterwards.base = None if plan.assembly is None else plan.decision.base
        keeper = self._start.keeper
        if keeper is not None:
            keeper.keep_only(kept)
            for save in kept:
                keeper.adopt(save, in_charge_of(self._start, keeper, save))
        if self._reservation is not None:
            self._reservation.enlarge()
        agree_all(self._start.setup, self.afterwards.begin_log)
        if not self._start.setup.maximum([int(self.afterwards.noted)])[0]:
            raise StoreError("no node has room for a note of this start.", advice="Free space on the nodes.")
        if self.replicas is not None:
            self._agree_where_arenas_lie()
            self.replicas.begin(plan, self._resiliency.replication_bytes_per_s)
        elected = plan.decision.base
        # older ones may lack replicas, and so may the elected one until it is protected again: they count for nothing
        # but themselves
        whole = elected if plan.standing.whole else None
        return Book(tuple(Entry(save, "protected" if save == whole else "primary", True) for save in kept))

    def _agree_where_arenas_lie(self) -> None:
        """When an arena is free is decided alike everywhere only if it is everywhere the file, or nowhere."""
        here = int(self._file_is_arena)
        highest, lowest = self._start.setup.maximum([here, -here])
        if highest != -lowest:
            raise ConfigError(
                "the directory for local saves is memory-backed on some nodes and a disk on others.",
                advice="Use the same kind of mount on every node.",
            )

    # -- a save -------------------------------------------------------------------------------------------------------

    def wish(self, due: Due, *, draining: bool) -> Wish:
        """What is due, less what must wait: one drain at a time."""
        kind = self._checkpoint.non_persistent_ckpt_type
        on_nodes = due.non_persistent and kind in ("local", "in_memory")
        to_global = due.non_persistent and kind == "global"
        return Wish(on_nodes, to_global and not draining, due.persistent and not draining)

    def room(self, book: Book) -> bool:
        """Whether an arena is free for one more save. Equal on all ranks."""
        keeper = self._start.keeper
        in_use = book.arenas_in_use(file_is_arena=keeper is not None and self._file_is_arena)
        return keeper is not None and book.has_room() and in_use < self._capacity

    def deletion_makes_room(self, book: Book) -> bool:
        """Whether giving up a kept save would free an arena: not where the files lie on a disk. Equal on all ranks."""
        return self._file_is_arena and book.has_room()

    @property
    def keeps_on_nodes(self) -> bool:
        """Whether non-persistent saves lie on the nodes (and not on shared storage, or nowhere)."""
        return self._checkpoint.non_persistent_ckpt_type in ("local", "in_memory")

    @property
    def _file_is_arena(self) -> bool:
        keeper = self._start.keeper
        return keeper is not None and keeper.file_is_arena and self.keeps_on_nodes

    @property
    def _arena_room(self) -> ArenaRoom:
        return ArenaRoom(self._capacity, self._resiliency.exchange_timeout_s / 2, self._file_is_arena)

    @property
    def _capacity(self) -> int:
        interval = shortest_interval(self._checkpoint.non_persistent_save_interval, self._resiliency.cadence)
        return arenas_per_rank(self._resiliency.keep_last, interval, self._file_is_arena)

    def waits_for_others(self, due: Due) -> bool:
        """Whether the training thread would wait for other ranks inside such a save. Equal on all ranks."""
        if self._replan or not self._budgeted:
            return True
        to_global = due.non_persistent and self._checkpoint.non_persistent_ckpt_type == "global"
        drained_now = to_global or (due.persistent and not self._checkpoint.async_save)
        return drained_now or (due.non_persistent and self._resiliency.non_persistent_sync)

    def take(self, save: SaveId, wish: Wish, began: float) -> SaveReport:
        """Snapshot this rank's state, or begin to, and hand it to the lanes. Collective when a new plan must be made.

        A failure here is this rank's part of the save failing, unless no plan could be made at all: that is raised.
        """
        problem, collected = "", None
        # of every agreed save that is compared, also one that fails here: the ranks compare the same share
        self._turn += wish.on_nodes or not self.keeps_on_nodes
        try:
            collected = self._state.collect()
        except ResilienceError as error:
            problem = str(error)
            if self._replan:
                self._plan(error)
        if self._replan and collected is not None:
            problem = self._plan(collected)
            collected = None if problem else collected
        snapshot: Snapshot | None = None
        if collected is not None:
            try:
                waited_for = self._is_waited_for(wish)
                snapshot = self._filling.fill(
                    save, collected, wish, self._turn, self._arena_room, waited_for=waited_for
                )
            except (ResilienceError, OSError) as error:
                problem = str(error)
        stall_s = self._clock.now() - began
        self._hand_over(save, wish, snapshot, problem)
        self._reserve()
        report = self._finish_take(save, wish, stall_s, snapshot, problem, began)
        self.tell(
            "snapshot", iteration=save.iteration, kind=report.kind, tiers=list(report.tiers), stall_s=report.stall_s,
            bytes=report.bytes,
        )  # fmt: skip
        self._begun = report
        return report

    def go(self) -> None:
        """The boundary is over: what is to be copied while training goes on may begin."""
        if self._overlap is not None:
            self._overlap.go()

    def join(self) -> float:
        """Before the state may change: what is still being copied of it. Returns for how long training waited for that,
        here and before the optimizer's step."""
        if self._overlap is None:
            return 0.0
        self._overlap.join()
        waited_s, begun = self._overlap.take_waited(), self._begun
        if waited_s >= _WORTH_A_WORD_S and begun is not None:
            self.tell("joined", iteration=begun.iteration, stall_s=begun.stall_s + waited_s, waited_s=waited_s)
        return waited_s

    def _plan(self, collected: Collected | ResilienceError) -> str:
        """Make a plan; collective. Returns why there is none.

        What cannot be stored is raised at a start's first save, where somebody is there to mend it; later it fails
        the save.
        """
        first = self._planner.layout is None
        try:
            differ = self._planner.plan(collected, self._plan_groups)
        except ResilienceError as error:
            if first or isinstance(error, PeerLostError):
                raise
            return str(error)
        if first:  # buffers may differ from the start; what becomes unequal later is news of any kind
            differ -= self._state.buffer_keys()
        self._replan = False
        if differ:
            self.tell("unequal_items", keys=sorted(differ)[:50])
        if not self._budgeted:
            self._budgeted = True
            self._fix_memory(collected)
        return ""

    def _reserve(self) -> None:
        """Have the buffers of all saves to come made in the background: the training thread's own first."""
        layout, job, reservation = self._planner.layout, self._start.job, self._reservation
        if layout is None or reservation is None:
            return
        slots = self._capacity if self._file_is_arena else 1
        wanted = [Buffers(job.rank, layout.nbytes, self._capacity)]
        kept: dict[Kept, int] = dict(self._kept_here)
        if self._twins is not None:  # a new layout has another size
            kept.update(self._twins.sizes().items())
        wanted += [Buffers(owner, nbytes, slots) for owner, nbytes in kept.items()]
        reservation.want(wanted)
        reservation.go_on()

    def _hand_over(self, save: SaveId, wish: Wish, snapshot: Snapshot | None, problem: str) -> None:
        if wish.on_nodes and self.replicas is not None:
            job = (
                snapshot.job
                if snapshot
                else SaveJob(save, None, None, self._planner.split, error=problem or "no snapshot")
            )
            self.replicas.submit(job)
        if wish.drain:
            self.drain.submit(save, wish, snapshot, self.afterwards.log, self._resiliency.keep_persistent, problem)

    def _finish_take(
        self, save: SaveId, wish: Wish, stall_s: float, snapshot: Snapshot | None, problem: str, began: float
    ) -> SaveReport:
        if self._waits_for_drain(wish):
            self._wait_for(self.lanes.drain, save)
        if wish.on_nodes and self._resiliency.non_persistent_sync:
            self._wait_for(self.lanes.protect, save)
        state = state_of(self.board, save, wish, problem)
        report = self.report(save, wish, max(stall_s, self._clock.now() - began), state)
        error = problem or error_of(self.board, save)
        return replace(report, bytes=snapshot.arena.nbytes if snapshot else 0, error=error)

    def _is_waited_for(self, wish: Wish) -> bool:
        """Whether training waits for what is made of the snapshot: then nothing is won by a copy that goes on."""
        return self._waits_for_drain(wish) or (wish.on_nodes and self._resiliency.non_persistent_sync)

    def _waits_for_drain(self, wish: Wish) -> bool:
        return wish.drain and not (wish.persistent and self._checkpoint.async_save)

    def _wait_for(self, lane: Lane, save: SaveId) -> None:
        """Until a synchronous save is over, or nothing of it has moved on this rank for longer than a save may take.

        Storage that hangs must not keep training from going on, nor the job from ending: the save stays in the making.
        """
        stillness = Stillness(self._clock.now)
        bound_s = STILL_BOUNDS * self._resiliency.exchange_timeout_s
        while not lane.wait(_LOOK_S):
            if stillness.seconds(self.progress([save, drain_slot(save)])) > bound_s:
                what = f"the save of iteration {save.iteration} has not moved for {bound_s:g} s on this rank"
                advice = f"{lane.running!r} is under way. Training goes on without waiting for it."
                self.tell("warning", what=what, advice=advice)
                return

    def report(self, save: SaveId, wish: Wish, stall_s: float, state: str) -> SaveReport:
        return report_of(save, wish, self.afterwards.tier, stall_s, state)

    def estimate_memory(self) -> None:
        """Before the first step. Collective; MemoryBudgetError on all ranks alike."""
        self._budget.estimate(self._state)

    def _fix_memory(self, collected: Collected | ResilienceError) -> None:
        """Sizes are known now. Collective; MemoryBudgetError on all ranks alike."""
        layout = self._planner.layout
        if layout is None or not isinstance(collected, Collected):
            return
        state_bytes = sum(item.tensor.nbytes for item in collected.items if item.alias_of is None)
        sizes = self._budget.fix(layout.nbytes, state_bytes)
        if sizes is None or self._reservation is None:
            return
        if self.keeps_on_nodes:
            start = self._start
            self._kept_here = start.scheme.files(start.topology, start.job.rank, sizes.shards)
        leftovers = sizes.present - {*self.afterwards.kept}
        self._reservation.hold_back(any(save.attempt != self._start.attempt for save in leftovers))

    # -- afterwards ---------------------------------------------------------------------------------------------------

    def plan_anew(self) -> None:
        """A save failed, which all ranks know: the next one makes a new plan, on all of them."""
        self._replan = True
        if self._planner.layout is not None:
            self.afterwards.make_room(self._planner.layout.nbytes)

    def tier_of(self, change: Change) -> Tier:
        drained = change.what in ("persistent", "persistent_failed")
        return self.drain.tier_of(change.save) if drained else self.afterwards.tier

    def error_of(self, change: Change) -> str:
        slot = drain_slot(change.save) if change.what == "persistent_failed" else change.save
        return self.board.error(slot)

    def certify(self, change: Change) -> None:
        """Every rank has committed."""
        if self._reservation is not None and change.what in ("protected", "unprotected"):
            self._reservation.hold_back(False)  # what earlier attempts left goes now
        self.afterwards.certify(change)

    def delete(self, save: SaveId) -> None:
        """The job decided to delete `save`."""
        self.board.drop([save])
        self.afterwards.delete(save)

    def progress(self, slots: Sequence[SaveId]) -> Hashable:
        """A mark that changes whenever the background work for saves moves."""
        transfers = 0 if self.replicas is None else self.replicas.transfers
        return self.lanes.finished(), transfers, self._fs.moved_bytes, self.board.reports(slots)

    def close(self, *, failed: bool) -> bool:
        """End lanes and groups within a bound; committed copies stay. False if a lane is stuck."""
        if self._overlap is not None:
            self._overlap.close()
        self.lanes.ask_to_end(failed=failed)
        if self.replicas is not None:
            self.replicas.close(failed=failed)
        for group in self._groups:
            group.close()  # whoever still waits in one is woken
        ended = self.lanes.ended(failed=failed)
        if ended and self._start.keeper is not None:
            self._start.keeper.close()
        return ended
