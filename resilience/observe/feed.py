"""From the event log to metrics and the progress line: a bounded queue, and one thread that never holds training up.

`take` is called by whichever thread emits an event and does no more than append to a queue. All else happens in the
feed's thread: the figures are kept, and each outlet writes what it shows. An outlet that fails is told of once, and
tried again with the next events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, Protocol

from resilience.observe.figures import Figures
from resilience.runtime.threads import SYSTEM_THREADS, Threads

__all__ = ["Feed", "Outlet"]

PERIOD_S: Final = 2.0
_MOST_QUEUED: Final = 10_000
_CLOSE_BOUND_S: Final = 5.0

Event = Mapping[str, Any]


class Outlet(Protocol):
    """Shows figures somewhere. Called by the feed's thread only; may raise, which costs this writing and no more."""

    name: str

    def write(self, events: Sequence[Event], figures: Figures) -> None:
        """`events`: new since the last call; `figures`: what all so far come to."""
        ...

    def close(self) -> None: ...


class Feed:
    """A `Sink` of the event log with a thread of its own. `dropped` counts events for which the queue had no room."""

    def __init__(
        self,
        outlets: Sequence[Outlet],
        tell: Callable[..., None],
        threads: Threads = SYSTEM_THREADS,
        *,
        period_s: float = PERIOD_S,
    ) -> None:
        self.dropped = 0
        self._outlets = tuple(outlets)
        self._tell = tell
        self._period_s = period_s
        self._figures = Figures()
        self._queue: deque[Event] = deque()
        self._failed: set[str] = set()  # outlets of which that was told
        self._wake = threads.condition()
        self._closing = False
        self._thread = threads.spawn("resilience-feed", self._run)
        threads.at_exit(self.close)  # a script that never closes its trainer: the terminal's row is given back

    def take(self, event: Event) -> None:
        """Any thread; never blocks."""
        if len(self._queue) >= _MOST_QUEUED:  # the thread hangs in a write: news is worth less than memory
            self.dropped += 1
        else:
            self._queue.append(event)

    def close(self) -> None:
        """Write what is left and end the thread, within a bound. May be called twice."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        self._thread.join(timeout=_CLOSE_BOUND_S)

    def _run(self) -> None:
        while True:
            with self._wake:
                closing = bool(self._wake.wait_for(lambda: self._closing, timeout=self._period_s))
            events = [self._queue.popleft() for _ in range(len(self._queue))]
            for event in events:
                self._figures.take(event)
            for outlet in self._outlets if events else ():
                self._try(outlet, partial(outlet.write, events, self._figures))
            if closing:
                for outlet in self._outlets:
                    self._try(outlet, outlet.close)
                return

    def _try(self, outlet: Outlet, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - a full disk, or what a library makes of it: training goes on
            if outlet.name not in self._failed:
                self._failed.add(outlet.name)
                self._tell("metrics_failed", outlet=outlet.name, error=str(error)[:500])
