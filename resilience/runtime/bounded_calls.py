"""Calls to a directory that may never answer: a shared mount whose server is gone holds up whoever looks at it.

Nothing can take such a call back. So it is made by a thread of its own, which is left behind when it does not answer,
and nobody asks the same directory again before it does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from resilience.errors import StoreError
from resilience.runtime.threads import Thread, Threads

__all__ = ["BoundedCalls"]

_T = TypeVar("_T")


class BoundedCalls:
    """Of one start. Used by one thread."""

    def __init__(self, threads: Threads, bound_s: float) -> None:
        self._threads = threads
        self._bound_s = bound_s
        self._stuck: dict[str, Thread] = {}

    def call(self, place: str, run: Callable[[], _T], *, bounds: int = 1) -> _T:
        """What `run` returns or raises; StoreError if it does neither within so many bounds.

        `place`: the directory that it asks, as people know it.
        """
        stuck = self._stuck.get(place)
        if stuck is not None and stuck.is_alive():
            raise self._silent(place, self._bound_s)
        returned: list[_T] = []
        raised: list[Exception] = []

        def ask() -> None:
            try:
                returned.append(run())
            except Exception as error:  # noqa: BLE001 - raised again by whoever waits
                raised.append(error)

        self._stuck[place] = thread = self._threads.spawn("resilience-ask", ask)
        thread.join(timeout=bounds * self._bound_s)
        if raised:
            raise raised[0]
        if not returned:
            raise self._silent(place, bounds * self._bound_s)
        return returned[0]

    def _silent(self, place: str, seconds: float) -> StoreError:
        return StoreError(
            f"{place} does not answer: a call did not come back within {seconds:g} s.",
            advice="Look at the mount and its server; raise exchange_timeout_s if it is that slow.",
        )
