"""The background threads of one start: which there are, whether they move, and how they end within a bound."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

from resilience.runtime.threads import SYSTEM_THREADS, Threads
from resilience.runtime.worker import Lane

__all__ = ["CLOSE_BOUND_S", "Lanes"]

CLOSE_BOUND_S = 10.0
_FAILED_CLOSE_BOUND_S = 2.0
_IN_GLOO = (
    "resilience-links",
    "resilience-canary",
    "resilience-control",
    "resilience-heartbeat",
    "resilience-liveness",
)


class Lanes:
    """`protect`: saves on nodes. `drain`: to shared storage. `tidy`: certificates, deletions. `reserve`: buffers.

    `copy`, if snapshots are `overlapped`: them.
    """

    def __init__(
        self, tell: Callable[..., None], threads: Threads = SYSTEM_THREADS, *, overlapped: bool = False
    ) -> None:
        self._tell = tell
        self.protect = Lane("protect", self._failed, threads)
        self.drain = Lane("drain", self._failed, threads)
        self.tidy = Lane("tidy", self._failed, threads)
        self.reserve = Lane("reserve", self._failed, threads)
        self.copy = Lane("copy", self._failed, threads) if overlapped else None
        self._all: tuple[Lane, ...] = (self.protect, self.drain, self.tidy, self.reserve)
        if self.copy is not None:
            self._all = (self.copy, *self._all)  # first: others wait for what it does
        self.give_up: Callable[[], None] = lambda: None  # called before the lanes are to end
        self._ended = False
        self.exit_status = 0  # with which the process is to end, should a thread be stuck then
        threads.at_exit(self._at_exit)

    def wait_idle(self, bound_s: float) -> None:
        for lane in self._all:
            lane.wait(bound_s)

    def wait_saves(self, bound_s: float) -> None:
        """Until no lane has work for a save, at most about `bound_s`."""
        for lane in (self.protect, self.drain):
            lane.wait(bound_s)

    def finished(self) -> tuple[int, ...]:
        """How many tasks of each lane are over."""
        return tuple(lane.finished for lane in self._all)

    def running(self) -> list[str]:
        """What the lanes are doing."""
        return [lane.running for lane in self._all if lane.running]

    def ask_to_end(self, *, failed: bool) -> None:
        """Have each lane finish (`failed`: drop) what is queued, within a bound."""
        self.exit_status = self.exit_status or int(failed)
        self.give_up()
        for lane in self._all:
            drop = failed and lane is not self.copy  # a copy that was begun is waited for in other lanes
            lane.close(_FAILED_CLOSE_BOUND_S if failed else CLOSE_BOUND_S, drop=drop)

    def ended(self, *, failed: bool) -> bool:
        """Whether all threads are over, after one more bound; whatever waited for a peer was woken before."""
        bound_s = _FAILED_CLOSE_BOUND_S if failed else CLOSE_BOUND_S
        closed = [lane.close(bound_s, drop=True) for lane in self._all]  # each, whatever the others say
        self._ended = all(closed)
        if self._ended:  # the process's exit still knows of these lanes; a model must not live until then
            self._all = ()
            self._tell = lambda *_, **__: None
            self.give_up = lambda: None
        return self._ended

    def _at_exit(self) -> None:
        """A close came to its bound with a thread in a transfer: leaving would abort the process, so leave hard."""
        self.give_up()
        closed = all(lane.close(_FAILED_CLOSE_BOUND_S, drop=True) for lane in self._all)
        if not closed or (self._ended and _threads_in_gloo()):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.exit_status)

    def _failed(self, what: str, error: Exception) -> None:
        if isinstance(error, OSError):  # of a disk; what it means for a save is told with that save
            self._tell("warning", what=f"background task {what!r} failed: {error}", advice="")
            return
        self._tell("warning", what=f"background task {what!r} failed: {error!r}", advice="Please report this.")


def _threads_in_gloo() -> list[threading.Thread]:
    """Threads that are still in a call of gloo's or of the store's: one that comes back while the interpreter is torn
    down ends the process with SIGABRT."""
    there = [each for each in threading.enumerate() if each.name.startswith(_IN_GLOO)]
    until = time.monotonic() + _FAILED_CLOSE_BOUND_S
    for thread in there:
        thread.join(max(0.0, until - time.monotonic()))
    return [thread for thread in there if thread.is_alive()]
