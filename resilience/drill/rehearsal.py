"""What a training process does differently in a drill: the trainer asks here, at each boundary, and nowhere else.

A drill must be reproducible, so the rank that is to fail waits, after the iteration in question and once its saves are
settled, until it is killed or let go (`hold`); a rank that is to hang stops coming back (`hang`). A fault happens once:
what has happened is noted in a file, for the processes that torchrun restarts in place with the same environment.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from resilience.runtime.clock import Clock, SystemClock

DRILL = "RESILIENCE_DRILL"
HOLD = "RESILIENCE_DRILL_HOLD"  # "<rank>@<iteration>[,...]"
HANG = "RESILIENCE_DRILL_HANG"  # the same
FIRED = "RESILIENCE_DRILL_FIRED"  # a file with one "<rank>@<iteration>" a line: these have happened
TRAIN_ITERS = "RESILIENCE_DRILL_TRAIN_ITERS"  # overrides what the script asks for

HOLD_AT_MOST_S = 60.0


def at(rank: int, iteration: int) -> str:
    return f"{rank}@{iteration}"


@dataclass(frozen=True)
class Rehearsal:
    """This rank's part in a drill. `from_environment` gives None outside of one."""

    holds: frozenset[int]
    hangs: frozenset[int]
    rank: int
    fired: Path | None
    train_iters: int | None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], rank: int) -> Rehearsal | None:
        if environment.get(DRILL) != "1":
            return None
        fired, train_iters = environment.get(FIRED), environment.get(TRAIN_ITERS)
        return cls(
            holds=_iterations(environment.get(HOLD, ""), rank),
            hangs=_iterations(environment.get(HANG, ""), rank),
            rank=rank,
            fired=Path(fired) if fired else None,
            train_iters=int(train_iters) if train_iters else None,
        )

    def due(self, iteration: int) -> Literal["hold", "hang"] | None:
        """What this rank has to do after it finished `iteration`; None nearly always, without touching a disk."""
        if iteration not in self.holds and iteration not in self.hangs:
            return None
        if self._has_happened(iteration):
            return None
        return "hang" if iteration in self.hangs else "hold"

    def _has_happened(self, iteration: int) -> bool:
        fired = self.fired.read_text(encoding="ascii") if self.fired is not None and self.fired.exists() else ""
        return at(self.rank, iteration) in fired.split()

    def act(
        self,
        iteration: int,
        *,
        settle: Callable[[float], object],
        tell: Callable[..., None],
        clock: Clock | None = None,
    ) -> None:
        """Play this rank's part after it finished `iteration`; the trainer calls it at each boundary.

        Where a part is due: `settle(timeout_s)` waits until this rank's saves are settled, an event `hold` says that it
        stands ready, and it waits to be killed, or until the fault has happened (at most `HOLD_AT_MOST_S`). Hanging has
        no end.
        """
        part = self.due(iteration)
        if part is None:
            return
        clock = clock or SystemClock()
        settle(HOLD_AT_MOST_S / 2)
        tell("hold", iteration=iteration)
        until = clock.now() + HOLD_AT_MOST_S
        while part == "hang" or (clock.now() < until and not self._has_happened(iteration)):
            clock.sleep(0.02)


def _iterations(spec: str, rank: int) -> frozenset[int]:
    pairs = (part.split("@") for part in spec.split(",") if part)
    return frozenset(int(iteration) for whom, iteration in pairs if int(whom) == rank)
