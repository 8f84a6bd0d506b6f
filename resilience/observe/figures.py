"""What one rank's events come to so far: the figures that metrics and the progress line show. Pure.

Counts are of this process, as Prometheus's counters are; what happened over restarts is told by the generation and by
the event files.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Event = Mapping[str, Any]

STALL_BOUNDS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
SAVE_BOUNDS_S = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
_REMEMBERED = 64  # snapshots whose commit is awaited


@dataclass
class Histogram:
    """Seconds by upper bound; `counts` has one more entry for what exceeds all bounds."""

    bounds: tuple[float, ...]
    counts: list[int] = field(default_factory=list)
    total: float = 0.0

    def __post_init__(self) -> None:
        self.counts = [0] * (len(self.bounds) + 1)

    def add(self, seconds: float) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += 1
        self.total += seconds

    def lengthen(self, seconds: float) -> None:
        """The newest one lasted longer than was said. Only in the sum: a bucket never loses what it counted."""
        self.total += seconds

    @property
    def count(self) -> int:
        return sum(self.counts)


@dataclass
class Figures:
    """One rank's process, fed with its events in order. Iterations are None until something tells of them."""

    run_id: str = ""
    attempt: str = ""
    generation: int = 0
    world_size: int = 0
    iteration: int | None = None
    last_complete: int | None = None
    last_protected: int | None = None
    last_persistent: int | None = None
    saves: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("complete", "persistent", "failed", "skipped"), 0)
    )
    replication_failures: int = 0
    bytes_copied: int = 0
    bytes_sent: int = 0
    bytes_spared: int = 0
    stall: Histogram = field(default_factory=lambda: Histogram(STALL_BOUNDS_S))
    commit: dict[str, Histogram] = field(default_factory=dict)  # by tier
    protect: Histogram = field(default_factory=lambda: Histogram(SAVE_BOUNDS_S))
    resumed_from: dict[str, int] = field(default_factory=dict)  # starts of this process by tier, "none" if fresh
    restore_s: float | None = None
    fetched_bytes: int = 0
    cautions: dict[str, str] = field(default_factory=dict)  # those in force: what, by kind
    base: int | None = None  # what this process started from: 0 if afresh
    began: float | None = None
    loaded: float | None = None
    last: float = 0.0
    ended: str = ""
    _snapshots: dict[int, float] = field(default_factory=dict)

    def take(self, event: Event) -> None:
        """One more event of this rank."""
        self.last = float(event["t"])
        self.began = self.last if self.began is None else self.began
        self.attempt = str(event.get("attempt") or self.attempt)
        note = _NOTES.get(str(event["event"]))
        if note is not None:
            note(self, event)

    @property
    def goodput(self) -> float | None:
        """Share of this process's time, its start included, in which training did not wait; None before the first step.

        Work that an earlier process lost is not in it: that is told by the event files of all attempts.
        """
        if self.began is None or self.loaded is None or self.last <= self.began:
            return None
        return max(0.0, self.last - self.loaded - self.stall.total) / (self.last - self.began)


def _start(figures: Figures, event: Event) -> None:
    figures.run_id = str(event.get("run_id") or "")
    figures.generation = int(event.get("generation") or 0)
    figures.world_size = int(event.get("world_size") or 0)


def _fresh(figures: Figures, event: Event) -> None:
    figures.loaded, figures.iteration, figures.base = float(event["t"]), 0, 0
    figures.resumed_from["none"] = figures.resumed_from.get("none", 0) + 1


def _resume(figures: Figures, event: Event) -> None:
    iteration, tier = int(event["iteration"]), str(event["tier"])
    figures.loaded, figures.iteration, figures.base = float(event["t"]), iteration, iteration
    figures.last_complete = iteration
    if tier == "persistent":
        figures.last_persistent = iteration
    figures.resumed_from[tier] = figures.resumed_from.get(tier, 0) + 1
    figures.restore_s = float(event.get("seconds") or 0.0)
    figures.fetched_bytes += int(event.get("retrieved_bytes") or 0)


def _step(figures: Figures, event: Event) -> None:
    figures.iteration = int(event["iteration"])


def _snapshot(figures: Figures, event: Event) -> None:
    iteration = int(event["iteration"])
    figures.iteration = max(figures.iteration or 0, iteration)
    figures.stall.add(float(event.get("stall_s") or 0.0))
    figures.bytes_copied += int(event.get("bytes") or 0)
    figures._snapshots[iteration] = float(event["t"])
    while len(figures._snapshots) > _REMEMBERED:
        del figures._snapshots[next(iter(figures._snapshots))]


def _joined(figures: Figures, event: Event) -> None:
    figures.stall.lengthen(float(event.get("waited_s") or 0.0))


def _committed(figures: Figures, event: Event) -> None:
    """A commit on a node says no duration: it is counted from the snapshot on."""
    seconds, began = event.get("seconds"), figures._snapshots.get(int(event["iteration"]))
    if seconds is None and began is None:
        return
    took = float(seconds) if seconds is not None else max(0.0, float(event["t"]) - (began or 0.0))
    figures.commit.setdefault(str(event["tier"]), Histogram(SAVE_BOUNDS_S)).add(took)


def _protected(figures: Figures, event: Event) -> None:
    figures.protect.add(float(event.get("seconds") or 0.0))
    figures.bytes_sent += int(event.get("sent_bytes") or 0)
    figures.bytes_spared += int(event.get("spared_bytes") or 0)


def _complete(figures: Figures, event: Event) -> None:
    iteration, persistent = int(event["iteration"]), event["tier"] == "persistent"
    if int(event.get("generation") or 0) == figures.generation:
        figures.saves["persistent" if persistent else "complete"] += 1
    figures.last_complete = max(figures.last_complete or 0, iteration)
    if persistent:
        figures.last_persistent = max(figures.last_persistent or 0, iteration)


def _replicated(figures: Figures, event: Event) -> None:
    figures.last_protected = max(figures.last_protected or 0, int(event["iteration"]))


def _failed(figures: Figures, event: Event) -> None:
    figures.saves["failed"] += 1


def _skipped(figures: Figures, event: Event) -> None:
    figures.saves["skipped"] += 1


def _replication_down(figures: Figures, event: Event) -> None:
    figures.replication_failures += 1


def _caution(figures: Figures, event: Event) -> None:
    figures.cautions[str(event["kind"])] = str(event.get("what") or "")


def _caution_over(figures: Figures, event: Event) -> None:
    figures.cautions.pop(str(event["kind"]), None)


def _end(figures: Figures, event: Event) -> None:
    figures.ended = str(event["event"])
    if event.get("iteration") is not None:
        figures.iteration = int(event["iteration"])


_NOTES: dict[str, Callable[[Figures, Event], None]] = {
    "start": _start,
    "fresh": _fresh,
    "resume": _resume,
    "step": _step,
    "snapshot": _snapshot,
    "joined": _joined,
    "committed": _committed,
    "protected": _protected,
    "complete": _complete,
    "replicated": _replicated,
    "save_failed": _failed,
    "save_skipped": _skipped,
    "replication_down": _replication_down,
    "caution": _caution,
    "caution_over": _caution_over,
    "finished": _end,
    "stopped": _end,
}
