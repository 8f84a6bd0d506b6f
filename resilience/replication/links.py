"""Bulk transfers over a gloo group, such that a peer's death is noticed and no wait is unbounded.

A gloo receive that is being filled does not notice that its peer was killed, and a timed-out wait closes the whole
group. So: one thread blocks in the waits that we ask for, a *canary* per peer (a receive that is fed only when the peer
leaves) fails as soon as the peer's process is gone, and the caller waits for whichever comes first: the transfer, the
canary, or the end of its patience (a heart that stands still; or one that beats for long while nothing moves). A group
that failed is left behind with its threads, which end when the other side closes too; what it was receiving into must
not be used again.

Who leaves in peace feeds the canaries of its peers, and each answers by feeding the leaver's as soon as nothing of the
two is under way: so a close takes a round trip, whatever the peers do next.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final

import torch

from resilience.errors import PeerLostError
from resilience.replication.communicator import Transfer
from resilience.replication.liveness import Heartbeats, Vigil

__all__ = ["GlooLinks"]

_CANARY_TAG, _NEVER_TAG = 9, 10
_UNBOUNDED = timedelta(days=30)
_TOKEN_S: Final = 5.0  # for the one word that says farewell; the peer's receive of it is always posted
_LONGEST_LOOK_S: Final = 0.5
_LEFT_S: Final = 1.0  # what a peer sent before its farewell arrives before it, and needs no more than to be noticed
_FAR: Final = float("inf")


@dataclass
class _Pending:
    work: Any
    content: torch.Tensor  # keeps the memory alive as long as gloo may touch it
    peer: int
    done: bool = False
    error: str = ""
    asked: bool = False


class GlooLinks:
    """The links of one group. Used by one thread at a time."""

    def __init__(
        self, group: Any, members: tuple[int, ...], rank: int, hearts: Heartbeats,
        now: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._group: Any | None = group
        self._members = members
        self._peers = [peer for peer in members if peer != rank]
        self._hearts = hearts
        self._look_s = min(_LONGEST_LOOK_S, hearts.timeout_s / 16)
        self._now = now
        self._changed = threading.Condition()
        self._failure = ""
        self._lost: int | None = None
        self._under_way: Counter[int] = Counter()  # transfers by peer that were posted and not yet waited for
        self._left: dict[int, float] = {}  # since when
        self._farewell: set[int] = set()  # peers whose canary was fed
        self._words = threading.Lock()  # nobody takes leave while the group is being aborted, or after
        self._aborted = False
        self._asked: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._waiter = threading.Thread(target=self._wait_in_turn, name="resilience-links", daemon=True)
        self._waiter.start()
        self._canaries: list[threading.Thread] = []
        for peer in self._peers:
            content = torch.zeros(1, dtype=torch.int64)
            watch = _Pending(group.recv([content], members.index(peer), _CANARY_TAG), content, peer)
            canary = threading.Thread(
                target=self._watch, args=(watch, group), name=f"resilience-canary-{peer}", daemon=True
            )
            canary.start()
            self._canaries.append(canary)

    def send(self, content: torch.Tensor, peer: int, tag: int) -> _Pending:
        return self._post(content, peer, lambda group, index: group.send([content], index, tag))

    def receive(self, content: torch.Tensor, peer: int, tag: int) -> _Pending:
        return self._post(content, peer, lambda group, index: group.recv([content], index, tag))

    def wait(self, transfer: Transfer) -> None:
        if not isinstance(transfer, _Pending):
            raise TypeError(f"{transfer!r} is no transfer of these links")
        if not transfer.asked:
            transfer.asked = True
            self._asked.put(transfer)
        what = f"link among ranks {list(self._members)}"
        began = self._now()
        with Vigil(self._hearts, (transfer.peer,), what, self._now, stalls=True) as vigil, self._changed:
            while not transfer.done:
                if self._failure:
                    raise self._error()
                self._changed.wait(self._look_s)
                if not transfer.done and self._now() - max(began, self._left.get(transfer.peer, _FAR)) > _LEFT_S:
                    self._fail(f"rank {transfer.peer} has left", transfer.peer)
                    continue
                try:
                    vigil.check()
                except PeerLostError as error:
                    self._fail(str(error), transfer.peer)
                    raise PeerLostError(str(error), rank=transfer.peer) from None
        if transfer.error:
            raise PeerLostError(f"{what}: {transfer.error}", rank=transfer.peer)

    def close(self, *, failed: bool = False, linger_s: float = 10.0) -> None:
        """End the group. Not collective: each side tells its peers, or is noticed.

        `failed`: the peers stop waiting for what is still on its way. Else lingers until they have answered: a thread
        left in a receive when the interpreter ends would abort the process.
        """
        with self._changed:
            group, self._group = self._group, None
            self._changed.notify_all()
        if group is None:
            return
        failed = failed or bool(self._failure)
        if not failed:
            for peer in self._peers:
                self._take_leave(group, peer)
            deadline = self._now() + linger_s
            for canary in self._canaries:
                canary.join(timeout=max(0.0, deadline - self._now()))
        with self._changed:
            self._failure = self._failure or "closed"
            self._changed.notify_all()
        self._asked.put(None)
        if failed or (linger_s and any(canary.is_alive() for canary in self._canaries)):
            self._close_pairs(group)
        with self._words:
            self._aborted = True
            group.abort()

    @property
    def lingers(self) -> bool:
        """Whether a thread of it has not ended: one waits for a peer to leave, or is about to end."""
        return any(thread.is_alive() for thread in (*self._canaries, self._waiter))

    def join(self, bound_s: float) -> None:
        """After `close`: until its threads have ended, at most so long. The interpreter must not end before them."""
        deadline = self._now() + bound_s
        for thread in (*self._canaries, self._waiter):
            thread.join(timeout=max(0.0, deadline - self._now()))

    def _take_leave(self, group: Any, peer: int) -> None:
        """Let the peer's canary end in peace; once, whoever takes leave first."""
        with self._words:
            if peer in self._farewell or self._aborted:
                return
            self._farewell.add(peer)
            try:
                token = torch.ones(1, dtype=torch.int64)
                group.send([token], self._members.index(peer), _CANARY_TAG).wait(timedelta(seconds=_TOKEN_S))
            except RuntimeError:
                return  # it went first

    def _close_pairs(self, group: Any) -> None:
        """Wake our own threads and the peers' canaries: aborting a group does neither, a wait that times out does."""
        for peer in self._peers:
            try:
                nothing = torch.zeros(1, dtype=torch.int64)
                group.recv([nothing], self._members.index(peer), _NEVER_TAG).wait(timedelta(milliseconds=1))
            except RuntimeError:
                continue
        for thread in (*self._canaries, self._waiter):
            if thread is not threading.current_thread():
                thread.join(timeout=1.0)

    def _post(self, content: torch.Tensor, peer: int, post: Callable[[Any, int], Any]) -> _Pending:
        with self._changed:
            if self._group is None or self._failure:
                raise self._error()
            if peer in self._left:
                raise PeerLostError(f"link to rank {peer}: it has left", rank=peer)
            self._under_way[peer] += 1
            try:
                return _Pending(post(self._group, self._members.index(peer)), content, peer)
            except RuntimeError as error:
                raise PeerLostError(f"link to rank {peer}: {error}", rank=peer) from error

    def _error(self) -> PeerLostError:
        return PeerLostError(f"link among ranks {list(self._members)}: {self._failure or 'closed'}", rank=self._lost)

    def _fail(self, why: str, peer: int) -> None:
        """Nothing more goes over these links. The first reason stays."""
        if not self._failure:
            self._failure, self._lost = why, peer
        self._changed.notify_all()

    def _wait_in_turn(self) -> None:
        while (transfer := self._asked.get()) is not None:
            error = ""
            try:
                transfer.work.wait(_UNBOUNDED)
            except RuntimeError as raised:
                error = str(raised)
            with self._changed:
                transfer.error, transfer.done = error, True
                self._under_way[transfer.peer] -= 1
                if error:
                    self._fail(error, transfer.peer)
                self._changed.notify_all()

    def _watch(self, canary: _Pending, group: Any) -> None:
        peer = canary.peer
        try:
            canary.work.wait(_UNBOUNDED)
        except RuntimeError:
            with self._changed:
                self._fail(f"rank {peer} is gone", peer)
            return
        # fed: the peer leaves in peace. What it sent may still be on its way to a waiter here, so nothing has failed;
        # a receive that it will never feed is given up by who waits for it
        with self._changed:
            self._left[peer] = self._now()
            self._changed.wait_for(lambda: self._failure or self._group is None or self._under_way[peer] <= 0)
        self._take_leave(group, peer)
