"""Whether a peer that keeps us waiting is still alive: heartbeats from a thread, read only by who waits.

A rank in a long evaluation still beats, so nobody is ended for it; a dead one is noticed within two bounds.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from resilience.errors import PeerLostError

__all__ = ["Liveness", "Patience"]


class Liveness:
    """This rank's heartbeat in the store, and a look at the others'."""

    def __init__(self, store: Any, rank: int, timeout_s: float) -> None:
        self._rank = rank
        self.timeout_s = timeout_s
        # a client of its own: a blocked call on the job's store would hold our beats back
        self._writer = store.clone()
        self._reader = store.clone()
        self._stop = threading.Event()
        self._guard = threading.Lock()
        self._thread = threading.Thread(target=self._beat, name="resilience-heartbeat", daemon=True)
        self._thread.start()

    def counters(self, ranks: Sequence[int]) -> list[bytes]:
        """Each rank's latest beat; PeerLostError if the store itself is gone."""
        keys = [f"beat/{rank}" for rank in ranks]
        try:
            with self._guard:
                return [self._reader.get(key) if self._reader.check([key]) else b"" for key in keys]
        except (RuntimeError, OSError) as error:
            raise PeerLostError(f"the job's store does not answer: {error}") from error

    def close(self) -> None:
        self._stop.set()
        self._thread.join(timeout=2.0)

    def _beat(self) -> None:
        beats = 0
        while True:
            beats += 1
            try:
                self._writer.set(f"beat/{self._rank}", str(beats))
            except (RuntimeError, OSError):
                return  # the store's host is gone: the others notice the silence, we the store's
            if self._stop.wait(min(5.0, self.timeout_s / 8)):
                return


class Patience:
    """One wait's bound: fine while every peer's heartbeat goes on."""

    def __init__(self, liveness: Liveness, ranks: Sequence[int], what: str, now: Callable[[], float]) -> None:
        self._liveness = liveness
        self._ranks = ranks
        self._what = what
        self._now = now
        self._looked_at = now()
        self._seen: list[bytes] | None = None

    def check(self) -> None:
        """Call now and then while waiting; PeerLostError names the ranks that fell silent."""
        bound = self._liveness.timeout_s
        if self._now() - self._looked_at < bound / 2:
            return
        counters = self._liveness.counters(self._ranks)
        if self._seen is not None:
            pairs = zip(self._ranks, self._seen, counters, strict=True)
            silent = [rank for rank, before, after in pairs if before == after]
            if silent:
                raise PeerLostError(
                    f"{self._what}: no sign of life from rank(s) {silent[:8]} for {bound:g} s.",
                    advice="The launcher should restart the job; raise exchange_timeout_s if the network is that slow.",
                )
        self._seen = counters
        self._looked_at = self._now()
