"""What a save does while training goes on: hash, exchange with the clique, agree with all ranks, commit.

One thread, in the order of the saves. It talks over groups of its own, so that it never gets into the way of training's
collectives. Nothing is committed before every rank of the job has told that it has its shard whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from resilience.errors import CorruptCopyError, PeerLostError, StoreError, in_short
from resilience.integrations.nvrx.directory import RankDirectory, Shard
from resilience.planning.inventory import SaveId
from resilience.planning.typed_json import from_json
from resilience.planning.wire import to_json
from resilience.replication.clique import CliqueExchange, Offer, Received
from resilience.replication.communicator import Agreements, Communicator
from resilience.replication.pace import Pace
from resilience.runtime.worker import Lane
from resilience.snapshot.arena import Arena
from resilience.stores.digest import digest_of

__all__ = ["Background", "SaveJob"]

_LOG = logging.getLogger(__name__)

#: Gives a whole shard its name: `(arena, iteration, owner)`.
Write = Callable[[Arena, int, int], None]


@dataclass
class SaveJob:
    """One save of this rank. `arena` None: it failed already, and `error` says how."""

    iteration: int
    number: int  # of the saves of this manager; equal on all ranks
    arena: Arena | None
    error: str = ""
    done: threading.Event = field(default_factory=threading.Event)
    begun: dict[int, Arena] = field(default_factory=dict)  # files by owner, which are not committed yet
    unprotected: str = ""  # why a copy is missing
    given_up: bool = False  # nobody waits for it any more: it is not to be committed


@dataclass(frozen=True)
class _Word:
    """What a rank tells of its shard. `epoch`: of its links, one more than it used where those broke."""

    digest: str
    error: str
    epoch: int


class Background:
    """This rank's thread and its links. All ranks submit the same jobs in the same order."""

    def __init__(
        self,
        communicator: Communicator,
        group: Agreements,
        directory: RankDirectory,
        members: Sequence[int],
        write: Write,
    ) -> None:
        """`group`: all ranks, used by this thread alone."""
        self._communicator = communicator
        self._group = group
        self._directory = directory
        self._members = tuple(members)
        self._others = tuple(rank for rank in members if rank != communicator.rank)
        self._write = write
        self._epoch = 0
        self._exchange: CliqueExchange | None = None
        self._lane = Lane("local-saves", lambda what, error: _LOG.error("%s: %s", what, error, exc_info=error))

    def save(self, job: SaveJob) -> None:
        """Carry it out; `job.done` is set whatever becomes of it, and `job.error` says why it came to nothing."""
        self._lane.submit(f"save of iteration {job.iteration}", lambda: self._save(job))

    def protect_again(self, iteration: int, save: str, number: int, open_own: Callable[[], Arena], digest: str) -> None:
        """After a load: give the clique this rank's shard once more, and take the others'. By all its members."""
        what = f"copies of iteration {iteration}"
        self._lane.submit(what, lambda: self._protect_again(iteration, save, number, open_own, digest))

    def later(self, what: str, task: Callable[[], None]) -> None:
        """Local work that nobody waits for."""
        self._lane.submit(what, task)

    def wait(self, bound_s: float) -> bool:
        """Until all of it is done; whether it is."""
        return self._lane.wait(bound_s)

    def close(self, bound_s: float) -> None:
        self._lane.close(bound_s)
        if self._exchange is not None:
            self._exchange.close()

    def _save(self, job: SaveJob) -> None:
        try:
            self._carry_out(job)
        except Exception as error:  # noqa: BLE001 - whatever it is, all ranks must hear of it
            job.error = job.error or f"{type(error).__name__}: {error}"
        finally:
            self._discard(job)
            job.done.set()

    def _discard(self, job: SaveJob) -> None:
        """What was begun and not committed. The file of this rank's own shard goes last: somebody may wait for it."""
        for owner in sorted(job.begun, key=lambda owner: owner == self._communicator.rank):
            try:
                self._directory.discard(job.begun[owner])
            except OSError as error:
                _LOG.warning("iteration %d: %s", job.iteration, error)
        job.begun.clear()

    def _carry_out(self, job: SaveJob) -> None:
        digest = ""

        def own_digest() -> str | None:
            nonlocal digest
            if job.arena is not None and not digest:
                digest = digest_of(job.arena.mapped.view)
            return digest or None

        received = self._swap(job, own_digest)
        own_digest()
        words = [
            from_json(_Word, each, f"rank {other}'s word on its shard")
            for other, each in enumerate(self._group.gather(to_json(_Word(digest, job.error, self._epoch))))
        ]
        self._epoch_after([words[member].epoch for member in self._members])
        failed = [f"rank {other}: {word.error}" for other, word in enumerate(words) if word.error]
        if failed:
            job.error = "; ".join(failed[:4])
            return
        self._commit(job, _name_of(job.iteration, words), len(words), received, digest)

    def _commit(self, job: SaveJob, save: str, world: int, received: Sequence[Received], digest: str) -> None:
        rank = self._communicator.rank
        self._directory.prepare(job.iteration, save)
        shards = {one.owner: Shard(one.nbytes, one.digest) for one in received}
        for one in received:
            self._write(one.slot, job.iteration, one.owner)
            self._release(job, one.owner)
        if job.arena is None:
            raise ValueError("a save that failed is not committed")
        shards[rank] = Shard(job.arena.nbytes, digest)
        self._write(job.arena, job.iteration, rank)
        if job.given_up:
            raise StoreError(f"iteration {job.iteration} was given up before it could be committed.")
        self._directory.commit(job.iteration, save, world, shards)
        self._release(job, rank)

    def _release(self, job: SaveJob, owner: int) -> None:
        """A file that has its name is not to be discarded; one that was not written, though asked for, is."""
        arena = job.begun.get(owner)
        if arena is not None and arena.mapped.path == self._directory.shard(job.iteration, owner):
            del job.begun[owner]

    def _swap(self, job: SaveJob, digest: Callable[[], str | None]) -> list[Received]:
        if not self._others:
            return []
        inbox = _Inbox(self._directory, job)
        offer = Offer(SaveId(job.iteration, job.number, ""), job.arena, digest)
        try:
            received, reasons = self._linked().run(offer, inbox)
        except PeerLostError as error:
            self._break()
            job.unprotected = str(error)
            return []
        job.unprotected = "; ".join(f"of rank {owner}: {why}" for owner, why in sorted(reasons.items()))
        return received

    def _linked(self) -> CliqueExchange:
        if self._exchange is None:
            links = self._communicator.links(f"local/{self._epoch}/{min(self._members)}", sorted(self._members))
            pace = Pace(None, time.monotonic, time.sleep)
            self._exchange = CliqueExchange(links, self._communicator.rank, self._others, self._others, pace)
        return self._exchange

    def _break(self) -> None:
        exchange, self._exchange = self._exchange, None
        self._epoch += 1
        if exchange is not None:
            exchange.close(failed=True)

    def _epoch_after(self, epochs: Sequence[int]) -> None:
        """Where one member's links broke, all of the clique meet anew for the next save."""
        if max(epochs) != self._epoch:
            self._break()
            self._epoch = max(epochs)

    def _protect_again(
        self, iteration: int, save: str, number: int, open_own: Callable[[], Arena], digest: str
    ) -> None:
        job = SaveJob(iteration, number, None)
        try:
            job.arena = open_own()
        except (OSError, CorruptCopyError) as error:
            job.error = in_short(error)  # the others are told that there is nothing
        try:
            self._take_copies(job, save, digest)
        finally:
            self._discard(job)
            if job.arena is not None and not job.unprotected:
                job.arena.close()  # a broken link may still read from it

    def _take_copies(self, job: SaveJob, save: str, digest: str) -> None:
        iteration = job.iteration
        received = self._swap(job, lambda: digest if job.arena is not None else None)
        here, shards = self._directory.committed(iteration, save), {}
        self._directory.prepare(iteration, save)
        for one in received:
            if here.get(one.owner) == Shard(one.nbytes, one.digest):
                continue  # it was here already
            self._write(one.slot, iteration, one.owner)
            self._release(job, one.owner)
            shards[one.owner] = Shard(one.nbytes, one.digest)
        self._directory.extend(iteration, save, self._group.size, shards)
        if job.unprotected:
            _LOG.warning("iteration %d is not protected again: %s", iteration, job.unprotected)


@dataclass
class _Inbox:
    """Shards of others land in files of this rank's directory."""

    directory: RankDirectory
    job: SaveJob

    def slot(self, owner: int, nbytes: int) -> Arena:
        arena = self.directory.begin(self.job.iteration, owner, nbytes)
        self.job.begun[owner] = arena
        return arena

    def discard(self, owner: int, slot: Arena, *, reusable: bool) -> None:
        self.job.begun.pop(owner, None)
        self.directory.discard(slot, reusable=reusable)


def _name_of(iteration: int, words: Sequence[_Word]) -> str:
    """What tells this save from another attempt at its iteration: all shards' digests. Of equal content it is equal."""
    told = json.dumps([iteration, [word.digest for word in words]])
    return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()
