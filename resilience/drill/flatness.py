"""Does it grow? Judged from samples over time: memory, descriptors, bytes and files of a job that runs for long. Pure.

What was measured in the last third is held against the first third (of a process: the middle third, once it is warm).
Medians are compared, so that a moment with one save more, or one process that fetched a lot, is no growth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

__all__ = ["DirectorySample", "Flatness", "ProcessSample", "judge"]

_SHARE = 0.1
_SHARE_KEPT = 0.25  # what an attempt leaves stays until the next one has a save of its own, so that it goes up and down
_FEWEST = 6  # series, or samples in one, to say anything
_FEWEST_IN_LIFE = 12


@dataclass(frozen=True)
class ProcessSample:
    """One process at one moment. `memory_bytes`: its own, not what it maps of files: arenas are files of its node."""

    t: float
    rank: int
    pid: int
    iteration: int
    memory_bytes: int
    descriptors: int
    threads: int


@dataclass(frozen=True)
class DirectorySample:
    """All that the job keeps, on nodes and on shared storage, but attempt logs: one small file per start."""

    t: float
    iteration: int
    bytes: int
    files: int


@dataclass(frozen=True)
class Flatness:
    """One quantity. `flat` None: too few samples to tell. Growth up to `allowed` is none."""

    what: str
    samples: int
    first: float
    last: float
    allowed: float
    flat: bool | None

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "growth": self.last - self.first}

    def __str__(self) -> str:
        most = self.first + self.allowed
        return f"{self.what}: {self.first:.6g} at first, {self.last:.6g} at last, {most:.6g} allowed"


#: What is judged of processes, and the growth that is none, beside a share of what there was.
_OF_PROCESSES: tuple[tuple[str, Callable[[ProcessSample], float], float], ...] = (
    ("bytes of memory", lambda sample: sample.memory_bytes, 4 << 20),
    ("descriptors", lambda sample: sample.descriptors, 4),
    ("threads", lambda sample: sample.threads, 2),
)


def judge(
    processes: Sequence[ProcessSample], directories: Sequence[DirectorySample], settled_at: int = 0
) -> tuple[Flatness, ...]:
    """Memory, descriptors and threads over all attempts and within the life of a process; bytes and files kept.

    `settled_at`: the iteration from which on there are as many saves as are to be kept.
    """
    lives: dict[int, list[ProcessSample]] = {}
    for sample in processes:
        lives.setdefault(sample.pid, []).append(sample)
    grown_up = [life for life in lives.values() if len(life) >= 3]
    found = []
    for what, of, slack in _OF_PROCESSES:
        ends = [(life[0].rank, median(map(of, life[len(life) // 2 :]))) for life in grown_up]
        found.append(_compare(f"{what} of a process, over attempts", _as_of_one_rank(ends), _SHARE, slack))
        found.append(_within(f"{what} within a process's life", grown_up, of, slack))
    settled = [each for each in directories if each.iteration >= settled_at]
    found.append(_compare("bytes kept by the job", [each.bytes for each in settled], _SHARE_KEPT, 2 << 20))
    found.append(_compare("files kept by the job", [each.files for each in settled], _SHARE_KEPT, 8))
    return tuple(found)


def _as_of_one_rank(ends: Sequence[tuple[int, float]]) -> list[float]:
    """The series without what ranks differ by: the first has more sockets than the others, in every attempt."""
    if not ends:
        return []
    usual = median(value for _, value in ends)
    of_rank = {rank: median(value for other, value in ends if other == rank) for rank, _ in ends}
    return [value - of_rank[rank] + usual for rank, value in ends]


def _within(
    what: str, lives: Sequence[Sequence[ProcessSample]], of: Callable[[ProcessSample], float], slack: float
) -> Flatness:
    """The median process: its middle third against its last."""
    pairs = []
    for life in lives:
        if len(life) >= _FEWEST_IN_LIFE:
            third = len(life) // 3
            pairs.append((median(map(of, life[third : 2 * third])), median(map(of, life[-third:]))))
    if not pairs:
        return Flatness(what, 0, 0.0, 0.0, slack, None)
    first = median(before for before, _ in pairs)
    last = first + median(after - before for before, after in pairs)
    return _judged(what, len(pairs), first, last, _SHARE * first + slack)


def _compare(what: str, values: Sequence[float], share: float, slack: float) -> Flatness:
    """The median of the last third of a series against that of the first."""
    if len(values) < _FEWEST:
        return Flatness(what, len(values), 0.0, 0.0, slack, None)
    third = len(values) // 3
    first = median(values[:third])
    return _judged(what, len(values), first, median(values[-third:]), share * first + slack)


def _judged(what: str, samples: int, first: float, last: float, allowed: float) -> Flatness:
    return Flatness(what, samples, first, last, allowed, last - first <= allowed)
