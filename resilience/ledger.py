"""What this start knows of its saves, as all ranks agree: speak and hear at boundaries, act on what became known.

Every rank holds an equal book of saves and changes it only by what was exchanged. What is local to a rank (a copy that
fails, a full disk) becomes a report that the next exchange carries.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection

from resilience.config import CheckpointConfig, ResiliencyConfig
from resilience.errors import EvictedError, SaveFailedError
from resilience.lookout import Lookout
from resilience.planning.book import Book, Change, unsettled
from resilience.planning.cadence import best_interval
from resilience.planning.control import ControlAgreement, ControlReport
from resilience.planning.inventory import SaveId
from resilience.planning.patience import STILL_BOUNDS
from resilience.planning.schedule import Due, due_at
from resilience.replication.conversation import Conversation
from resilience.runtime.clock import Clock
from resilience.saving import Saving
from resilience.saving.progress import Stillness

__all__ = ["Ledger"]

_LONGEST_CADENCE = 10  # `cadence="auto"` goes up to this many times the configured interval
_LOOKS_PER_INTERVAL = 4


class Ledger:
    """The agreed side of one start. Used by the training thread."""

    def __init__(
        self,
        saving: Saving,
        conversation: Conversation,
        book: Book,
        checkpoint: CheckpointConfig,
        resiliency: ResiliencyConfig,
        clock: Clock,
        tell: Callable[..., None],
        requests: set[str],
        lookout: Lookout,
    ) -> None:
        """`requests`: what this rank asks for and has not yet spoken of; others add to it, from any thread."""
        self._saving = saving
        self._conversation = conversation
        self._checkpoint = checkpoint
        self._resiliency = resiliency
        self._clock = clock
        self._tell = tell
        self._requests = requests
        self._lookout = lookout
        self._set_interval(checkpoint.non_persistent_save_interval)
        self.book = book
        self._pruned: Book | None = None  # the newest book of which nothing was to be deleted
        self.iteration = 0  # finished on this rank
        self.heard: set[str] = set()  # of any rank, agreed and not yet acted on
        self.parted = False  # some rank's loader has ended: no exchange any more
        self.failed_saves = 0
        self.failed_at: set[int] = set()
        self.persistent_at: set[int] = set()  # the newest iteration that reached `save`, as all ranks know
        self.stalls: deque[float] = deque(maxlen=1000)
        self.step_s = 0.0  # the latest step's duration, the boundary excluded

    def speak(self, *, leaving: bool = False, last: bool = False, idle_us: int = 0) -> None:
        """Start an exchange: what this rank has to say. Collected at the next boundary."""
        slots = self.book.slots()
        requests = self._take_requests()
        replicas = self._saving.replicas
        report = ControlReport(
            iteration=self.iteration,
            stop="stop" in requests,
            save_non_persistent="non_persistent" in requests,
            save_persistent="persistent" in requests,
            leaving=leaving,
            last=last,
            epoch_wanted=replicas.epoch_wanted() if replicas is not None else 0,
            step_us=int(self.step_s * 1e6),
            stall_us=int(self.stalls[-1] * 1e6) if self.stalls else 0,
            idle_us=idle_us,
            failures=self.failed_saves,
            saves=self._saving.board.reports(slots),
        )
        self._conversation.speak(report, slots)

    def _take_requests(self) -> Collection[str]:
        """What this rank has not yet spoken of; "save" is of the cheapest kind that is configured."""
        if not self._requests:
            return ()
        requests = set(self._requests)  # others may add to it meanwhile
        self._requests -= requests
        if "save" in requests:
            kind = self._checkpoint.non_persistent_ckpt_type
            requests.add("persistent" if kind is None else "non_persistent")
        return requests

    def collect(self) -> ControlAgreement | None:
        """What all ranks agreed in the exchange under way, if any; acts on it. Requests wait until a save is due."""
        heard = self._conversation.hear()
        if heard is None:
            return None
        agreed, slots = heard
        self.parted = agreed.leaving
        self.heard |= agreed.requests
        self.book, changes = self.book.agree(agreed, slots)
        if self._saving.replicas is not None:
            self._saving.replicas.set_epoch(agreed.epoch_wanted)
        for change in changes:
            self._note(change)
        if self.book is not self._pruned:
            doomed = self.book.deletions(self._resiliency.keep_last)
            self.delete(doomed)
            self._pruned = None if doomed else self.book
        self._adapt(agreed)
        self._look_out(agreed, bool(changes))
        return agreed

    def settle(self) -> str:
        """Until no save is in the making. Collective; "" if they are settled.

        Once nothing moved on any rank for longer than any peer is waited for: which saves wait for what, on all ranks.
        """
        self.join()
        saving, stillness = self._saving, Stillness(self._clock.now)
        bound_s = STILL_BOUNDS * self._resiliency.exchange_timeout_s
        while not self.parted:
            saving.lanes.wait_saves(1.0)
            idle_s = stillness.seconds(saving.progress(self.book.slots()))
            if not self._conversation.under_way:
                self.speak(idle_us=int(idle_s * 1e6))
            agreed = self.collect()
            if self.book.settled() or agreed is None:
                return ""
            if agreed.idle_us > bound_s * 1e6:
                return f"No save moved for {bound_s:g} s: {unsettled(self.book, saving.lanes.running())}."
        return ""

    def join(self) -> None:
        """Before the state may change: what is still being copied of it. What that cost is part of the save's stall."""
        waited_s = self._saving.join()
        if waited_s and self.stalls:
            self.stalls[-1] += waited_s

    def settle_or_tell(self) -> None:
        """Before an end: what does not settle is told, and the end comes all the same."""
        stuck = self.settle()
        if stuck:
            self._tell("warning", what=stuck, advice="")

    def due(self, *, last: bool) -> Due:
        """What is due here; takes up what was asked for."""
        heard, self.heard = self.heard, set()
        return due_at(
            self.iteration,
            save_interval=self._checkpoint.save_interval,
            non_persistent_interval=self._interval,
            requested_non_persistent="non_persistent" in heard,
            requested_persistent="persistent" in heard,
            stop_requested="stop" in heard,
            last=last,
            save_set=self._checkpoint.save is not None,
            non_persistent_set=self._checkpoint.non_persistent_ckpt_type is not None,
        )

    def delete(self, saves: tuple[SaveId, ...]) -> None:
        """The job decided to delete `saves`."""
        if saves:
            self.book = self.book.without(saves)
            for save in saves:
                self._saving.delete(save)

    def make_room(self) -> str:
        """Delete until an arena is free for one more save; why there is none, "" if there is."""
        while not self._saving.room(self.book):
            helps = self._saving.deletion_makes_room(self.book)
            doomed = self.book.deletions(self._resiliency.keep_last, need_one=True) if helps else ()
            if not doomed:
                return "all arenas hold saves that are in the making or must not be deleted"
            self.delete(doomed)
        return ""

    def close(self) -> None:
        self._conversation.close()

    def _note(self, change: Change) -> None:
        """Act on what became known of one save."""
        saving, iteration = self._saving, change.save.iteration
        tier = saving.tier_of(change)
        if change.what in ("failed", "persistent_failed"):
            self.failed_saves += 1
            self.failed_at.add(iteration)
            error = saving.error_of(change)
            saving.plan_anew()
            told = error or "it failed on another rank"
            self._tell("save_failed", iteration=iteration, tier=tier, error=told, elsewhere=not error)
            if change.what == "persistent_failed" and saving.drain.evicted:
                raise EvictedError(saving.drain.evicted)
            if self._resiliency.on_save_failure == "raise":
                raise SaveFailedError(f"the save of iteration {iteration} failed: {error or 'on another rank'}")
            return
        saving.certify(change)
        self._lookout.note(change, tier)
        if change.what == "persistent" and tier == "persistent":
            self.persistent_at = {iteration}
        if change.what in ("complete", "persistent"):
            self._tell("complete", iteration=iteration, generation=change.save.generation, tier=tier)

    def _adapt(self, agreed: ControlAgreement) -> None:
        """`cadence="auto"`: the interval that loses least, from the slowest rank's step and stall."""
        wished, mtbf_hours = self._checkpoint.non_persistent_save_interval, self._resiliency.mtbf_hours
        if self._resiliency.cadence != "auto" or wished is None or mtbf_hours is None:
            return
        if agreed.stall_us == 0 or agreed.step_us == 0:
            return  # nothing measured yet
        self._set_interval(best_interval(
            save_s=agreed.stall_us / 1e6, step_s=agreed.step_us / 1e6, mtbf_s=mtbf_hours * 3600,
            longest_steps=_LONGEST_CADENCE * wished,
        ))  # fmt: skip

    def _set_interval(self, interval: int | None) -> None:
        """Between non-persistent saves, in steps."""
        self._interval = interval
        intervals = [every for every in (interval, self._checkpoint.save_interval) if every is not None]
        self._shortest = min(intervals, default=None)  # of both kinds
        self._look_every = max(1, (self._shortest or 1) // _LOOKS_PER_INTERVAL)

    def _look_out(self, agreed: ControlAgreement, changed: bool) -> None:
        """Is the job protected, are saves too far apart? From what all ranks agreed on, so that all find the same.

        Asked when a save `changed`, and a few times an interval.
        """
        if changed or agreed.iteration % self._look_every == 0:
            step_s, save_s = agreed.step_us / 1e6, agreed.stall_us / 1e6
            self._lookout.look(agreed.iteration, self._shortest, step_s=step_s, save_s=save_s)
