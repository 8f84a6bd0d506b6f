"""Many histories, one after the other and in a few processes, counted; one that breaks a promise is made small."""

from __future__ import annotations

import gc
import math
import multiprocessing
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from resilience.drill.simulator.cluster import Outcome, execute
from resilience.drill.simulator.history import FaultKind, History, draw_history
from resilience.drill.simulator.shrink import shrink
from resilience.runtime.garbage import no_garbage_collection

__all__ = ["Broken", "Tally", "explain_failure", "fuzz", "run_seed"]

_ENDLESS: Final = 1 << 40
_ENOUGH_BROKEN: Final = 5


@dataclass(frozen=True)
class Broken:
    """A seed whose history broke a promise."""

    seed: int
    promise: str
    what: str


@dataclass
class Tally:
    """What a run of many histories came to."""

    histories: int = 0
    starts: int = 0
    points: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    broken: list[Broken] = field(default_factory=list)

    def add(self, other: Tally) -> None:
        self.histories += other.histories
        self.starts += other.starts
        self.points += other.points
        self.faults += other.faults
        self.broken += other.broken

    def lines(self) -> Iterator[str]:
        yield f"{self.histories} histories, {self.starts} starts, {self.points} points, {self.faults.total()} faults:"
        yield "  " + ", ".join(f"{kind} {count}" for kind, count in self.faults.most_common())
        yield f"{len(self.broken)} histories broke a promise"
        for each in self.broken:
            yield f"  seed {each.seed}: {each.promise}: {each.what[:300]}"


def run_seed(seed: int, focus: Sequence[FaultKind] = ()) -> Tally:
    """One history."""
    outcome = execute(draw_history(seed, focus))
    broken = [] if outcome.violation is None else [Broken(seed, outcome.violation.promise, outcome.violation.what)]
    return Tally(1, len(outcome.ends), outcome.points, Counter(outcome.struck), broken)


def fuzz(
    first: int,
    count: int | None,
    *,
    seconds: float | None = None,
    workers: int = 1,
    focus: Sequence[FaultKind] = (),
) -> Tally:
    """Run the histories of `count` seeds from `first` on, or as many as `seconds` allow. Stops after a few broken ones.

    Several `workers` fork from this process, which has imported all that they need.
    """
    assert count is not None or seconds is not None, "there must be an end"
    _import_all()
    ends_at = math.inf if seconds is None else time.monotonic() + seconds
    tally = Tally()
    if workers == 1:
        return _run_seeds(_seeds(first, count, 0, 1), ends_at, focus)
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        parts = [(_seeds(first, count, number, workers), ends_at, focus) for number in range(workers)]
        for part in pool.starmap(_run_seeds, parts, chunksize=1):
            tally.add(part)
    return tally


def _seeds(first: int, count: int | None, number: int, workers: int) -> range:
    return range(first + number, first + (count if count is not None else _ENDLESS), workers)


def _run_seeds(seeds: range, ends_at: float, focus: Sequence[FaultKind]) -> Tally:
    tally = Tally()
    with _collected_in_between() as collect:
        for seed in seeds:
            if time.monotonic() >= ends_at or len(tally.broken) >= _ENOUGH_BROKEN:
                break
            tally.add(run_seed(seed, focus))
            collect()
    return tally


@contextmanager
def _collected_in_between() -> Iterator[Callable[[], object]]:
    """Garbage is collected when the function that is yielded is called, and only what was made since: among the few
    hundred thousand objects of torch the collector spent an eighth of the histories' time."""
    gc.collect()
    gc.freeze()
    try:
        with no_garbage_collection():
            yield gc.collect
    finally:
        gc.unfreeze()


def _import_all() -> None:
    """What jobs import late takes seconds: not in the middle of a history."""
    import torch

    import resilience.formats.torch_dist_writer  # noqa: F401

    torch.set_num_threads(1)


def explain_failure(history: History) -> tuple[History, Outcome]:
    """The smallest history that breaks the promise that `history` breaks, and what happens in it."""
    promise = _promise(execute(history))
    assert promise, "this history keeps all promises"
    small = shrink(history, lambda candidate: _promise(execute(candidate)) == promise)
    return small, execute(small)


def _promise(outcome: Outcome) -> str:
    return outcome.violation.promise if outcome.violation is not None else ""
