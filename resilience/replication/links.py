"""Bulk transfers over a gloo group, such that a peer's death is noticed and no wait is unbounded.

A gloo receive that is being filled does not notice that its peer was killed, and a timed-out wait closes the whole
group. So: one thread blocks in the waits that we ask for, a *canary* per peer (a receive that is never fed before the
close) fails as soon as the peer's process is gone, and the caller waits for whichever comes first. A group that failed
is left behind with its threads, which end when the other side closes too; what it was receiving into must not be used
again.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch

from resilience.errors import PeerLostError
from resilience.replication.communicator import Transfer

__all__ = ["GlooLinks"]

_CANARY_TAG, _NEVER_TAG = 9, 10
_UNBOUNDED = timedelta(days=30)


@dataclass
class _Pending:
    work: Any
    content: torch.Tensor  # keeps the memory alive as long as gloo may touch it
    done: bool = False
    error: str = ""
    asked: bool = field(default=False)


class GlooLinks:
    """The links of one group. Used by one thread at a time."""

    def __init__(
        self, group: Any, members: tuple[int, ...], rank: int, timeout_s: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        self._group: Any | None = group
        self._members = members
        self._peers = [peer for peer in members if peer != rank]
        self._timeout_s = timeout_s
        self._now = now
        self._changed = threading.Condition()
        self._failure = ""
        self._asked: queue.SimpleQueue[_Pending | None] = queue.SimpleQueue()
        self._waiter = threading.Thread(target=self._wait_in_turn, name="resilience-links", daemon=True)
        self._waiter.start()
        self._canaries: list[threading.Thread] = []
        for peer in self._peers:
            watch = _Pending(None, torch.zeros(1, dtype=torch.int64))
            watch.work = group.recv([watch.content], members.index(peer), _CANARY_TAG)
            canary = threading.Thread(
                target=self._watch, args=(watch, peer), name=f"resilience-canary-{peer}", daemon=True
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
        deadline = self._now() + self._timeout_s
        with self._changed:
            while not transfer.done:
                left = deadline - self._now()
                if left <= 0:
                    self._failure = self._failure or f"nothing moved for {self._timeout_s:g} s"
                if self._failure:
                    raise PeerLostError(f"link among ranks {list(self._members)}: {self._failure}")
                self._changed.wait(min(left, 1.0))
        if transfer.error:
            raise PeerLostError(f"link among ranks {list(self._members)}: {transfer.error}")

    def close(self, *, failed: bool = False, linger_s: float = 10.0) -> None:
        """End the group. Not collective: each side tells its peers, or is noticed.

        `failed`: the peers stop waiting for what is still on its way. Else lingers until they close too: a thread left
        in a receive when the interpreter ends would abort the process.
        """
        group, self._group = self._group, None
        if group is None:
            return
        failed = failed or bool(self._failure)
        if not failed:
            self._feed_canaries(group)
            deadline = self._now() + linger_s
            for canary in self._canaries:
                canary.join(timeout=max(0.0, deadline - self._now()))
        with self._changed:
            self._failure = self._failure or "closed"
            self._changed.notify_all()
        self._asked.put(None)
        if failed or (linger_s and any(canary.is_alive() for canary in self._canaries)):
            self._close_pairs(group)
        group.abort()

    def _feed_canaries(self, group: Any) -> None:
        """Let the peers' canaries end in peace."""
        token = torch.ones(1, dtype=torch.int64)
        try:
            for peer in self._peers:
                group.send([token], self._members.index(peer), _CANARY_TAG).wait(timedelta(seconds=1))
        except RuntimeError:
            return  # they went first

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
        if self._group is None or self._failure:
            raise PeerLostError(f"link among ranks {list(self._members)}: {self._failure or 'closed'}")
        try:
            return _Pending(post(self._group, self._members.index(peer)), content)
        except RuntimeError as error:
            raise PeerLostError(f"link to rank {peer}: {error}") from error

    def _wait_in_turn(self) -> None:
        while (transfer := self._asked.get()) is not None:
            error = ""
            try:
                transfer.work.wait(_UNBOUNDED)
            except RuntimeError as raised:
                error = str(raised)
            with self._changed:
                transfer.error, transfer.done = error, True
                if error:
                    self._failure = self._failure or error
                self._changed.notify_all()

    def _watch(self, canary: _Pending, peer: int) -> None:
        try:
            canary.work.wait(_UNBOUNDED)
        except RuntimeError:
            with self._changed:
                self._failure = self._failure or f"rank {peer} is gone"
                self._changed.notify_all()
        # fed: the peer closed in peace. What it sent may still be on its way to a waiter here, so nothing has failed;
        # a receive that it will never feed ends when its sockets do
