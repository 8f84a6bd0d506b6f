"""Whether a peer that keeps us waiting is still alive: heartbeats from a thread, looked at only while somebody waits.

A rank in a long evaluation still beats, so nobody is ended for it; a dead one is noticed within two bounds. The job's
store is read by a thread of its own, so that a store that does not answer holds up no wait: it looks as if the peers
had fallen silent.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from resilience.errors import PeerLostError
from resilience.planning.patience import STALL_BOUNDS, GivenUp, Patience

__all__ = ["Heartbeats", "Liveness", "Vigil"]

_LONGEST_PAUSE_S = 5.0


class Heartbeats(Protocol):
    """Where a wait learns of its peers' heartbeats."""

    timeout_s: float

    def watch(self, ranks: Iterable[int]) -> None:
        """Keep an eye on `ranks` until `forget`; may be asked for by several waits at once."""
        ...

    def forget(self, ranks: Iterable[int]) -> None: ...
    def latest(self) -> Mapping[int, bytes]:
        """The latest known beat of each watched rank; PeerLostError if the store they are in is gone."""
        ...


class Liveness:
    """This rank's heartbeat in the store, and a look at the others'."""

    def __init__(self, store: Any, rank: int, timeout_s: float) -> None:
        self._rank = rank
        self.timeout_s = timeout_s
        # clients of their own: a blocked call on the job's store would hold our beats back
        self._writer = store.clone()
        self._reader = store.clone()
        self._changed = threading.Condition()
        self._stopped = False
        self._watched: Counter[int] = Counter()
        self._beats: dict[int, bytes] = {}
        self._store_error = ""
        self._threads = [
            threading.Thread(target=self._beat, name="resilience-heartbeat", daemon=True),
            threading.Thread(target=self._look, name="resilience-liveness", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def watch(self, ranks: Iterable[int]) -> None:
        with self._changed:
            self._watched.update(ranks)
            self._changed.notify_all()

    def forget(self, ranks: Iterable[int]) -> None:
        with self._changed:
            self._watched.subtract(ranks)
            for rank in [rank for rank, waits in self._watched.items() if waits <= 0]:
                del self._watched[rank]
                self._beats.pop(rank, None)  # an old beat must not pass for a sign of life in a later wait

    def latest(self) -> Mapping[int, bytes]:
        with self._changed:
            if self._store_error:
                raise PeerLostError(f"the job's store does not answer: {self._store_error}")
            return dict(self._beats)

    def close(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join(timeout=2.0)

    @property
    def _pause_s(self) -> float:
        return min(_LONGEST_PAUSE_S, self.timeout_s / 8)

    def _beat(self) -> None:
        beats = 0
        while True:
            beats += 1
            try:
                self._writer.set(f"beat/{self._rank}", str(beats))
            except (RuntimeError, OSError):
                return  # the store's host is gone: the others notice the silence, we the store's
            with self._changed:
                if self._changed.wait_for(lambda: self._stopped, timeout=self._pause_s):
                    return

    def _look(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._stopped or self._watched)
                if self._stopped:
                    return
                ranks = list(self._watched)
            try:
                seen = {rank: self._read(rank) for rank in ranks}
            except (RuntimeError, OSError) as error:
                with self._changed:
                    self._store_error = str(error)
                return
            with self._changed:
                self._beats |= {rank: beat for rank, beat in seen.items() if beat and rank in self._watched}
                if self._changed.wait_for(lambda: self._stopped, timeout=self._pause_s):
                    return

    def _read(self, rank: int) -> bytes:
        key = f"beat/{rank}"
        return bytes(self._reader.get(key)) if self._reader.check([key]) else b""


class Vigil:
    """One wait for `ranks`, with an eye on their hearts. Call `check` now and then while waiting."""

    def __init__(
        self, hearts: Heartbeats, ranks: Sequence[int], what: str, now: Callable[[], float], *, stalls: bool = False
    ) -> None:
        """`stalls`: also give up a peer that lives, after `STALL_BOUNDS` times the bound."""
        self._hearts = hearts
        self._ranks = tuple(ranks)
        self._what = what
        self._now = now
        self._began = self._looked_at = now()
        bound_s = hearts.timeout_s
        self._pause_s = min(_LONGEST_PAUSE_S, bound_s / 8)
        self._patience = Patience(self._ranks, bound_s, STALL_BOUNDS * bound_s if stalls else None, self._began)
        self._watching = False

    def __enter__(self) -> Vigil:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._watching:
            self._hearts.forget(self._ranks)

    def check(self) -> None:
        """PeerLostError names the ranks that are given up. Cheap where it is called more often than need be."""
        now = self._now()
        if now - self._looked_at < self._pause_s:
            return
        self._looked_at = now
        if not self._watching:  # most waits end before anybody has to look at the store
            self._watching = True
            self._hearts.watch(self._ranks)
        given_up = self._patience.look(now, self._hearts.latest())
        if given_up is not None:
            raise _lost(self._what, given_up)


def _lost(what: str, given_up: GivenUp) -> PeerLostError:
    ranks = list(given_up.ranks[:8])
    rank = given_up.ranks[0] if len(given_up.ranks) == 1 else None
    if given_up.why == "silent":
        return PeerLostError(
            f"{what}: no sign of life from rank(s) {ranks} for {given_up.seconds:g} s.",
            advice="The launcher should restart the job; raise exchange_timeout_s if the network is that slow.",
            rank=rank,
        )
    return PeerLostError(
        f"{what}: rank(s) {ranks} live, but nothing moved for {given_up.seconds:.3g} s.",
        advice="Something in their background is stuck, as a rule a disk; raise exchange_timeout_s if it is that slow.",
        rank=rank,
    )
