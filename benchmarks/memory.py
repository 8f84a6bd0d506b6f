"""By how much a piece of work grows this process while it runs, as the kernel counts it.

The high-water mark of the resident set, mapped files included, above what was resident before. Arenas and the tensors
that are saved or filled were touched beforehand, so that only what comes on top is seen.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

__all__ = ["growth_of"]

_STATUS = Path("/proc/self/status")
_FORGET_PEAK = ("/proc/self/clear_refs", "5")

T = TypeVar("T")


def growth_of(work: Callable[[], T]) -> tuple[T, int]:
    """What `work` gave, and bytes."""
    Path(_FORGET_PEAK[0]).write_text(_FORGET_PEAK[1])
    before = _field("VmRSS")
    given = work()
    return given, max(0, _field("VmHWM") - before)


def _field(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10
