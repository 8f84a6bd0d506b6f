"""The order of events at a boundary: hear what all ranks agreed, decide what is due, snapshot, hand over, speak.

Every decision is made from agreed values (the book of saves, the outcome of the last control exchange), so that all
ranks take the same branch; what is local to a rank (a copy that fails, a full disk) becomes a report that the next
exchange carries.
"""

from __future__ import annotations

import os
from collections import deque
from pathlib import Path
from typing import Any

from resilience.announce import announce_start
from resilience.assembly import Start, assemble
from resilience.config import CheckpointConfig, ResiliencyConfig, override_from_env, validate_together
from resilience.errors import ConfigError, EvictedError, PeerLostError, SaveFailedError, SaveStuckError, StoppedExit
from resilience.job import make_communicator, node_identity
from resilience.job_facts import job_facts
from resilience.observe.events import EventLog
from resilience.planning.book import Book, Change, unsettled
from resilience.planning.cadence import best_interval
from resilience.planning.control import ControlAgreement, ControlReport
from resilience.planning.format_fit import check_format
from resilience.planning.inventory import AttemptLog, SaveId
from resilience.planning.patience import STALL_BOUNDS
from resilience.planning.schedule import Due, due_at
from resilience.replication.communicator import Communicator
from resilience.replication.conversation import Conversation
from resilience.reports import Resume, SaveReport
from resilience.requests import take_request
from resilience.runtime.clock import Clock, SystemClock
from resilience.saving import Saving
from resilience.saving.progress import Stillness
from resilience.state.parallel_layout import ParallelLayout
from resilience.state.training_state import TrainingState
from resilience.stores.filesystem import FileSystem, PosixFileSystem

__all__ = ["ResiliencyController"]

_STILL_BOUNDS = STALL_BOUNDS + 2  # an exchange with a stuck peer gives up first, and its save settles
_LONGEST_CADENCE = 10  # `cadence="auto"` goes up to this many times the configured interval


class ResiliencyController:
    """Saves and restores a `TrainingState`. For people who own their loop; `ResilientTrainer` is the other way.

    Every method that says so is collective: all ranks call it, in the same order.
    """

    def __init__(
        self,
        state: TrainingState,
        checkpoint: CheckpointConfig | None = None,
        resiliency: ResiliencyConfig | None = None,
        *,
        communicator: Communicator | None = None,
        clock: Clock | None = None,
        filesystem: FileSystem | None = None,
    ) -> None:
        """Not collective by itself. Raises ConfigError for a configuration that cannot work."""
        self.state = state
        self.checkpoint = checkpoint if checkpoint is not None else CheckpointConfig()
        self.resiliency = resiliency if resiliency is not None else ResiliencyConfig()
        self.clock: Clock = clock or SystemClock()
        self._fs: FileSystem = filesystem or PosixFileSystem()
        overrides: list[Any] = []
        if os.environ.get("RESILIENCE_DRILL") == "1":
            self.checkpoint, self.resiliency, overrides = override_from_env(
                self.checkpoint, self.resiliency, os.environ
            )
        self._communicator = communicator or make_communicator(self.resiliency.exchange_timeout_s)
        validate_together(self.checkpoint, self.resiliency, world_size=self._communicator.world_size)
        if self.checkpoint.save is not None or self.checkpoint.non_persistent_ckpt_type == "global":
            check_format(self.checkpoint.ckpt_format, job_facts(state), async_save=self.checkpoint.async_save)
        events = self.resiliency.events
        self.events = EventLog(
            None if events is None else Path(events), node_identity(self.resiliency, os.environ),
            self._communicator.rank, self.clock,
        )  # fmt: skip
        for override in overrides:
            self.tell("warning", what=str(override), advice="")
        self.resumed_from: Resume | None = None
        self.iteration = 0
        self._start: Start | None = None
        self._saving: Saving | None = None
        self._book = Book()
        self._log: AttemptLog | None = None
        self._conversation: Conversation | None = None
        self._requests: set[str] = set()  # of this rank, not yet spoken of
        self._heard: set[str] = set()  # of any rank, agreed and not yet acted on
        self._parted = False  # some rank's loader has ended: no exchange any more
        self._last_saved = -1
        self._failed_saves = 0
        self._failed_at: set[int] = set()
        self._persistent_at: set[int] = set()  # the newest iteration that reached `save`, as all ranks know
        self._sliding = False
        self._skipped_saves = 0
        self._stalls: deque[float] = deque(maxlen=1000)
        self._step_s = 0.0  # the latest step's duration, the boundary excluded
        self._stepped_at: float | None = None
        self._interval = self.checkpoint.non_persistent_save_interval

    # -- start --------------------------------------------------------------------------------------------------------

    def restore(self) -> Resume | None:
        """Elect the newest good save and load it. Collective; once, before the first step.

        Returns what was resumed from, or None for a fresh start. Raises NoUsableSaveError, SourceUnavailableError,
        LayoutMismatchError, CheckpointNotFoundError and others of `resilience.errors`, on all ranks alike.
        """
        layout = self.state.layout
        start = assemble(
            self.checkpoint, self.resiliency, layout, self._communicator, self.clock, self._fs, self.tell
        )  # fmt: skip
        self._start = start
        self.state.layout = (layout or ParallelLayout()).resolve(start.job.rank, start.job.world_size)
        plan, resume = start.restorer.run(self.state)
        decision = plan.decision
        if start.refusal is not None and decision.next_generation == 1:
            raise start.refusal
        self._log = AttemptLog(
            start.run_id, start.attempt, decision.next_generation, base=decision.base, fork=decision.fork
        )
        self.events.attempt = SaveId(0, self._log.generation, self._log.attempt).folder
        self.iteration = resume.iteration if resume is not None else 0
        self.resumed_from = resume
        self.state.train_state.step = self.iteration
        self._saving = Saving(
            start, self.state, self.checkpoint, self.resiliency, self._log, self.clock, self._fs, self.tell
        )
        self._book = self._saving.adopt(plan)
        start.restorer.close()
        self._saving.estimate_memory()
        self._conversation = Conversation(start.communicator.control("control", start.job.nodes))
        announce_start(start, self.state, self._log.generation, resume, plan.notes, plan.decision.reason, self.tell)
        return resume

    # -- boundaries ---------------------------------------------------------------------------------------------------

    def after_step(self, iteration: int, *, last: bool = False) -> SaveReport | None:
        """One boundary: the optimizer stepped, `iteration` steps are finished, no batch was drawn yet. Collective.

        Takes the saves that are due and returns the report of one that was taken. `last`: the loop ends here. Raises
        ConfigError, before anything is asked of other ranks, if `iteration` is not the next one; StoppedExit after a
        requested stop, SaveFailedError with `on_save_failure="raise"`, DivergedRanksError, PeerLostError.
        """
        saving = self._alive()
        if type(iteration) is not int or iteration != self.iteration + 1:
            raise ConfigError(
                f"after_step was called with iteration {iteration!r}; {self.iteration} are finished, so that "
                f"{self.iteration + 1} is expected.",
                advice="Call it once after every optimizer step, and not where gradients are only accumulated.",
            )
        if self._stepped_at is not None:
            self._step_s = self.clock.now() - self._stepped_at
        self.iteration = iteration
        self.state.train_state.step = iteration
        if not self._parted:
            self._collect()
        if last and not self._parted:  # nothing comes after: what others ask for in this step must be heard now
            self._speak(last=True)
            self._collect()
        if self._parted:
            return None
        due = self._due(iteration, last=last)
        report = None
        wanted = (due.persistent or due.non_persistent) and iteration != self._last_saved
        if wanted and not last and saving.waits_for_others(due):
            # a rank whose data has ended would not come: hear that now, not in the middle of a collective
            self._speak()
            agreed = self._collect()
            if agreed is not None and agreed.leaving:
                return None
        if wanted:
            report = self._take(saving, iteration, due, final=last or due.stop)
        if due.stop:
            self._stop()
        if not last:
            self._speak()
        self._stepped_at = self.clock.now()
        return report

    def leave(self) -> bool:
        """This rank's data ended before `train_iters`. Collective with whatever boundary the others are at.

        True if it ended on all ranks at once: then the loop is complete, and its last save is taken. Else no rank takes
        a save any more, since this one cannot.
        """
        self._collect()
        if not self._parted:
            self._speak(leaving=True)
            agreed = self._collect()
            if agreed is not None and agreed.all_leaving:
                self._parted = False
                due = self._due(self.iteration, last=True)
                if due.persistent and self.iteration not in (0, self._last_saved):
                    self._take(self._alive(), self.iteration, due, final=True)
                return True
        self.tell("warning", what="the data of a rank ended early; nothing is saved any more", advice="")
        return False

    def save(self, iteration: int, kind: str = "persistent") -> SaveReport:
        """Take a save at this boundary, whatever the intervals say. Collective, at a boundary only.

        `kind`: "persistent" or "non_persistent".
        """
        saving = self._alive()
        missing = self.checkpoint.save if kind == "persistent" else self.checkpoint.non_persistent_ckpt_type
        if kind not in ("persistent", "non_persistent") or missing is None:
            raise ConfigError(f"a {kind!r} save was asked for, but none of that kind is configured.")
        if iteration != self.iteration:
            raise ConfigError(
                f"save was called with iteration {iteration!r}, but {self.iteration} are finished.",
                advice="Save at a boundary: right after after_step, with its iteration.",
            )
        self._collect()
        if iteration == self._last_saved:
            generation = self._attempt().generation
            return SaveReport(
                "persistent" if kind == "persistent" else "non_persistent", iteration, generation, (), 0.0, "skipped", 0
            )
        due = Due(kind == "non_persistent", kind == "persistent", False)
        report = self._take(saving, iteration, due)
        self._speak()
        return report

    def request(self, what: str) -> None:
        """Ask for "save", "persistent", "non_persistent" or "stop" at the next boundary at which all ranks know.

        Local; safe in a signal handler.
        """
        self._requests.add(what)

    def wait(self) -> None:
        """Until no save is in the making. Collective; goes on while anything moves on any rank.

        Raises SaveStuckError on all ranks once nothing has moved for longer than any peer is waited for: a dozen times
        `exchange_timeout_s`.
        """
        stuck = self._settle()
        if stuck:
            raise SaveStuckError(stuck, advice="Raise exchange_timeout_s if storage or network are that slow.")

    def _settle(self) -> str:
        """`wait`; returns which saves wait for what if that is in vain, "" if they are settled."""
        saving, stillness = self._alive(), Stillness(self.clock.now)
        bound_s = _STILL_BOUNDS * self.resiliency.exchange_timeout_s
        while not self._parted:
            saving.lanes.wait_saves(1.0)
            idle_s = stillness.seconds(saving.progress(self._book.slots()))
            if self._conversation is not None and not self._conversation.under_way:
                self._speak(idle_us=int(idle_s * 1e6))
            agreed = self._collect()
            if self._book.settled() or agreed is None:
                return ""
            if agreed.idle_us > bound_s * 1e6:
                return f"No save moved for {bound_s:g} s: {unsettled(self._book, saving.lanes.running())}."
        return ""

    def _settle_or_tell(self) -> None:
        """Before an end: what does not settle is told, and the end comes all the same."""
        stuck = self._settle()
        if stuck:
            self.tell("warning", what=stuck, advice="")

    def finish(self) -> None:
        """The loop completed: settle, note it, and free node memory as configured. Collective."""
        saving = self._alive()
        if self._lacks_last_save():
            self._collect()
            self._take(saving, self.iteration, Due(False, True, False), final=True)
        self._settle_or_tell()
        if self._book.settled() or self._parted:
            saving.afterwards.end("finished", self.iteration)
            self.tell("finished", iteration=self.iteration)
        else:
            saving.afterwards.end("failed", self.iteration)
        start = self._started()
        keep = self.resiliency.keep_after_success or self.checkpoint.save is None
        if not self._parted:
            start.setup.barrier()
        if not keep and not self._parted and self.iteration in self._persistent_at:
            saving.free_node_memory()
        elif (
            saving.keeps_on_nodes
            and self._book.entries
            and start.job.rank == 0
            and not self.resiliency.keep_after_success
        ):
            what = f"the last saves of run {start.run_id} stay on the nodes: no persistent save holds them"
            self.tell("warning", what=what, advice=f"`resilience prune --forget {start.run_id}` frees them.")

    def _lacks_last_save(self) -> bool:
        """Whether this start resumed from a complete loop whose last persistent save never came to be. Equal on all."""
        resumed = self.resumed_from
        if resumed is None or self._parted or self.checkpoint.save is None or self.iteration == self._last_saved:
            return False
        return resumed.iteration == self.iteration > 0 and resumed.tier != "persistent"

    def status(self) -> dict[str, Any]:
        """Where this rank stands: iteration, saves in the making and kept, failures, stalls. Local."""
        return {
            "iteration": self.iteration,
            "saves": [
                {"iteration": e.save.iteration, "progress": e.progress, "settled": e.settled, "drain": e.drain}
                for e in self._book.entries
            ],
            "failed_saves": self._failed_saves,
            "skipped_saves": self._skipped_saves,
            "stall_s": list(self._stalls)[-100:],
            "resumed_from": None if self.resumed_from is None else self.resumed_from.iteration,
        }

    @property
    def rank(self) -> int:
        return self._communicator.rank

    def wait_idle(self, bound_s: float) -> None:
        """Until this rank's background work is done, at most `bound_s`. Local."""
        self._alive().lanes.wait_idle(bound_s)

    def asked_from_outside(self) -> str:
        """What `resilience request` left in this node's directory: "stop", "save" or "". Local; any thread."""
        start = self._start
        return "" if start is None or not start.job.leads_node else take_request(start.stores, self._fs)

    def close(self, *, failed: bool = False) -> None:
        """End threads and groups within a bound; never collective, never takes a snapshot. May be called twice."""
        saving, self._saving = self._saving, None
        ended = saving is None or saving.close(failed=failed)
        if self._conversation is not None:
            self._conversation.close()
            self._conversation = None
        start, self._start = self._start, None
        if start is not None:
            start.release(keep_locks=not ended)
        self.events.close()

    # -- the exchange -------------------------------------------------------------------------------------------------

    def _speak(self, *, leaving: bool = False, last: bool = False, idle_us: int = 0) -> None:
        """Start an exchange: what this rank has to say. Collected at the next boundary."""
        saving = self._alive()
        slots = self._book.slots()
        requests = set(self._requests)
        report = ControlReport(
            iteration=self.iteration,
            stop="stop" in requests,
            save_non_persistent="non_persistent" in requests or ("save" in requests and self._non_persistent),
            save_persistent="persistent" in requests or ("save" in requests and not self._non_persistent),
            leaving=leaving,
            last=last,
            epoch_wanted=saving.replicas.epoch_wanted() if saving.replicas is not None else 0,
            step_us=int(self._step_s * 1e6),
            stall_us=int(self._stalls[-1] * 1e6) if self._stalls else 0,
            idle_us=idle_us,
            failures=self._failed_saves,
            saves=saving.board.reports(slots),
        )
        self._requests -= requests
        if self._conversation is not None:
            self._conversation.speak(report, slots)

    def _collect(self) -> ControlAgreement | None:
        """What all ranks agreed in the exchange under way, if any; acts on it. Requests wait until a save is due."""
        heard = self._conversation.hear() if self._conversation is not None else None
        if heard is None:
            return None
        agreed, slots = heard
        self._parted = agreed.leaving
        wishes = {
            "stop": agreed.stop,
            "persistent": agreed.save_persistent,
            "non_persistent": agreed.save_non_persistent,
        }
        self._heard |= {what for what, asked in wishes.items() if asked}
        self._book, changes = self._book.agree(agreed, slots)
        saving = self._alive()
        if saving.replicas is not None:
            saving.replicas.set_epoch(agreed.epoch_wanted)
        for change in changes:
            self._note(saving, change)
        self._delete(saving, self._book.deletions(self.resiliency.keep_last))
        self._adapt(agreed)
        return agreed

    def _note(self, saving: Saving, change: Change) -> None:
        """Act on what became known of one save."""
        tier = saving.tier_of(change)
        if change.what in ("failed", "persistent_failed"):
            self._failed_saves += 1
            self._failed_at.add(change.save.iteration)
            error = saving.error_of(change)
            saving.plan_anew()
            self.tell(
                "save_failed", iteration=change.save.iteration, tier=tier, error=error or "it failed on another rank"
            )
            if change.what == "persistent_failed" and saving.drain.evicted:
                raise EvictedError(saving.drain.evicted)
            if self.resiliency.on_save_failure == "raise":
                raise SaveFailedError(
                    f"the save of iteration {change.save.iteration} failed: {error or 'on another rank'}"
                )
        else:
            saving.certify(change)
            if change.what == "persistent" and tier == "persistent":
                self._persistent_at = {change.save.iteration}
            if change.what in ("complete", "persistent"):
                self.tell("complete", iteration=change.save.iteration, generation=change.save.generation, tier=tier)

    def _delete(self, saving: Saving, saves: tuple[SaveId, ...]) -> None:
        if saves:
            self._book = self._book.without(saves)
            for save in saves:
                saving.delete(save)

    # -- saving -------------------------------------------------------------------------------------------------------

    @property
    def _non_persistent(self) -> bool:
        return self.checkpoint.non_persistent_ckpt_type is not None

    def _due(self, iteration: int, *, last: bool) -> Due:
        """What is due here; takes up what was asked for."""
        heard, self._heard = self._heard, set()
        return due_at(
            iteration,
            save_interval=self.checkpoint.save_interval,
            non_persistent_interval=self._interval,
            requested_non_persistent="non_persistent" in heard,
            requested_persistent="persistent" in heard,
            stop_requested="stop" in heard,
            last=last,
            save_set=self.checkpoint.save is not None,
            non_persistent_set=self._non_persistent,
        )

    def _adapt(self, agreed: ControlAgreement) -> None:
        """`cadence="auto"`: the interval that loses least, from the slowest rank's step and stall."""
        wished, mtbf_hours = self.checkpoint.non_persistent_save_interval, self.resiliency.mtbf_hours
        if self.resiliency.cadence != "auto" or wished is None or mtbf_hours is None:
            return
        if agreed.stall_us == 0 or agreed.step_us == 0:
            return  # nothing measured yet
        self._interval = best_interval(
            save_s=agreed.stall_us / 1e6, step_s=agreed.step_us / 1e6, mtbf_s=mtbf_hours * 3600,
            longest_steps=_LONGEST_CADENCE * wished,
        )  # fmt: skip

    def _take(self, saving: Saving, iteration: int, due: Due, *, final: bool = False) -> SaveReport:
        """One snapshot for all that is due. Equal decisions on all ranks; the copy itself may fail on some.

        `final`: no boundary follows to which a persistent save could slide.
        """
        began = self.clock.now()
        attempt = self._attempt()
        save = SaveId(iteration, attempt.generation, attempt.attempt)
        if final and (self._book.draining() or not saving.room(self._book)):
            self._settle_or_tell()  # the last save waits for those before; any other slides or is skipped
        wish = saving.wish(due, draining=self._book.draining() > 0)
        reason = "the save before it is still on its way to shared storage"
        while wish.any and not saving.room(self._book):
            helps = saving.deletion_makes_room(self._book)
            doomed = self._book.deletions(self.resiliency.keep_last, need_one=True) if helps else ()
            if not doomed:
                wish, reason = saving.no_wish, "all arenas hold saves that must not be deleted"
            self._delete(saving, doomed)
        if due.persistent and not wish.persistent:
            self._heard.add("persistent")  # it slides to the next boundary
        if not wish.any:
            self._skipped_saves += due.non_persistent
            if due.non_persistent or not self._sliding:  # one that slides says so once
                self.tell("save_skipped", iteration=iteration, reason=reason)
            self._sliding = due.persistent
            return saving.report(save, wish, 0.0, "skipped")
        self._book = self._book.begin(save, non_persistent=wish.on_nodes, drain=wish.drain)
        self._last_saved = iteration
        self._sliding = due.persistent and not wish.persistent
        report = saving.take(save, wish, began)
        self._stalls.append(report.stall_s)
        return report

    def _stop(self) -> None:
        """Everything was saved that could be: settle, note it, leave."""
        self._settle_or_tell()
        saving, start = self._alive(), self._started()
        saving.afterwards.end("stopped", self.iteration)
        elastic = "TORCHELASTIC_RUN_ID" in os.environ
        code = 0 if elastic else 75
        self.tell(
            "stopped",
            iteration=self.iteration,
            code=code,
            saved=self._book.settled() and self.iteration not in self._failed_at,
        )
        try:
            start.setup.barrier()
        except PeerLostError as error:
            self.tell("warning", what=f"a peer left before the last barrier: {error}", advice="")
        saving.lanes.exit_status = code
        raise StoppedExit(code)

    # -- small parts --------------------------------------------------------------------------------------------------

    def tell(self, event: str, **fields: Any) -> None:
        """Emit an event of this rank."""
        self.events.emit(event, **fields)

    def _alive(self) -> Saving:
        if self._saving is None:
            raise RuntimeError("call restore() before the first boundary, and nothing after close()")
        return self._saving

    def _started(self) -> Start:
        if self._start is None:
            raise RuntimeError("the controller is closed")
        return self._start

    def _attempt(self) -> AttemptLog:
        if self._log is None:
            raise RuntimeError("call restore() first")
        return self._log
