"""What must happen even while the training thread is stuck: TERM with a bound, hangs, requests from outside, time
limits.

A thread that the training thread cannot block: signals reach it through the wakeup descriptor, which the C-level
handler writes at once, while a Python handler would wait for the training thread to leave a collective.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import select
import signal
import socket
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

from resilience.runtime.clock import Clock

__all__ = ["Watchdog"]

_LOOK_EVERY_S = 0.25
_TERMINATED = 128 + signal.SIGTERM

_INSTALLED: weakref.WeakSet[Watchdog] = weakref.WeakSet()


class Watchdog:
    """Watches one training loop. `request("stop")` and the like must be safe from any thread."""

    def __init__(
        self,
        clock: Clock,
        *,
        term_grace_s: float,
        hang_timeout_s: float | None,
        stop_at: float | None,
        request: Callable[[str], None],
        look: Callable[[], str],
        tell: Callable[..., None],
    ) -> None:
        """`stop_at`: Unix seconds at which to ask for a stop. `look()`: what somebody outside asks for, or ""."""
        self._clock = clock
        self._term_grace_s = term_grace_s
        self._hang_timeout_s = hang_timeout_s
        self._stop_at = stop_at
        self._request = request
        self._look = look
        self._tell = tell
        self._beat_at = clock.now()
        self._paused = True
        self._busy = False
        self._terminated_at: float | None = None
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._old_handlers: dict[int, Any] = {}
        self._old_wakeup = -1
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="resilience-watchdog", daemon=True)

    @property
    def terminated(self) -> bool:
        """Whether TERM has arrived."""
        return self._terminated_at is not None

    def start(self) -> None:
        """Install the handlers (main thread only; elsewhere signals stay as they are) and begin to watch."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR2):
                self._old_handlers[number] = signal.signal(number, self._on_signal)
            self._old_wakeup = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
            _INSTALLED.add(self)
        self._thread.start()

    def beat(self) -> None:
        """A boundary was reached."""
        self._beat_at = self._clock.now()
        self._paused = self._busy = False

    def pause(self) -> None:
        """Saves are taken or waited for, with bounds of their own: no boundary is expected, and TERM waits for them."""
        self._paused = self._busy = True

    def rest(self) -> None:
        """Outside of the loop no boundary is expected, and nothing hangs; after TERM the grace holds all the same."""
        self._paused, self._busy = True, False

    def close(self) -> None:
        """Stop watching and put the handlers back."""
        self._stop.set()
        if self._thread.is_alive():
            with contextlib.suppress(OSError):
                self._writer.send(b"\0")  # no signal has this number; it wakes the thread
            self._thread.join(timeout=2.0)
        if self._old_handlers and threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(self._old_wakeup)
            self._put_handlers_back()
        self._reader.close()
        self._writer.close()

    def exit_terminated(self) -> None:
        """After TERM and a failure: leave at once, without saving. Does not return."""
        self._tell("exception", error="terminated before a boundary was reached; nothing was saved")
        self._leave(_TERMINATED)

    def forget_in_child(self) -> None:
        """In a forked child: its signals are its own. The descriptor is the parent's: writing there would stop that."""
        if self._old_handlers:
            signal.set_wakeup_fd(-1)
            self._put_handlers_back()

    def _put_handlers_back(self) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._old_handlers.clear()
        _INSTALLED.discard(self)

    def _on_signal(self, number: int, frame: Any) -> None:
        """The work is done by the thread; this keeps the signal from ending the process, and calls the user's own."""
        if number == signal.SIGTERM and self._terminated_at is None:
            self._terminated_at = self._clock.now()  # the user's own may raise before the thread has looked
        theirs = self._old_handlers.get(number)
        if callable(theirs):
            theirs(number, frame)

    def _run(self) -> None:
        while not self._stop.is_set():
            ready, _, _ = select.select([self._reader], [], [], _LOOK_EVERY_S)
            now = self._clock.now()
            if ready:
                self._received(self._reader.recv(64), now)
            if self._term_overdue(now):
                self.exit_terminated()
            if self._hang_timeout_s and not self._paused and now - self._beat_at > self._hang_timeout_s:
                self._hang(now - self._beat_at)
            if self._stop_at is not None and self._clock.wall() >= self._stop_at:
                self._stop_at = None
                self._tell("stop_requested", by="the job's time limit")
                self._request("stop")
            wanted = self._look()
            if wanted:
                self._tell("stop_requested" if wanted == "stop" else "warning", by="a request", what=wanted)
                self._request(wanted)

    def _term_overdue(self, now: float) -> bool:
        """TERM came, and for the grace no boundary: a stop takes two, and a peer may be gone after the first."""
        since = self._terminated_at
        return since is not None and not self._busy and now - max(self._beat_at, since) > self._term_grace_s

    def _received(self, numbers: bytes, now: float) -> None:
        if signal.SIGTERM in numbers and self._terminated_at is None:
            self._terminated_at = now
        if signal.SIGTERM in numbers or signal.SIGUSR2 in numbers:
            self._tell("stop_requested", by="SIGTERM" if signal.SIGTERM in numbers else "SIGUSR2")
            self._request("stop")

    def _hang(self, seconds: float) -> None:
        self._tell("hang", seconds=seconds)
        faulthandler.dump_traceback(all_threads=True)
        self._leave(1)

    def _leave(self, status: int) -> None:
        sys.stderr.flush()
        os._exit(status)


def _after_fork() -> None:
    for watchdog in list(_INSTALLED):
        watchdog.forget_in_child()


os.register_at_fork(after_in_child=_after_fork)
