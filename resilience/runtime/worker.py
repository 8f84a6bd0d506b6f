"""Background work in order: one thread, a queue, and an end that is bounded.

Tasks report their own outcome; one that raises is told to `on_error` and the next one runs. The threads are daemons: a
thread that is stuck in a transfer must not hang the interpreter's exit, and leaving during a transfer aborts it, so
`close` joins with a bound and tells whether the thread ended.
"""

from __future__ import annotations

from collections.abc import Callable

from resilience.runtime.threads import SYSTEM_THREADS, Mailbox, Threads

__all__ = ["Lane"]


class Lane:
    """A named background thread that runs what is submitted, one after the other."""

    def __init__(
        self, name: str, on_error: Callable[[str, Exception], None], threads: Threads = SYSTEM_THREADS
    ) -> None:
        self._name = name
        self._on_error = on_error
        self._tasks: Mailbox = threads.mailbox()  # of (what, task), or None at the end
        self._idle = threads.condition()
        self._unfinished = 0
        self._closing = False
        self.finished = 0  # tasks that are over
        self.running = ""  # what the lane is doing
        self._thread = threads.spawn(f"resilience-{name}", self._run)

    def submit(self, what: str, task: Callable[[], None]) -> None:
        """Queue `task`. Never blocks; the agreed number of saves in the making bounds the queue."""
        with self._idle:
            self._unfinished += 1
        self._tasks.put((what, task))

    def wait(self, bound_s: float) -> bool:
        """Until all that was submitted is done, at most `bound_s`; whether it is."""
        with self._idle:
            return bool(self._idle.wait_for(lambda: self._unfinished == 0, timeout=bound_s))

    def close(self, bound_s: float, *, drop: bool = False) -> bool:
        """End the thread: after what is queued, or (`drop`) after the running task. False if it did not end in time."""
        self._closing = drop
        self._tasks.put(None)
        self._thread.join(timeout=bound_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (entry := self._tasks.get()) is not None:
            what, task = entry
            self.running = what
            try:
                if not self._closing:
                    task()
            except Exception as error:  # noqa: BLE001 - the lane lives on; whoever submitted it must learn of it
                self._on_error(what, error)
            finally:
                self.running = ""
                with self._idle:
                    self._unfinished -= 1
                    self.finished += 1
                    self._idle.notify_all()
