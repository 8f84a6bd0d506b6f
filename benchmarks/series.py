"""Samples of one quantity, one per round, and what is said of them: median, 5th and 95th percentile.

Ratios are formed round by round, before the median: what slowed the machine down in a round slowed both sides.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["Series", "as_series", "note", "slowest"]


def note(found: dict[str, list[float]], measure: str, answers: Sequence[Mapping[str, float]]) -> None:
    """Take in what the ranks say of `measure`: a sample is what the slowest took. What is not its `seconds` has a name
    of its own, `<measure>.<what>`."""
    for what, most in slowest(answers).items():
        found[measure if what == "seconds" else f"{measure}.{what}"].append(most)


@dataclass(frozen=True)
class Series:
    """At least one sample, in the order of the rounds."""

    samples: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.samples:
            raise ValueError("a series needs at least one sample")

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def p95(self) -> float:
        """The sample that at least 95 % of all do not exceed."""
        return sorted(self.samples)[math.ceil(0.95 * len(self.samples)) - 1]

    @property
    def p5(self) -> float:
        """The sample that at least 95 % of all reach."""
        return sorted(self.samples)[len(self.samples) - math.ceil(0.95 * len(self.samples))]

    def __add__(self, other: Series) -> Series:
        return self._with(other, lambda mine, theirs: mine + theirs)

    def __truediv__(self, other: Series) -> Series:
        return self._with(other, lambda mine, theirs: mine / theirs)

    @staticmethod
    def least(several: Sequence[Series]) -> Series:
        """In each round the least of all."""
        return Series(tuple(min(samples) for samples in zip(*(each.samples for each in several), strict=True)))

    def times(self, factor: float) -> Series:
        return Series(tuple(sample * factor for sample in self.samples))

    def to_json(self) -> dict[str, float | Sequence[float]]:
        return {"median": self.median, "p5": self.p5, "p95": self.p95, "samples": self.samples}

    def _with(self, other: Series, combine: Callable[[float, float], float]) -> Series:
        pairs = zip(self.samples, other.samples, strict=True)
        return Series(tuple(combine(mine, theirs) for mine, theirs in pairs))


def slowest(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of what all ranks say, what the slowest took."""
    return {key: max(float(answer[key]) for answer in answers) for key in answers[0]}


def as_series(samples: Mapping[str, Iterable[float]]) -> dict[str, Series]:
    return {key: Series(tuple(each)) for key, each in samples.items()}
