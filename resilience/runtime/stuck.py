"""A start that is stuck in one call: what it waits for does not move, and nobody can take the call back.

Reading a checkpoint may touch a mount whose server is gone. The thread that does sleeps in the kernel, where no signal
reaches it, while the process's heartbeat goes on: the other ranks would wait for ever. Whether a thread moves is seen
from outside: each time it sleeps or wakes, the kernel counts that. One that does neither for longer than anything is
waited for ends its process, so that the others hear of it and the launcher can start the job elsewhere.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from types import TracebackType

from resilience.planning.patience import STILL_BOUNDS

__all__ = ["StuckWatch"]

_LOOKS_PER_BOUND = 8


class StuckWatch:
    """While it is entered, the thread that entered it may not stand still. Nothing on systems that do not tell."""

    def __init__(self, exchange_timeout_s: float, tell: Callable[..., None]) -> None:
        self._bound_s = STILL_BOUNDS * exchange_timeout_s
        self._tell = tell
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> StuckWatch:
        task = f"/proc/self/task/{threading.get_native_id()}/status"
        if _moves(task) is not None:
            self._thread = threading.Thread(target=self._watch, args=(task,), name="resilience-stuck", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, task: str) -> None:
        seen, still_s = _moves(task), 0.0
        pause_s = self._bound_s / _LOOKS_PER_BOUND
        while not self._over.wait(pause_s):
            now = _moves(task)
            still_s = still_s + pause_s if now == seen else 0.0
            seen = now
            if still_s >= self._bound_s:
                self._end(still_s)

    def _end(self, seconds: float) -> None:
        self._tell("hang", seconds=seconds)
        faulthandler.dump_traceback(all_threads=True)
        sys.stderr.flush()
        os._exit(1)


def _moves(task: str) -> tuple[str, ...] | None:
    """How often the thread gave up a processor, and its state; None where nobody counts."""
    try:
        with open(task) as status:
            lines = [line for line in status if "ctxt_switches" in line or line.startswith("State:")]
    except OSError:
        return None
    if not lines:
        return None
    # one that computes moves without being counted
    return (*lines, str(os.times())) if any(line.split()[:2] == ["State:", "R"] for line in lines) else tuple(lines)
