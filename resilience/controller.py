"""The order of events at a boundary: hear what all ranks agreed, decide what is due, snapshot, hand over, speak.

Every decision is made from agreed values (the book of saves, the outcome of the last control exchange), so that all
ranks take the same branch; what is local to a rank (a copy that fails, a full disk) becomes a report that the next
exchange carries.
"""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from resilience.announce import announce_start
from resilience.assembly import Start, assemble
from resilience.config import CheckpointConfig, ResiliencyConfig, override_from_env, validate_together, without_effect
from resilience.config.metrics import metrics_target
from resilience.errors import ConfigError, PeerLostError, SaveStuckError, StoppedExit
from resilience.job import make_communicator, node_identity
from resilience.job_facts import job_facts
from resilience.ledger import Ledger
from resilience.lookout import Lookout
from resilience.observe.events import EventLog
from resilience.observe.outlets import attach_outlets
from resilience.planning.format_fit import check_format
from resilience.planning.inventory import AttemptLog, SaveId
from resilience.planning.schedule import Due
from resilience.replication.communicator import Communicator
from resilience.replication.conversation import Conversation
from resilience.reports import Resume, SaveReport
from resilience.requests import take_request
from resilience.runtime.clock import Clock, SystemClock
from resilience.runtime.threads import SYSTEM_THREADS, Threads, uncaught
from resilience.saving import Saving
from resilience.saving.lanes import CLOSE_BOUND_S
from resilience.snapshot.overlap import WatchSteps, refuse_overlap, watch_all
from resilience.state.parallel_layout import ParallelLayout
from resilience.state.training_state import TrainingState
from resilience.stores.filesystem import FileSystem, PosixFileSystem

__all__ = ["ResiliencyController"]


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
        threads: Threads = SYSTEM_THREADS,
        env: Mapping[str, str] = os.environ,
        draw: Callable[[int], str] = secrets.token_hex,
    ) -> None:
        """Not collective by itself. Raises ConfigError for a configuration that cannot work.

        What comes from outside the process comes in here; `draw` draws names of so many random bytes.
        """
        self.state = state
        self.checkpoint = checkpoint if checkpoint is not None else CheckpointConfig()
        self.resiliency = resiliency if resiliency is not None else ResiliencyConfig()
        self.clock: Clock = clock or SystemClock()
        self._fs: FileSystem = filesystem or PosixFileSystem()
        overrides: list[Any] = []
        self._threads, self._env, self._draw = threads, env, draw
        if env.get("RESILIENCE_DRILL") == "1":
            self.checkpoint, self.resiliency, overrides = override_from_env(self.checkpoint, self.resiliency, env)
        self._communicator = communicator or make_communicator(self.resiliency.exchange_timeout_s)
        validate_together(self.checkpoint, self.resiliency, world_size=self._communicator.world_size)
        if self.checkpoint.save is not None or self.checkpoint.non_persistent_ckpt_type == "global":
            check_format(self.checkpoint.ckpt_format, job_facts(state), async_save=self.checkpoint.async_save)
        if self.resiliency.snapshot_mode == "overlapped":
            refuse_overlap(state)
        self.events = self._open_events()
        for override in overrides:
            self.tell("warning", what=str(override), advice="")
        for what, advice in without_effect(self.checkpoint):
            self.tell("warning", what=what, advice=advice)
        self.resumed_from: Resume | None = None
        self.iteration = 0
        self._start: Start | None = None
        self._saving: Saving | None = None
        self._ledger: Ledger | None = None
        self._log: AttemptLog | None = None
        self._requests: set[str] = set()  # of this rank, not yet spoken of
        self._last_saved = -1
        self._sliding = False
        self._skipped_saves = 0
        self._stepped_at: float | None = None
        self._step_told_at = self.clock.now()
        self.tells_every_step = False  # in a drill
        self.before_save: Callable[[], None] = lambda: None  # called when one is about to be taken
        self.close_at_exit: Callable[..., None] | None = None  # of whoever wraps this, and has more to close
        self._unregister_exit: Callable[[], None] = lambda: None

    #: How to hear of the steps that an overlapped snapshot has to be joined before.
    watch_steps: WatchSteps = staticmethod(watch_all)

    # -- start --------------------------------------------------------------------------------------------------------

    def restore(self) -> Resume | None:
        """Elect the newest good save and load it. Collective; once, before the first step.

        Returns what was resumed from, or None for a fresh start. Raises NoUsableSaveError, SourceUnavailableError,
        LayoutMismatchError, CheckpointNotFoundError and others of `resilience.errors`, on all ranks alike.
        """
        layout = self.state.layout
        start = assemble(
            self.checkpoint, self.resiliency, layout, self._communicator, self.clock, self._fs, self.tell, self._env,
            self._threads, self._draw,
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
        self.events.attempt = self._log.name
        self.iteration = resume.iteration if resume is not None else 0
        self.resumed_from = resume
        self.state.train_state.step = self.iteration
        self._saving = Saving(
            start,
            self.state,
            self.checkpoint,
            self.resiliency,
            self._log,
            self.clock,
            self._fs,
            self.tell,
            self.watch_steps,
        )
        book = self._saving.adopt(plan)
        start.restorer.close()
        self._saving.estimate_memory()
        self._ledger = Ledger(
            self._saving, Conversation(start.communicator.control("control", start.job.nodes)), book, self.checkpoint,
            self.resiliency, self.clock, self.tell, self._requests, self._make_lookout(start),
        )  # fmt: skip
        self._ledger.iteration = self.iteration
        # Last of all that registers for the exit, so the first to be called: the others are for what a close leaves.
        self._unregister_exit = self._threads.at_exit(self._at_exit)
        announce_start(
            start, self.state, self._log.generation, resume, plan.notes, plan.decision.reason, self.tell, self._env
        )
        return resume

    # -- boundaries ---------------------------------------------------------------------------------------------------

    def after_step(self, iteration: int, *, last: bool = False) -> SaveReport | None:
        """One boundary: the optimizer stepped, `iteration` steps are finished, no batch was drawn yet. Collective.

        Takes the saves that are due and returns the report of one that was taken. `last`: the loop ends here. Raises
        ConfigError, before anything is asked of other ranks, if `iteration` is not the next one; StoppedExit after a
        requested stop, SaveFailedError with `on_save_failure="raise"`, DivergedRanksError, PeerLostError.
        """
        saving, ledger = self._running()
        if type(iteration) is not int or iteration != self.iteration + 1:
            raise ConfigError(
                f"after_step was called with iteration {iteration!r}; {self.iteration} are finished, so that "
                f"{self.iteration + 1} is expected.",
                advice="Call it once after every optimizer step, and not where gradients are only accumulated.",
            )
        if self._stepped_at is not None:
            ledger.step_s = self.clock.now() - self._stepped_at
        self.iteration = ledger.iteration = iteration
        ledger.join()
        self._tell_step(iteration)
        self.state.train_state.step = iteration
        if not ledger.parted:
            ledger.collect()
        if last and not ledger.parted:  # nothing comes after: what others ask for in this step must be heard now
            ledger.speak(last=True)
            ledger.collect()
        if ledger.parted:
            return None
        due = ledger.due(last=last)
        report = None
        wanted = (due.persistent or due.non_persistent) and iteration != self._last_saved
        if wanted and not last and saving.waits_for_others(due):
            # a rank whose data has ended would not come: hear that now, not in the middle of a collective
            ledger.speak()
            agreed = ledger.collect()
            if agreed is not None and agreed.leaving:
                return None
        if wanted:
            self.before_save()
            report = self._take(iteration, due, final=last or due.stop)
        if due.stop:
            self._stop()
        if not last:
            ledger.speak()
        saving.go()
        self._stepped_at = self.clock.now()
        return report

    def leave(self) -> bool:
        """This rank's data ended before `train_iters`. Collective with whatever boundary the others are at.

        True if it ended on all ranks at once: then the loop is complete, and its last save is taken. Else no rank takes
        a save any more, since this one cannot.
        """
        _, ledger = self._running()
        ledger.join()
        ledger.collect()
        if not ledger.parted:
            ledger.speak(leaving=True)
            agreed = ledger.collect()
            if agreed is not None and agreed.all_leaving:
                ledger.parted = False
                due = ledger.due(last=True)
                if due.persistent and self.iteration not in (0, self._last_saved):
                    self._take(self.iteration, due, final=True)
                return True
        self.tell("warning", what="the data of a rank ended early; nothing is saved any more", advice="")
        return False

    def save(self, iteration: int, kind: str = "persistent") -> SaveReport:
        """Take a save at this boundary, whatever the intervals say. Collective, at a boundary only.

        `kind`: "persistent" or "non_persistent".
        """
        saving, ledger = self._running()
        missing = self.checkpoint.save if kind == "persistent" else self.checkpoint.non_persistent_ckpt_type
        if kind not in ("persistent", "non_persistent") or missing is None:
            raise ConfigError(f"a {kind!r} save was asked for, but none of that kind is configured.")
        if iteration != self.iteration:
            raise ConfigError(
                f"save was called with iteration {iteration!r}, but {self.iteration} are finished.",
                advice="Save at a boundary: right after after_step, with its iteration.",
            )
        ledger.join()
        ledger.collect()
        if iteration == self._last_saved:
            generation = self._attempt().generation
            return SaveReport(
                "persistent" if kind == "persistent" else "non_persistent", iteration, generation, (), 0.0, "skipped", 0
            )
        due = Due(kind == "non_persistent", kind == "persistent", False)
        report = self._take(iteration, due)
        ledger.speak()
        saving.go()
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
        saving, ledger = self._running()
        stuck = ledger.settle()
        if stuck:
            raise SaveStuckError(stuck, advice="Raise exchange_timeout_s if storage or network are that slow.")
        saving.lanes.tidy.wait(CLOSE_BOUND_S)  # certificates and the attempt log tell of them too, for `outcome`

    def finish(self) -> None:
        """The loop completed: settle, note it, and free node memory as configured. Collective."""
        saving, ledger = self._running()
        if self._lacks_last_save(ledger):
            ledger.collect()
            self._take(self.iteration, Due(False, True, False), final=True)
        ledger.settle_or_tell()
        if ledger.book.settled() or ledger.parted:
            saving.afterwards.end("finished", self.iteration)
            self.tell("finished", iteration=self.iteration)
        else:
            saving.afterwards.end("failed", self.iteration)
        start = self._started()
        keep = self.resiliency.keep_after_success or self.checkpoint.save is None
        if not ledger.parted:
            start.setup.barrier()
        if not keep and not ledger.parted and self.iteration in ledger.persistent_at:
            saving.afterwards.free_node_memory()
        elif (
            saving.keeps_on_nodes
            and ledger.book.entries
            and start.job.rank == 0
            and not self.resiliency.keep_after_success
        ):
            what = f"the last saves of run {start.run_id} stay on the nodes: no persistent save holds them."
            self.tell("warning", what=what, advice=f"`resilience prune --forget {start.run_id}` frees them.")

    def _lacks_last_save(self, ledger: Ledger) -> bool:
        """Whether this start resumed from a complete loop whose last persistent save never came to be. Equal on all."""
        resumed = self.resumed_from
        if resumed is None or ledger.parted or self.checkpoint.save is None or self.iteration == self._last_saved:
            return False
        return resumed.iteration == self.iteration > 0 and resumed.tier != "persistent"

    def status(self) -> dict[str, Any]:
        """Where this rank stands: iteration, saves in the making and kept, failures, stalls. Local."""
        ledger = self._ledger
        return {
            "iteration": self.iteration,
            "saves": [
                {"iteration": e.save.iteration, "progress": e.progress, "settled": e.settled, "drain": e.drain}
                for e in (ledger.book.entries if ledger is not None else ())
            ],
            "failed_saves": 0 if ledger is None else ledger.failed_saves,
            "skipped_saves": self._skipped_saves,
            "stall_s": [] if ledger is None else list(ledger.stalls)[-100:],
            "resumed_from": None if self.resumed_from is None else self.resumed_from.iteration,
        }

    @property
    def rank(self) -> int:
        return self._communicator.rank

    def wait_idle(self, bound_s: float) -> None:
        """Until this rank's background work is done, at most `bound_s`. Local."""
        saving, ledger = self._running()
        ledger.join()
        saving.lanes.wait_idle(bound_s)

    def asked_from_outside(self) -> str:
        """What `resilience request` left in this node's directory: "stop", "save" or "". Local; any thread."""
        start = self._start
        return "" if start is None or not start.job.leads_node else take_request(start.stores, self._fs)

    def close(self, *, failed: bool = False) -> None:
        """End threads and groups within a bound; never collective, never takes a snapshot. May be called twice."""
        saving, self._saving = self._saving, None
        ended = saving is None or saving.close(failed=failed)
        if self._ledger is not None:
            self._ledger.close()
        start, self._start = self._start, None
        if start is not None:
            start.release(keep_locks=not ended)
        self.events.close()
        self._unregister_exit()
        self.close_at_exit = None

    def _at_exit(self) -> None:
        """Nobody closed it. A thread that is left in gloo when the interpreter ends would abort that."""
        error = uncaught()
        if error is not None:
            self.tell_exception(error)
        (self.close_at_exit or self.close)(failed=error is not None)

    # -- saving -------------------------------------------------------------------------------------------------------

    def _take(self, iteration: int, due: Due, *, final: bool = False) -> SaveReport:
        """One snapshot for all that is due. Equal decisions on all ranks; the copy itself may fail on some.

        `final`: no boundary follows to which a persistent save could slide.
        """
        saving, ledger = self._running()
        began = self.clock.now()
        attempt = self._attempt()
        save = SaveId(iteration, attempt.generation, attempt.attempt)
        if final and (ledger.book.draining() or not saving.room(ledger.book)):
            ledger.settle_or_tell()  # the last save waits for those before; any other slides or is skipped
        wish = saving.wish(due, draining=ledger.book.draining() > 0)
        reason = "the save before it is still on its way to shared storage"
        full = ledger.make_room() if wish.any else ""
        if full:
            wish, reason = saving.no_wish, full
        if due.persistent and not wish.persistent:
            ledger.heard.add("persistent")  # it slides to the next boundary
        if not wish.any:
            self._skipped_saves += due.non_persistent
            if due.non_persistent or not self._sliding:  # one that slides says so once
                self.tell("save_skipped", iteration=iteration, reason=reason)
            self._sliding = due.persistent
            return saving.report(save, wish, 0.0, "skipped")
        ledger.book = ledger.book.begin(save, non_persistent=wish.on_nodes, drain=wish.drain)
        self._last_saved = iteration
        self._sliding = due.persistent and not wish.persistent
        report = saving.take(save, wish, began)
        ledger.stalls.append(report.stall_s)
        return report

    def _stop(self) -> None:
        """Everything was saved that could be: settle, note it, leave."""
        saving, ledger = self._running()
        start = self._started()
        ledger.settle_or_tell()
        saving.afterwards.end("stopped", self.iteration)
        elastic = "TORCHELASTIC_RUN_ID" in self._env
        code = 0 if elastic else 75
        self.tell(
            "stopped",
            iteration=self.iteration,
            code=code,
            saved=ledger.book.settled() and self.iteration not in ledger.failed_at,
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

    def tell_exception(self, error: BaseException) -> None:
        """What ended the loop; of a peer that was lost also on which node it ran."""
        said, peer = f"{type(error).__name__}: {error}"[:500], {}
        if isinstance(error, PeerLostError) and error.rank is not None and self._start is not None:
            peer = {"peer": error.rank, "peer_node": self._start.job.nodes[error.rank]}
            said = f"{said} Rank {error.rank} runs on node {peer['peer_node']}."
        self.tell("exception", error=said, **peer)

    def _tell_step(self, iteration: int) -> None:
        """In a drill every step of every rank; else about once a second, written by rank 0, for whoever follows."""
        now = self.clock.now()
        if not self.tells_every_step and now - self._step_told_at < 1.0:
            return
        self._step_told_at = now
        emit = self.events.emit if self.tells_every_step or self.rank == 0 else self.events.feed
        emit("step", iteration=iteration)

    def _open_events(self) -> EventLog:
        config, rank = self.resiliency, self._communicator.rank
        node = node_identity(config, self._env)
        directory = None if config.events is None else Path(config.events)
        log = EventLog(directory, node, rank, self.clock, threads=self._threads)
        attach_outlets(
            log, None if config.metrics is None else metrics_target(config.metrics), node=node, rank=rank,
            clock=self.clock, threads=self._threads, env=self._env,
            terminal=sys.stderr if self._threads is SYSTEM_THREADS else None,  # a simulated rank has no terminal
        )  # fmt: skip
        return log

    def _make_lookout(self, start: Start) -> Lookout:
        on_nodes = self.checkpoint.non_persistent_ckpt_type in ("local", "in_memory")
        return Lookout(
            self.tell, begun=self.iteration, replicated=on_nodes and start.topology.replicates,
            mtbf_hours=self.resiliency.mtbf_hours,
        )  # fmt: skip

    def _running(self) -> tuple[Saving, Ledger]:
        if self._saving is None or self._ledger is None:
            raise RuntimeError("call restore() before the first boundary, and nothing after close()")
        return self._saving, self._ledger

    def _started(self) -> Start:
        if self._start is None:
            raise RuntimeError("the controller is closed")
        return self._start

    def _attempt(self) -> AttemptLog:
        if self._log is None:
            raise RuntimeError("call restore() first")
        return self._log
