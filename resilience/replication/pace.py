"""When may the next bytes of background traffic go? Waits so that a rank keeps under `replication_bytes_per_s`."""

from __future__ import annotations

from collections.abc import Callable

from resilience.planning.pacing import piece_bytes, ready_at

__all__ = ["Pace"]


class Pace:
    """One rank's cap, over all its exchanges. Used by one lane."""

    def __init__(self, bytes_per_s: float | None, now: Callable[[], float], sleep: Callable[[float], None]) -> None:
        """`bytes_per_s` None: no cap."""
        self._bytes_per_s = bytes_per_s
        self._now = now
        self._sleep = sleep
        self._ready_at = now()

    @property
    def bytes_per_s(self) -> float | None:
        return self._bytes_per_s

    @property
    def capped(self) -> bool:
        return self._bytes_per_s is not None

    def piece(self, shard_bytes: int, holders: int) -> int:
        """In pieces of how many bytes a shard goes to so many holders."""
        return piece_bytes(shard_bytes, holders, self._bytes_per_s)

    def wait(self, nbytes: int) -> None:
        """Until the next `nbytes` may go."""
        if self._bytes_per_s is None:
            return
        self._ready_at = ready_at(self._ready_at, self._now(), nbytes, self._bytes_per_s)
        while (left_s := self._ready_at - self._now()) > 0:
            self._sleep(left_s)
