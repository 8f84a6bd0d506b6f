"""When a rank told of a save, read from its events."""

from __future__ import annotations

from pathlib import Path

from resilience.observe.events import read_events

__all__ = ["told_at"]


def told_at(path: Path, event: str, iteration: int) -> float:
    """Unix seconds of the newest `event` of the save of `iteration`; RuntimeError if there is none."""
    found = [e["t"] for e in read_events([path]) if e["event"] == event and e["iteration"] == iteration]
    if not found:
        raise RuntimeError(f"the save of iteration {iteration} was not {event}; see {path}")
    return float(found[-1])
