"""How saves grow with bytes, tensors and ranks: which sizes are measured, in which order, and what is told of them."""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.crew import Crew
from benchmarks.figures import Figure
from benchmarks.series import as_series, note
from benchmarks.settings import QUICK, Settings

__all__ = ["AXES", "Point", "growth_figures", "measure_growth"]

_MB: Final = 1 << 20
_MODES: Final = ("eager", "overlapped")
_ROUNDS: Final = 5


@dataclass(frozen=True)
class Point:
    """One job: what each of its ranks stores, and what part of that never changes."""

    shard_bytes: int
    tensors: int
    ranks: int
    frozen: float = 0.0

    def __str__(self) -> str:
        size = f"{self.shard_bytes >> 20} MB in {self.tensors:,} tensors on {self.ranks} ranks"
        return f"{size}, {100 * self.frozen:.0f} % frozen" if self.frozen else size

    @property
    def limits(self) -> tuple[str, ...]:
        return ("memcpy", "hash", "gloo") if self.ranks > 1 else ("memcpy", "hash")


#: By what grows: the sizes, ascending.
AXES: Final[Mapping[str, tuple[Point, ...]]] = {
    "bytes": (
        *(Point(size * _MB, 96, 2) for size in (16, 64, 256, 1024)),
        Point(4096 * _MB, 96, 1),
    ),
    "tensors": tuple(Point(256 * _MB, count, 2) for count in (10, 100, 1000, 10_000)),
    "ranks": tuple(Point(16 * _MB, 96, count) for count in (1, 2, 4, 8, 16)),
    "frozen": tuple(Point(256 * _MB, 96, 2, part) for part in (0.0, 0.5, 0.75, 0.9375)),
}
_QUICK: Final[Mapping[str, tuple[Point, ...]]] = {"tensors": (Point(_MB, 4, 2), Point(_MB, 16, 1))}

Found = Mapping[str, list[dict[str, Any]]]


def measure_growth(settings: Settings, directory: Path, say: Callable[[str], None]) -> Found:
    """By what grows: for each size its numbers and, in seconds, `<mode>.stall`, `<mode>.committed`, and the limits'."""
    quick = settings.layers == QUICK.layers
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for axis, points in (_QUICK if quick else AXES).items():
        for point in points:
            samples: dict[str, list[float]] = defaultdict(list)
            for mode in _MODES:
                say(f"growth with {axis}: {point}, {mode}")
                _measure(samples, point, mode, settings, directory / f"growth-{axis}", 1 if quick else _ROUNDS)
            series = as_series(samples)
            found[axis].append(asdict(point) | series)
    return found


def _measure(
    samples: dict[str, list[float]], point: Point, mode: str, settings: Settings, directory: Path, rounds: int
) -> None:
    options = asdict(point) | {"mode": mode}
    with Crew("growth", settings, directory, size=point.ranks, options=options) as crew:
        for number in range(-1, min(rounds, settings.rounds)):
            into = samples if number >= 0 else defaultdict(list)
            for limit in point.limits:
                note(into, f"{mode}.{limit}", crew.ask(limit))
            pause_s = 4 * median(samples[f"{mode}.memcpy"] or [0.2])
            note(into, mode, crew.ask("save", pause_s=pause_s))
    shutil.rmtree(directory)


def growth_figures(found: Found) -> list[Figure]:
    """`found`: as `measure_growth` gives it. No goals: the picture is what is to be looked at."""
    figures = []
    for axis, entries in found.items():
        for entry in entries:
            size = Point(entry["shard_bytes"], entry["tensors"], entry["ranks"], entry["frozen"])
            name = f"growth_{axis}_{entry[axis if axis != 'bytes' else 'shard_bytes']}"
            for mode in _MODES:
                stall, memcpy = entry[f"{mode}.stall"], entry[f"{mode}.memcpy"]
                figures.append(
                    Figure(f"{name}_{mode}", f"{mode} stall, {size}", stall, "memcpy", memcpy, stall / memcpy)
                )
            committed = entry["eager.committed"]
            second = "gloo" if entry["ranks"] > 1 else "hash"
            least = entry["eager.memcpy"] + entry[f"eager.{second}"]
            words = f"{second} + memcpy"
            figures.append(
                Figure(f"{name}_committed", f"committed, {size}", committed, words, least, committed / least)
            )
    return figures
