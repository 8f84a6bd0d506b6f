"""One rank's machinery for saves: the plan of its shard, arenas, the lanes that do the background work.

The controller says what happens when; this file carries it out on this rank and keeps what is local to it.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from typing import Literal

from resilience.assembly import Start, agree_all
from resilience.config import CheckpointConfig, ResiliencyConfig
from resilience.errors import ConfigError, PeerLostError, ResilienceError, SaveFailedError
from resilience.formats.registry import checkpoint_format
from resilience.formats.saver import SharedSaver
from resilience.planning.book import Book, Change, Entry, drain_slot
from resilience.planning.inventory import AttemptLog, SaveId, Tier
from resilience.planning.memory import arenas_per_rank
from resilience.planning.schedule import Due
from resilience.replication.communicator import Agreements
from resilience.replication.protection import Board, SaveJob
from resilience.reports import SaveReport
from resilience.restore import Plan
from resilience.runtime.clock import Clock
from resilience.runtime.worker import Lane
from resilience.saving.budget import Budget
from resilience.saving.drain import Drain
from resilience.saving.replicas import Replicas
from resilience.saving.reservation import Buffers, Reservation
from resilience.saving.wish import Snapshot, Wish
from resilience.snapshot.layout import ShardIdentity
from resilience.snapshot.planner import PlanGroups, SnapshotPlanner
from resilience.state.items import Collected
from resilience.state.training_state import TrainingState
from resilience.stores.filesystem import FileSystem
from resilience.stores.keeper import ShardKeeper

__all__ = ["Saving", "Wish"]

_CLOSE_BOUND_S = 10.0
_FAILED_CLOSE_BOUND_S = 2.0
_DRAIN_BOUND_S = 24 * 3600.0  # of the local wait only: each step below it is bounded by progress


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
    ) -> None:
        """Collective: opens the groups of the lanes."""
        self._start = start
        self._state = state
        self._checkpoint = checkpoint
        self._resiliency = resiliency
        self._log = log
        self._clock = clock
        self._fs = fs
        self.tell = tell
        self.board = Board()
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
        self._kept: tuple[SaveId, ...] = ()
        self._dropped_earlier = False
        self._log_waits = False
        self.exit_status = 0  # with which the process is to end, should a thread be stuck then
        self._groups: list[Agreements] = [self._plan_groups.own]
        if self._plan_groups.leaders is not None:
            self._groups.append(self._plan_groups.leaders)
        self._tidy = Lane("tidy", self._lane_error)
        equality = communicator.agreements(f"equality/{name}", members)
        drain = communicator.agreements("drain")
        self._groups += [equality, drain]
        lane = Lane("protect", self._lane_error)
        self.replicas = (
            None if start.keeper is None else Replicas(start, start.keeper, equality, self.board, lane, clock, tell)
        )
        self._protect = lane
        self.reservation = (
            None if start.keeper is None else Reservation(start.keeper, Lane("reserve", self._lane_error), self.tell)
        )
        self._budget = Budget(
            start, checkpoint, resiliency, fs, tell, split=self._planner.split, file_is_arena=self._file_is_arena
        )
        self._replicas_here: dict[int, int] = {}  # by owner whose replicas this rank keeps: bytes of one
        form = checkpoint_format(checkpoint.ckpt_format)
        form = form.keeping_plans() if checkpoint.ckpt_assume_constant_structure else form
        self.drain = Drain(
            start,
            state,
            checkpoint,
            SharedSaver(form, drain, fs),
            self.board,
            Lane("drain", self._lane_error),
            clock,
            tell,
            save_frozen=resiliency.save_frozen,
            equality=None if self.keeps_on_nodes else equality,
        )
        atexit.register(self._at_exit)

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
        self._kept = plan.standing.kept
        keeper = self._start.keeper
        if keeper is not None:
            keeper.keep_only(self._kept)
            for save in self._kept:
                keeper.adopt(save, self._mine_of(save, keeper))
        agree_all(self._start.setup, self._write_log)
        if self.replicas is not None:
            self._agree_where_arenas_lie()
            self.replicas.begin(plan, self._resiliency.replication_bytes_per_s)
        elected = plan.decision.base
        # older ones may lack replicas, and so may the elected one until it is replicated again: they count for nothing
        # but themselves
        whole = elected if not plan.standing.lacking else None
        return Book(tuple(Entry(save, "protected" if save == whole else "primary", True) for save in self._kept))

    def _mine_of(self, save: SaveId, keeper: ShardKeeper) -> list[int]:
        """The copies on this node that this rank will delete one day: its own and what it holds for others.

        The node's leader takes what nobody on the node is responsible for any more, because ranks moved.
        """
        job, held = self._start.job, self._start.topology.held()
        there = keeper.store.owners_of(save)
        claimed = {owner for rank in job.node_ranks for owner in (rank, *held[rank])}
        mine = {job.rank, *held[job.rank]}
        return [owner for owner in there if owner in mine or (job.leads_node and owner not in claimed)]

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
        interval = self._checkpoint.non_persistent_save_interval
        return arenas_per_rank(self._resiliency.keep_last, interval, self._file_is_arena)

    def waits_for_others(self, due: Due) -> bool:
        """Whether the training thread would wait for other ranks inside such a save. Equal on all ranks."""
        if self._replan or not self._budgeted:
            return True
        to_global = due.non_persistent and self._checkpoint.non_persistent_ckpt_type == "global"
        drained_now = to_global or (due.persistent and not self._checkpoint.async_save)
        return drained_now or (due.non_persistent and self._resiliency.non_persistent_sync)

    def take(self, save: SaveId, wish: Wish, began: float) -> SaveReport:
        """Snapshot this rank's state and hand it to the lanes. Collective when a new plan must be made.

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
        tiers = list(report.tiers)
        self.tell(
            "snapshot",
            iteration=save.iteration,
            kind=report.kind,
            tiers=tiers,
            stall_s=report.stall_s,
            bytes=report.bytes,
        )
        return report

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
        try:
            self._planner.fill(collected, arena)
            identity = ShardIdentity(
                self._start.run_id, save.attempt, save.generation, save.iteration, job.rank, job.world_size,
                len(collected.values),
            )  # fmt: skip
            arena.seal(identity)
            sample = self._planner.sample(collected, self._turn)
            healthy = self._state.healthy is None or bool(self._state.healthy())
        except BaseException:
            keeper.unpin(arena)
            raise
        if wish.on_nodes and wish.drain:
            keeper.pin(arena)
        job_of_it = SaveJob(save, arena, sample, self._planner.split, healthy)
        return Snapshot(arena, collected, job_of_it, self._planner.across)

    def _reserve(self) -> None:
        """Have the buffers of all saves to come made in the background: the training thread's own first."""
        layout, job, reservation = self._planner.layout, self._start.job, self.reservation
        if layout is None or reservation is None:
            return
        slots = self._capacity if self._file_is_arena else 1
        wanted = [Buffers(job.rank, layout.nbytes, self._capacity)]
        wanted += [Buffers(owner, nbytes, slots) for owner, nbytes in self._replicas_here.items()]
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
            self.drain.submit(save, wish, snapshot, self._log, self._resiliency.keep_persistent, problem)

    def _finish_take(
        self, save: SaveId, wish: Wish, stall_s: float, snapshot: Snapshot | None, problem: str, began: float
    ) -> SaveReport:
        if wish.drain and not (wish.persistent and self._checkpoint.async_save):
            self.drain.lane.wait(_DRAIN_BOUND_S)
        if wish.on_nodes and self._resiliency.non_persistent_sync:
            self._protect.wait(_DRAIN_BOUND_S)
        report = self.report(save, wish, max(stall_s, self._clock.now() - began), self._state_of(save, wish, problem))
        return replace(report, bytes=snapshot.arena.nbytes if snapshot else 0, error=problem or self._error(save))

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
        tiers: list[Tier] = [self._tier] if wish.on_nodes else []
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
        if sizes is None or self.reservation is None:
            return
        if self.keeps_on_nodes:
            held = self._start.topology.held()[self._start.job.rank]
            self._replicas_here = {owner: sizes.shards[owner] for owner in held}
        leftovers = sizes.present - {*self._kept}
        self.reservation.hold_back(any(save.attempt != self._log.attempt for save in leftovers))

    # -- afterwards ---------------------------------------------------------------------------------------------------

    def plan_anew(self) -> None:
        """A save failed, which all ranks know: the next one makes a new plan, on all of them."""
        self._replan = True
        if self._start.job.leads_node:
            self._tidy.submit("make room", self._make_room)

    def _make_room(self) -> None:
        """A save failed: if it was for want of room, what earlier attempts left goes before this one has a save."""
        keeper, layout = self._start.keeper, self._planner.layout
        if keeper is not None and layout is not None and self._fs.free_bytes(keeper.arena_dir) < 2 * layout.nbytes:
            self._drop_earlier()

    def _drop_earlier(self) -> None:
        """Delete what earlier attempts left beside the saves that are kept. In the tidy lane of the node's leader."""
        if self._dropped_earlier:
            return
        self._dropped_earlier = True
        for store in self._start.stores:
            store.drop_earlier_attempts(self._start.attempt, self._kept)

    @property
    def _tier(self) -> Tier:
        return self._start.keeper.store.tier if self._start.keeper is not None else "persistent"

    def tier_of(self, change: Change) -> Tier:
        drained = change.what in ("persistent", "persistent_failed")
        return self.drain.tier_of(change.save) if drained else self._tier

    def error_of(self, change: Change) -> str:
        slot = drain_slot(change.save) if change.what == "persistent_failed" else change.save
        return self.board.error(slot)

    def certify(self, change: Change) -> None:
        """Every rank has committed: certificate, attempt log; then what earlier attempts left may go."""
        self._log = replace(self._log, completed=max(self._log.completed or change.save, change.save))
        if self.reservation is not None and change.what in ("protected", "unprotected"):
            self.reservation.hold_back(False)  # what earlier attempts left goes now
        self._tidy.submit(f"certify {change.save.iteration}", lambda: self._certify(change))

    def _certify(self, change: Change) -> None:
        start, keeper = self._start, self._start.keeper
        if not start.job.leads_node:
            return
        if keeper is not None and change.what in ("complete", "protected"):
            keeper.store.write_certificate(change.save, start.job.world_size, protected=change.what == "protected")
        for store in start.stores:
            store.write_attempt_log(self._log)
        if start.job.rank == 0 and not self._log_waits:
            self._log_waits = True  # not in this lane: shared storage may hang, and deletions must go on
            self.drain.lane.submit("attempt log", self._write_shared_log)
        if change.what in ("protected", "unprotected"):
            self._drop_earlier()

    def delete(self, save: SaveId) -> None:
        """The job decided to delete `save`."""
        self.board.drop([save])
        self._kept = tuple(kept for kept in self._kept if kept != save)

        def remove() -> None:
            if self._start.keeper is not None:
                self._start.keeper.delete(save)
            if self._start.job.leads_node:
                for store in self._start.stores[1:]:
                    store.drop(save)
                for store in self._start.stores:
                    store.drop_beside(save)
                self.tell("pruned", iteration=save.iteration, generation=save.generation, tier=self._tier)

        self._tidy.submit(f"delete {save.iteration}", remove)

    @property
    def _lanes(self) -> tuple[Lane, ...]:
        ahead = () if self.reservation is None else (self.reservation.lane,)
        return (self._protect, self.drain.lane, self._tidy, *ahead)

    def wait_saves(self, bound_s: float) -> None:
        """Until no lane has work for a save, at most about `bound_s`."""
        for lane in (self._protect, self.drain.lane):
            lane.wait(bound_s)

    def progress(self, slots: Sequence[SaveId]) -> Hashable:
        """A mark that changes whenever the background work for saves moves."""
        finished = tuple(lane.finished for lane in self._lanes)
        transfers = 0 if self.replicas is None else self.replicas.transfers
        return finished, transfers, self._fs.moved_bytes, self.board.reports(slots)

    def running(self) -> list[str]:
        """What the lanes are doing."""
        return [lane.running for lane in self._lanes if lane.running]

    def wait_idle(self, bound_s: float) -> None:
        for lane in self._lanes:
            lane.wait(bound_s)

    def end(self, outcome: Literal["finished", "stopped", "failed"], iteration: int) -> None:
        """Note how this attempt ended."""
        self._tidy.wait(_CLOSE_BOUND_S)
        self._log = replace(self._log, end=outcome, end_iteration=iteration)
        try:
            self._write_log()
        except OSError as error:
            self.tell("warning", what=f"the attempt log could not be written: {error}", advice="")

    def _write_log(self) -> None:
        """In every node's directory and in `save`."""
        if self._start.job.leads_node:
            for store in self._start.stores:
                store.write_attempt_log(self._log)
        self._write_shared_log()

    def _write_shared_log(self) -> None:
        self._log_waits = False
        if self._start.job.rank == 0 and "save" in self._start.shared.stores:
            self._start.shared.stores["save"].write_attempt_log(self._log)

    def free_node_memory(self) -> None:
        """The run finished and its last persistent save is committed: its copies on this node go."""
        if self.reservation is not None:
            self.reservation.stop()
            self.reservation.lane.wait(_CLOSE_BOUND_S)
        if self._start.keeper is not None:
            self._start.keeper.close()
        self._start.setup.barrier()
        if self._start.job.leads_node:
            for store in self._start.stores:
                store.forget()

    def close(self, *, failed: bool) -> bool:
        """End lanes and groups within a bound; committed copies stay. False if a lane is stuck."""
        self.exit_status = self.exit_status or int(failed)
        lanes = self._lanes
        if self.reservation is not None:
            self.reservation.stop()
        bound_s = _FAILED_CLOSE_BOUND_S if failed else _CLOSE_BOUND_S
        for lane in lanes:
            lane.close(bound_s, drop=failed)
        if self.replicas is not None:
            self.replicas.close(failed=failed)
        for group in self._groups:
            group.close()  # whoever still waits in one is woken
        closed = [lane.close(bound_s, drop=True) for lane in lanes]  # each, whatever the others say
        ended = all(closed)
        if ended:
            atexit.unregister(self._at_exit)
            if self._start.keeper is not None:
                self._start.keeper.close()
        return ended

    def _at_exit(self) -> None:
        """A thread is still in a transfer, or nobody called `close`: leaving would abort the process, so leave hard."""
        if self.reservation is not None:
            self.reservation.stop()
        lanes = self._lanes
        if not all(lane.close(_FAILED_CLOSE_BOUND_S, drop=True) for lane in lanes):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.exit_status)

    def _lane_error(self, what: str, error: Exception) -> None:
        self.tell("warning", what=f"background task {what!r} failed: {error!r}", advice="Please report this.")
