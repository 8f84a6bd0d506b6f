"""Time, put in from outside so that a simulated cluster can run under its own."""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["Clock", "SystemClock"]


class Clock(Protocol):
    def now(self) -> float:
        """Monotonic seconds: for durations and bounds."""
        ...

    def wall(self) -> float:
        """Unix seconds: for people; two hosts' are never compared."""
        ...

    def sleep(self, seconds: float) -> None: ...


class SystemClock:
    """The machine's clock."""

    now = staticmethod(time.monotonic)  # itself: a boundary asks half a dozen times
    wall = staticmethod(time.time)
    sleep = staticmethod(time.sleep)
