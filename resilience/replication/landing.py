"""Getting memory ready for shards that are on their way, segment by segment, ahead of the receives into it.

Fresh pages cost about as much as the bytes take to come: half of it for their room in the file, half for mapping them.
Two threads do that, one behind the other, while links are built, the sender looks for its copy, and earlier segments
arrive.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from resilience.errors import StoreError
from resilience.planning.retrieval import Fetch
from resilience.runtime.threads import SYSTEM_THREADS, Mailbox, Threads
from resilience.snapshot.arena import Arena
from resilience.stores.digest import segments

__all__ = ["Landing", "Reserve"]

#: Gives a buffer room up to a byte, unless it has it; raises once it is no longer wanted (the last argument).
Reserve = Callable[[Arena, int, Callable[[], bool]], None]

_Segment = tuple[Arena, int, int, bool]  # from where to where, and whether its pages are fresh


class Landing:
    """The buffers of `fetches`, in their order. Used by one thread; `close` ends it, whatever happened."""

    def __init__(
        self,
        fetches: Sequence[Fetch],
        land: Callable[[Fetch], Arena],
        reserve: Reserve,
        threads: Threads = SYSTEM_THREADS,
    ) -> None:
        self._fetches = tuple(fetches)
        self._land = land
        self._reserve = reserve
        self._closed = False
        self._roomy: Mailbox = threads.mailbox()  # of _Segment, or of what went wrong
        self._ready: Mailbox = threads.mailbox()  # of Arena, or of what went wrong
        steps = (self._make_room, self._map_pages) if fetches else ()
        self._threads = [threads.spawn("resilience-landing", step) for step in steps]

    def next(self) -> Arena:
        """The buffer of which one more segment is ready: once for each segment of each fetch, in order.

        Raises what kept it from being made (StoreError).
        """
        ready: Arena | Exception = self._ready.get()  # there comes one for each segment, or what went wrong
        if isinstance(ready, OSError) and not isinstance(ready, StoreError):
            raise StoreError(f"no pages can be had for a shard that is fetched: {ready}") from ready
        if isinstance(ready, Exception):
            raise ready
        return ready

    def close(self) -> None:
        """Make nothing more; waits for the pages that are being made at this moment."""
        self._closed = True
        for thread in self._threads:
            thread.join()

    def _wanted(self) -> bool:
        return not self._closed

    def _make_room(self) -> None:
        try:
            for fetch in self._fetches:
                arena = self._land(fetch)
                fresh = arena.mapped.reserved < arena.nbytes
                for start, stop in segments(fetch.nbytes):
                    self._reserve(arena, stop, self._wanted)
                    self._roomy.put((arena, start, stop, fresh))
        except Exception as error:  # noqa: BLE001 - whatever it is, the thread that waits must not wait for ever
            self._roomy.put(error)

    def _map_pages(self) -> None:
        try:
            for _ in (segment for fetch in self._fetches for segment in segments(fetch.nbytes)):
                roomy: _Segment | Exception = self._roomy.get()
                if isinstance(roomy, Exception):
                    raise roomy
                arena, start, stop, fresh = roomy
                if fresh:
                    arena.mapped.fault_in(start, stop - start, self._wanted)
                self._ready.put(arena)
        except Exception as error:  # noqa: BLE001
            self._ready.put(error)
