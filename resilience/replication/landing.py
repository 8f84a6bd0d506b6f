"""Getting memory ready for shards that are on their way, segment by segment, ahead of the receives into it.

Fresh pages cost about as much as the bytes take to come. A thread makes them, so that they are made while links are
built, the sender looks for its copy, and earlier segments arrive.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence

from resilience.planning.retrieval import Fetch
from resilience.snapshot.arena import Arena
from resilience.stores.digest import segments

__all__ = ["Landing", "MakeReady"]

#: Gives a buffer room up to a byte, unless it has it; raises once it is no longer wanted (the last argument).
MakeReady = Callable[[Arena, int, Callable[[], bool]], None]


class Landing:
    """The buffers of `fetches`, in their order. Used by one thread; `close` ends it, whatever happened."""

    def __init__(self, fetches: Sequence[Fetch], land: Callable[[Fetch], Arena], make_ready: MakeReady) -> None:
        self._fetches = tuple(fetches)
        self._land = land
        self._make_ready = make_ready
        self._wanted = True
        self._ready: queue.SimpleQueue[Arena | Exception] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="resilience-landing", daemon=True)
        if self._fetches:
            self._thread.start()

    def next(self) -> Arena:
        """The buffer of which one more segment is ready: once for each segment of each fetch, in order.

        Raises what kept it from being made (StoreError).
        """
        ready = self._ready.get()  # the thread puts one for each segment, or what it failed with
        if isinstance(ready, Exception):
            raise ready
        return ready

    def close(self) -> None:
        """Make nothing more; waits for the pages that are being made at this moment."""
        self._wanted = False
        if self._fetches:
            self._thread.join()

    def _run(self) -> None:
        try:
            for fetch in self._fetches:
                arena = self._land(fetch)
                for _, stop in segments(fetch.nbytes):
                    self._make_ready(arena, stop, lambda: self._wanted)
                    self._ready.put(arena)
        except Exception as error:  # noqa: BLE001 - whatever it is, the thread that waits must not wait for ever
            self._ready.put(error)
