"""Since when this process exists: what its imports took happened before any line of ours could look at a clock."""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["process_age_s"]

_STARTED = 19  # of the fields behind the command's name: `starttime`, in clock ticks since the boot (proc(5))


def process_age_s() -> float | None:
    """Seconds since this process was made (a fork counts); None where the kernel does not tell."""
    try:
        told = Path("/proc/self/stat").read_bytes()
        started_s = int(told.rpartition(b")")[2].split()[_STARTED]) / os.sysconf("SC_CLK_TCK")
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started_s)
    except (OSError, ValueError, IndexError, AttributeError):
        return None
