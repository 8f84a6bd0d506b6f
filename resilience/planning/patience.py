"""When is a peer that keeps us waiting given up? The bounds of one wait, as values; no clock, no thread, no socket.

A wait is for some peers, and whoever waits looks now and then: at the time, and at the latest heartbeat known of each
peer. A peer is

- **silent** when no new heartbeat of it was seen for `silence_s`: dead, cut off, or stopped as a whole;
- **stalled** when the wait itself has lasted `stall_s`, although its heart beats: the part of it that should answer is
  stuck. A wait that may last for as long as its peers live has no such bound (`None`).

Only time in which we looked counts, and between two looks no more than a quarter of `silence_s`: a process that was
itself stopped, or starved, accuses nobody when it wakes. The first heartbeat that is seen of a peer may be its last, so
it starts the peer's silence anew once and is no sign of life beyond that. A peer is thus given up within two
`silence_s` of its last sign, and at the latest after `stall_s`, of the time in which we looked.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

__all__ = ["LOOKS_PER_BOUND", "STALL_BOUNDS", "STILL_BOUNDS", "GivenUp", "Patience"]

LOOKS_PER_BOUND: Final = 4  #: so many looks at least before anybody is given up
STALL_BOUNDS: Final = 10  #: a peer that lives and does not move is given up after so many times the bound of silence
STILL_BOUNDS: Final = STALL_BOUNDS + 2  #: nor is a save waited for longer: an exchange with such a peer gives up first


@dataclass(frozen=True)
class GivenUp:
    """Who is not waited for any longer, and why."""

    ranks: tuple[int, ...]
    why: Literal["silent", "stalled"]
    seconds: float


class Patience:
    """One wait, from its beginning until it ends or somebody is given up."""

    def __init__(self, peers: Iterable[int], silence_s: float, stall_s: float | None, now: float) -> None:
        self._silence_s = silence_s
        self._stall_s = stall_s
        self._silent_for = dict.fromkeys(peers, 0.0)
        self._beats: dict[int, bytes] = {}
        self._waited_s = 0.0
        self._looked_at = now

    def look(self, now: float, beats: Mapping[int, bytes]) -> GivenUp | None:
        """`beats`: the latest known heartbeat of each peer of which one is known. Who is given up, if anybody is."""
        passed = min(max(0.0, now - self._looked_at), self._silence_s / LOOKS_PER_BOUND)
        self._looked_at = max(now, self._looked_at)
        self._waited_s += passed
        for rank, silent_s in self._silent_for.items():
            beat = beats.get(rank)
            alive = beat is not None and beat != self._beats.get(rank)
            self._silent_for[rank] = 0.0 if alive else silent_s + passed
            if beat is not None:
                self._beats[rank] = beat
        silent = tuple(rank for rank, silent_s in self._silent_for.items() if silent_s >= self._silence_s)
        if silent:
            return GivenUp(silent, "silent", self._silence_s)
        if self._stall_s is not None and self._waited_s >= self._stall_s:
            return GivenUp(tuple(self._silent_for), "stalled", self._waited_s)
        return None
