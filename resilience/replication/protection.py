"""What happens to a save in the background: hash, agree on equality, commit, exchange with the clique, commit replicas.

Runs in one lane, so that every rank goes through the agreed saves in the same order. Whatever fails here fails this
save, is told to the board (from where the next control exchange takes it to all ranks), and leaves nothing that can be
elected.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from resilience.errors import ResilienceError
from resilience.planning.control import SlotReport
from resilience.planning.inventory import Kept, SaveId
from resilience.planning.travel import Range
from resilience.replication.clique import ExchangeBrokenError, Offer
from resilience.replication.communicator import Agreements
from resilience.replication.redundancy import Redundancy, UnequalCopiesError
from resilience.runtime.threads import SYSTEM_THREADS, Threads
from resilience.snapshot.arena import Arena
from resilience.snapshot.copying import DONE, Copy
from resilience.snapshot.equality import Sample
from resilience.snapshot.twins import Twin
from resilience.stores.digest import SegmentedDigest, segments
from resilience.stores.keeper import ShardKeeper

__all__ = ["UNEQUAL", "UNHEALTHY", "Board", "Protection", "SaveJob"]

Tell = Callable[..., None]

UNEQUAL: Final = "an item that should be equal on all data-parallel ranks differs; the next save finds out which"
UNHEALTHY: Final = "the rank says that its state is not healthy"


@dataclass(frozen=True)
class SaveJob:
    """One agreed save on this rank. `arena` None: the snapshot failed here, and the others must learn of it."""

    save: SaveId
    arena: Arena | None
    sample: Sample | None
    split: bool
    healthy: bool = True
    error: str = ""
    layout_id: int = 0  # of the arena, and what of it a holder that composed the others' bytes needs
    rest: tuple[Range, ...] = ()
    twins: dict[int, Twin] = field(default_factory=dict)  # by owner: replicas that this rank composed
    copy: Copy = DONE  # of the arena and the twins, which are not to be read before it is over


class Board:
    """How far each outstanding save has come on this rank; written by the lanes, read at boundaries."""

    def __init__(self, threads: Threads = SYSTEM_THREADS) -> None:
        self._guard = threads.condition()
        self._reports: dict[SaveId, SlotReport] = {}
        self._errors: dict[SaveId, str] = {}

    def report(self, report: SlotReport, error: str = "") -> None:
        with self._guard:
            self._reports[report.save] = report
            if error:
                self._errors[report.save] = error

    def reports(self, slots: Sequence[SaveId]) -> tuple[SlotReport, ...]:
        if not slots:
            return ()
        with self._guard:
            return tuple(self._reports[slot] for slot in slots if slot in self._reports)

    def error(self, slot: SaveId) -> str:
        with self._guard:
            return self._errors.get(slot, "")

    def drop(self, slots: Sequence[SaveId]) -> None:
        with self._guard:
            for slot in slots:
                self._reports.pop(slot, None)
                self._errors.pop(slot, None)


class Protection:
    """The background life of saves on this rank."""

    def __init__(
        self,
        keeper: ShardKeeper,
        group: Agreements,
        board: Board,
        tell: Tell,
        now: Callable[[], float],
        nodes: Sequence[str] = (),
    ) -> None:
        """`group`: the data-parallel group, used by this lane alone. `nodes`: of each rank, for what is told."""
        self._keeper = keeper
        self._group = group
        self._board = board
        self.tell = tell
        self._now = now
        self._nodes = tuple(nodes)
        self._exchange: Redundancy | None = None
        self.replicating = False  # whether replicas are wanted at all (and not only possible right now)
        self.broken = False  # the clique's group is down: a new epoch is wanted
        self._doubt = ""  # what a composed replica showed: the next save fails, and the one after it finds out more

    def connect(self, exchange: Redundancy | None) -> None:
        """Use a new epoch's exchange from here on."""
        if self._exchange is not None:
            self._exchange.close(failed=self.broken)
        self._exchange = exchange
        self.broken = exchange is None and self.replicating

    def run(self, job: SaveJob) -> None:
        """Take one save through all its steps."""
        spoiled = job.copy.wait()
        if spoiled:
            self._discard_twins(job)  # which are as bad; the others' shards come whole
        began, before = self._now(), self._traffic
        attempt = _Attempt(self, job, spoiled=spoiled)
        try:
            if self._exchange is not None and self._exchange.settles_first:
                attempt.settle()
            missing = self._swap(job, attempt, attempt.lacks)
            attempt.settle()  # whatever became of the link: the group's agreement and our own commit happen once
        except Exception as error:
            self._fail(job, repr(error))  # a mistake of ours: the job must hear "failed", or it waits for this save
            raise
        else:
            if attempt.error:
                self._fail(job, attempt.error)
            else:
                self._finish(job, began, before, missing)
        finally:
            self._discard_twins(job)  # that no exchange took charge of
            if job.arena is not None:
                self._keeper.unpin(job.arena)

    def _discard_twins(self, job: SaveJob) -> None:
        for owner, twin in job.twins.items():
            self._keeper.discard(owner, twin.slot, reusable=True)
        job.twins.clear()

    def take_doubt(self) -> str:
        """Once: why the save that comes next must fail."""
        doubt, self._doubt = self._doubt, ""
        return doubt

    def _fail(self, job: SaveJob, error: str) -> None:
        self._board.report(SlotReport(job.save, "failed", failed=True, settled=True), error)

    def protect_again(
        self, save: SaveId, arena: Arena | None, digest: str, lacks: Callable[[Kept], bool], split: bool
    ) -> None:
        """After a retrieval: one exchange of a save that is committed already, for those who lack something of it.

        `arena` None: nobody lacks what this rank could send. `lacks`: what this rank is still to have.
        """
        attempt = _Attempt(self, SaveJob(save, None, None, split), committed=digest)
        missing = self._swap(SaveJob(save, arena, None, split), attempt, lacks)
        if missing:
            self.tell("warning", what=f"iteration {save.iteration} is not fully protected again: {missing}", advice="")
        else:
            tier = self._keeper.store.tier
            self.tell("protected", iteration=save.iteration, generation=save.generation, tier=tier, seconds=0.0)

    def close(self, *, failed: bool) -> None:
        if self._exchange is not None:
            self._exchange.close(failed=failed or self.broken)
            self._exchange = None

    def _swap(self, job: SaveJob, attempt: _Attempt, lacks: Callable[[Kept], bool]) -> str:
        """The exchange; returns why something is missing, "" if nothing is."""
        if not self.replicating:
            return ""
        if self._exchange is None or self.broken:
            return "the link to the clique is down"
        arena = job.arena if attempt.sendable else None
        offer = Offer(job.save, arena, attempt.digest, job.layout_id, job.rest, job.twins)
        try:
            return "; ".join(self._exchange.protect(offer, lacks, split=job.split))
        except ExchangeBrokenError as error:
            self.broken = True
            return self._tell_down(job.save, error)
        except UnequalCopiesError as error:
            self._doubt = UNEQUAL
            return str(error)

    def _tell_down(self, save: SaveId, error: ExchangeBrokenError) -> str:
        """Say who was given up and how far its bytes had come; returns why the save is not protected."""
        peer = error.rank
        if peer is None:
            self.tell("replication_down", iteration=save.iteration, error=str(error))
            return str(error)
        node = self._nodes[peer] if peer < len(self._nodes) else ""
        why = (
            f"rank {peer} on node {node} was given up after {error.received_bytes} of {error.expected_bytes} bytes "
            f"from it and at least {error.sent_bytes} of {error.offered_bytes} bytes to it: {error}"
        )
        self.tell(
            "replication_down", iteration=save.iteration, error=why, peer=peer, peer_node=node,
            received_bytes=error.received_bytes, expected_bytes=error.expected_bytes,
            sent_bytes=error.sent_bytes, offered_bytes=error.offered_bytes,
        )  # fmt: skip
        return why

    @property
    def _traffic(self) -> tuple[int, int]:
        return (0, 0) if self._exchange is None else self._exchange.traffic

    def _finish(self, job: SaveJob, began: float, before: tuple[int, int], missing: str) -> None:
        seconds = self._now() - began
        cost = int(seconds * 1e6)
        tier, iteration = self._keeper.store.tier, job.save.iteration
        if missing:
            self._board.report(SlotReport(job.save, "primary", settled=True, cost_us=cost), missing)
            self.tell("warning", what=f"save of iteration {iteration} is not protected: {missing}", advice="")
            return
        self._board.report(SlotReport(job.save, "protected", settled=True, cost_us=cost))
        sent, spared = (now - then for now, then in zip(self._traffic, before, strict=True))
        self.tell(
            "protected", iteration=iteration, generation=job.save.generation, tier=tier, seconds=seconds,
            sent_bytes=sent, spared_bytes=spared,
        )  # fmt: skip

    def commit_primary(self, job: SaveJob, digest: str) -> None:
        if job.arena is None:
            raise ValueError("a failed snapshot cannot be committed")
        self._keeper.commit(job.save, self._keeper.rank, job.arena, digest, role="primary", split=job.split)
        self._board.report(SlotReport(job.save, "primary"))
        self.tell("committed", iteration=job.save.iteration, tier=self._keeper.store.tier)

    @property
    def group(self) -> Agreements:
        return self._group

    @property
    def keeper(self) -> ShardKeeper:
        return self._keeper


class _Attempt:
    """One run of a job: the steps that must happen once, whichever way the exchange goes."""

    def __init__(self, protection: Protection, job: SaveJob, committed: str = "", spoiled: str = "") -> None:
        """`spoiled`: why the arena, which was to hold the snapshot, does not."""
        self._protection = protection
        self._job = job
        self._committed = committed
        self._voted = bool(committed)
        self._digest: str | None = committed or None
        self.error = ""
        self._spoiled = spoiled
        self.sendable = bool(committed) or (job.arena is not None and job.healthy and not spoiled)

    def lacks(self, kept: Kept) -> bool:
        """Whether this rank is still to have it."""
        return not self._protection.keeper.holds(self._job.save, kept)

    def digest(self) -> str | None:
        """Hash this rank's shard, vote with the data-parallel group, commit where that is quick; None if void."""
        if not self._voted:
            self._voted = True
            self._vote()
            if self._digest is not None and self._protection.keeper.file_is_arena:
                self._commit()
        return self._digest

    def settle(self) -> None:
        """Finish what is left: the vote if the exchange never came to it, the commit if it takes a slow write."""
        digest = self.digest()
        if digest is not None and not self._committed:
            self._commit()

    def _vote(self) -> None:
        job, group = self._job, self._protection.group
        problem = job.error or self._spoiled or ("" if job.healthy else UNHEALTHY) or self._protection.take_doubt()
        digest = None
        if job.arena is not None and not self._spoiled:
            hasher = SegmentedDigest(self._protection.keeper.store.seal.digest_algorithm)
            for start, stop in segments(job.arena.nbytes):
                hasher.add(job.arena.mapped.view[start:stop])
            digest = hasher.value()
        failed = bool(problem) or digest is None
        seen = job.sample.fingerprint() if job.sample is not None and not self._spoiled else 0
        try:
            any_failed, highest, lowest = group.maximum([int(failed), seen, -seen])
        except ResilienceError as error:
            any_failed, highest, lowest = 1, 0, 0
            problem = problem or str(error)
        if any_failed:
            problem = problem or "another rank of the data-parallel group failed it"
        elif highest != -lowest:
            problem = UNEQUAL
        self.error = problem
        self._digest = None if problem else digest

    def _commit(self) -> None:
        try:
            self._protection.commit_primary(self._job, self._digest or "")
            self._committed = self._digest or ""
        except OSError as error:
            self.error, self._digest = str(error), None
