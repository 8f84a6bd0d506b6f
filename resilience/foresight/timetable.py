"""When an undisturbed run has finished which step, and which saves it has taken by then.

What is due at a boundary is asked of `planning/schedule.py`, as the job does. The pattern repeats, so one period of it
is asked for, and everything else is arithmetic: a look-up costs the same at step 10 and at step 10 million.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate

from resilience.errors import ConfigError
from resilience.planning.schedule import Due, due_at

__all__ = ["Timetable"]

_MOST_PLACES = 1_000_000


@dataclass(frozen=True)
class Timetable:
    """Steps of `step_s` seconds; `save_every` and `persist_every` steps apart a save that training waits for.

    Both due together are one snapshot: the longer wait. With `persist_every` there is a last save at the end.
    """

    steps: int
    step_s: float
    save_every: int | None
    stall_s: float
    persist_every: int | None
    persist_stall_s: float
    _period: int = field(init=False, repr=False)
    _places: list[int] = field(init=False, repr=False)  # of the saves in one period
    _waits: list[float] = field(init=False, repr=False)  # after so many of them, in sum
    _last_wait: float = field(init=False, repr=False)

    def __post_init__(self) -> None:
        period = math.lcm(self.save_every or 1, self.persist_every or 1)
        first = min(period, self.steps)
        if sum(first // every for every in self._intervals()) > _MOST_PLACES:
            raise ConfigError(
                f"saves every {self.save_every} and every {self.persist_every} steps fall together only every {period} "
                "steps: that is too far to look.",
                advice="Choose intervals of which one is a multiple of the other.",
            )
        places = sorted({place for every in self._intervals() for place in range(every, first + 1, every)})
        waits = [self._wait(self._due(place, last=False)) for place in places]
        object.__setattr__(self, "_period", period)
        object.__setattr__(self, "_places", places)
        object.__setattr__(self, "_waits", [0.0, *accumulate(waits)])
        at_the_end = self._wait(self._due(self.steps, last=True)) - self._wait(self._due(self.steps, last=False))
        object.__setattr__(self, "_last_wait", at_the_end)

    def stalled_s(self, step: int) -> float:
        """Seconds waited for all saves at the boundaries 1 … `step`."""
        whole, rest = divmod(step, self._period)
        waited = whole * self._waits[-1] + self._waits[bisect_right(self._places, rest)]
        return waited + (self._last_wait if step == self.steps else 0.0)

    def ready_s(self, step: int) -> float:
        """When the step after `step` may begin: this one is done, and what it saved is copied."""
        return step * self.step_s + self.stalled_s(step)

    def finished_by(self, at_s: float) -> int:
        """Steps that are done at `at_s`."""
        return self._newest(lambda step: self.ready_s(step - 1) + self.step_s <= at_s)

    def copied_by(self, at_s: float) -> int:
        """The newest step whose saves, if any, are copied at `at_s`."""
        return self._newest(lambda step: self.ready_s(step) <= at_s)

    def saved_by(self, at_s: float) -> int:
        """The newest non-persistent save that is copied at `at_s`; 0: none."""
        step = self.copied_by(at_s)
        return step - step % self.save_every if self.save_every else 0

    def persisted_by(self, at_s: float) -> int:
        """The newest persistent save that is copied at `at_s`; 0: none."""
        step = self.copied_by(at_s)
        if not self.persist_every or step == self.steps:
            return step if self.persist_every else 0
        return step - step % self.persist_every

    def saves(self, first: int, last: int) -> int:
        """Saves, of either kind, at the boundaries `first` … `last`."""
        return self._count(last) - self._count(first - 1)

    def _count(self, step: int) -> int:
        whole, rest = divmod(step, self._period)
        regular = whole * len(self._places) + bisect_right(self._places, rest)
        due = self._due(self.steps, last=False)
        extra = step == self.steps and bool(self.persist_every) and not (due.persistent or due.non_persistent)
        return regular + extra

    def _newest(self, holds: Callable[[int], bool]) -> int:
        low, high = 0, self.steps
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if holds(middle) else (low, middle - 1)
        return low

    def _intervals(self) -> list[int]:
        return [every for every in (self.save_every, self.persist_every) if every]

    def _due(self, step: int, *, last: bool) -> Due:
        return due_at(
            step,
            save_interval=self.persist_every,
            non_persistent_interval=self.save_every,
            requested_non_persistent=False,
            requested_persistent=False,
            stop_requested=False,
            last=last,
            save_set=self.persist_every is not None,
            non_persistent_set=self.save_every is not None,
        )

    def _wait(self, due: Due) -> float:
        return max(self.stall_s if due.non_persistent else 0.0, self.persist_stall_s if due.persistent else 0.0)
