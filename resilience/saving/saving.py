"""One rank's machinery for saves: the plan of its shard, arenas, the lanes that do the background work.

The controller says what happens when; this file carries it out on this rank and keeps what is local to it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

from resilience.assembly import Start, agree_all
from resilience.config import CheckpointConfig, ResiliencyConfig
from resilience.errors import ConfigError, PeerLostError, ResilienceError, SaveFailedError, StoreError
from resilience.formats.registry import checkpoint_format
from resilience.formats.saver import SharedSaver
from resilience.planning.book import Book, Change, Entry, drain_slot
from resilience.planning.inventory import AttemptLog, Kept, SaveId, Tier
from resilience.planning.memory import arenas_per_rank
from resilience.planning.patience import STILL_BOUNDS
from resilience.planning.schedule import Due, shortest_interval
from resilience.planning.travel import Range
from resilience.replication.communicator import Agreements
from resilience.replication.protection import Board, SaveJob
from resilience.reports import SaveReport
from resilience.restore import Plan
from resilience.runtime.clock import Clock
from resilience.runtime.worker import Lane
from resilience.saving.afterwards import Afterwards
from resilience.saving.budget import Budget
from resilience.saving.drain import Drain
from resilience.saving.lanes import CLOSE_BOUND_S, Lanes
from resilience.saving.progress import Stillness
from resilience.saving.replicas import Replicas
from resilience.saving.reservation import Buffers, Reservation
from resilience.saving.wish import Snapshot, Wish
from resilience.snapshot.copying import DONE, Copying, Part
from resilience.snapshot.layout import ShardIdentity
from resilience.snapshot.overlap import Overlap, WatchSteps
from resilience.snapshot.planner import PlanGroups, SnapshotPlanner
from resilience.snapshot.twins import Twin, Twins, rest_for
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
        job, communicator = start.job, start.communicator
        members = job.data_parallel()
        name = f"{members[0]}-{len(members)}"
        # a snapshot serves both kinds of save: where one rank writes all that is replicated, it must have all of it
        split = checkpoint.non_persistent_local_ckpt_algo == "fully_parallel" and checkpoint.fully_parallel_save
        self._planner = SnapshotPlanner(members, members.index(job.rank), split=split)
        self._plan_groups = self._join_plan_groups(name, members)
        self._replan = True
        self._budgeted = False
        self._turn = 0
        self._rest: tuple[Range, ...] = ()  # what of this rank's shard a holder that composes it needs
        overlapped = resiliency.snapshot_mode == "overlapped"
        self.lanes = lanes = Lanes(tell, start.threads, overlapped=overlapped)
        self._copying = Copying(lanes.copy, start.threads, tell)
        self._overlap = Overlap(state, self._copying, tell, clock.now, watch_steps) if overlapped else None
        self._begun: SaveReport | None = None  # of the newest snapshot
        self.afterwards = Afterwards(start, log, lanes, fs, tell)
        self._groups: list[Agreements] = [self._plan_groups.own]
        if self._plan_groups.leaders is not None:
            self._groups.append(self._plan_groups.leaders)
        equality = communicator.agreements(f"equality/{name}", members)
        drain = communicator.agreements("drain")
        self._groups += [equality, drain]
        self.replicas: Replicas | None = None
        self._twins: Twins | None = None
        self._reservation: Reservation | None = None
        if start.keeper is not None:
            self._twins = Twins(members, start.threads) if resiliency.replicas_from == "live" else None
            self.replicas = Replicas(start, start.keeper, equality, self.board, lanes.protect, clock, tell, self._twins)
            self._reservation = Reservation(start.keeper, lanes.reserve, tell)
            if any(device.type == "cuda" for device in state.devices):
                start.keeper.prepare = self._copying.prepare
            lanes.give_up = self._reservation.stop
        self._budget = Budget(
            start, checkpoint, resiliency, fs, tell, split=self._planner.split, file_is_arena=self._file_is_arena,
            again=log.generation > 1,
        )  # fmt: skip
        self._kept_here: Mapping[Kept, int] = {}  # what this rank keeps of a save for others: bytes of each file
        form = checkpoint_format(checkpoint.ckpt_format)
        form = form.keeping_plans() if checkpoint.ckpt_assume_constant_structure else form
        self.drain = Drain(
            start,
            state,
            checkpoint,
            SharedSaver(form, drain, fs),
            self.board,
            lanes.drain,
            clock,
            tell,
            save_frozen=resiliency.save_frozen,
            equality=None if self.keeps_on_nodes else equality,
        )

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

    def adopt(self, plan: Plan) -> Book:
        """Take charge of what the nodes keep, note the attempt, and start to replicate again. Collective."""
        kept = self.afterwards.kept = plan.standing.kept
        self.afterwards.base = None if plan.assembly is None else plan.decision.base
        keeper = self._start.keeper
        if keeper is not None:
            keeper.keep_only(kept)
            for save in kept:
                keeper.adopt(save, self._mine_of(save, keeper))
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

    def _mine_of(self, save: SaveId, keeper: ShardKeeper) -> list[Kept]:
        """The files on this node that this rank will delete one day: its own and what it holds for others.

        The node's leader takes what nobody on the node is responsible for any more, because ranks moved.
        """
        job = self._start.job
        there = keeper.store.reader.kept_of(save)
        claimed = {kept for rank in job.node_ranks for kept in self._kept_by(rank)}
        mine = self._kept_by(job.rank)
        return [kept for kept in there if kept in mine or (job.leads_node and kept not in claimed)]

    def _kept_by(self, rank: int) -> set[Kept]:
        """What a rank keeps of each save, by name."""
        nothing = [0] * self._start.job.world_size  # sizes, which do not matter here
        return {rank, *self._start.scheme.files(self._start.topology, rank, nothing)}

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
                snapshot = self._fill(save, collected, wish)
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

    def _fill(self, save: SaveId, collected: Collected, wish: Wish) -> Snapshot:
        layout = self._planner.fit(collected)
        keeper, job = self._start.keeper, self._start.job
        if keeper is None:
            raise SaveFailedError("no directory for arenas is configured")
        arena = keeper.take_arena(
            layout.nbytes, self._capacity, self._resiliency.exchange_timeout_s / 2, held_count=self._file_is_arena
        )
        composed: dict[int, tuple[Twin, Part]] = {}
        try:
            healthy = self._state.healthy is None or bool(self._state.healthy())
            identity = ShardIdentity(
                self._start.run_id, save.attempt, save.generation, save.iteration, job.rank, job.world_size,
                len(collected.values),
            )  # fmt: skip
            own = self._planner.part(collected, arena)
            composed = self._compose(collected, keeper) if wish.on_nodes else {}
            sample, pairs = self._planner.sample(collected, self._turn)
            parts = [own, *(part for _, part in composed.values())]
            copy, seal = DONE, lambda: arena.seal(identity)
            if self._overlap is not None and self._overlap.works and not self._is_waited_for(wish):
                copy = self._overlap.start(parts, collected.items, sample, pairs, seal)
            else:
                self._copying.start(parts, pairs, seal)
        except BaseException:
            for owner, (twin, _) in composed.items():
                keeper.discard(owner, twin.slot, reusable=True)
            keeper.unpin(arena)
            raise
        twins = {owner: twin for owner, (twin, _) in composed.items()}
        if wish.on_nodes and wish.drain:
            keeper.pin(arena)
        job_of_it = SaveJob(
            save, arena, sample, self._planner.split, healthy, "", layout.layout_id, self._rest, twins, copy
        )  # fmt: skip
        return Snapshot(arena, collected, job_of_it, self._planner.across)

    def _compose(self, collected: Collected, keeper: ShardKeeper) -> dict[int, tuple[Twin, Part]]:
        """Replicas of others' shards, as far as this rank has the same; nothing where they come over the network."""
        if self._twins is None or self._planner.layout is None:
            return {}
        self._rest = rest_for(self._planner.layout)
        return self._twins.compose(self._planner.layout, collected.items, self._planner.shared, keeper.warm_slot)

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
        report = self.report(save, wish, max(stall_s, self._clock.now() - began), self._state_of(save, wish, problem))
        return replace(report, bytes=snapshot.arena.nbytes if snapshot else 0, error=problem or self._error(save))

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

    def _state_of(self, save: SaveId, wish: Wish, problem: str) -> str:
        if problem:
            return "failed"
        reports = self.board.reports([drain_slot(save)] if wish.drain and not wish.on_nodes else [save])
        if not reports or not reports[0].settled:
            return "pending"
        if reports[0].failed:
            return "failed"
        return "persistent" if wish.persistent and not wish.on_nodes else reports[0].progress

    def _error(self, save: SaveId) -> str:
        return self.board.error(save) or self.board.error(drain_slot(save))

    def report(self, save: SaveId, wish: Wish, stall_s: float, state: str) -> SaveReport:
        tiers: list[Tier] = [self.afterwards.tier] if wish.on_nodes else []
        tiers += ["global"] if wish.to_global else []
        tiers += ["persistent"] if wish.persistent else []
        non_persistent = wish.on_nodes or wish.to_global
        kind: Literal["persistent", "non_persistent", "both"] = "non_persistent" if non_persistent else "persistent"
        if wish.persistent and non_persistent:
            kind = "both"
        return SaveReport(kind, save.iteration, save.generation, tuple(tiers), stall_s, state, 0)

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

    def free_node_memory(self) -> None:
        """The run finished and its last persistent save is committed: its copies on this node go. Collective."""
        self.lanes.give_up()
        self.lanes.reserve.wait(CLOSE_BOUND_S)
        if self._start.keeper is not None:
            self._start.keeper.close()
        self._start.setup.barrier()
        if self._start.job.leads_node:
            for store in self._start.stores:
                try:
                    store.remover.forget()
                except OSError as error:  # all is saved: no reason to say that the run failed
                    self.tell("warning", what=f"{store.root} is not freed: {error}", advice="Remove it.")

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
