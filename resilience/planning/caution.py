"""What a person should worry about right now: would a failure cost too much, does a replica lack, are saves too rare?

Pure. The values are those that all ranks agreed on, or what a run's events tell: a job and `resilience top` come to the
same cautions.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final, Literal

from resilience.planning.cadence import best_interval, expected_goodput

__all__ = ["Caution", "Standing", "cautions"]

Kind = Literal["not_protected", "replica_missing", "interval_too_long"]

_OLD_INTERVALS: Final = 2
_TRIVIAL_LOSS_S = 10.0  # work that takes no longer to be done again is nobody's worry
_TOLERATED_LOSS: Final = 0.01  # of goodput, for an interval that is not the best


@dataclass(frozen=True)
class Caution:
    """One of them: what was found, and what to do."""

    kind: Kind
    what: str
    advice: str


@dataclass(frozen=True)
class Standing:
    """Where a job stands. Iterations of saves are None where there is no such save; `begun` is where this start began.

    `replicated`: whether saves on nodes have replicas or parity elsewhere. `interval`: steps between saves (None: there
    are none). `complete`, `protected`: newest save that counts, and newest that outlives the loss of a node. `lacking`:
    the newest complete save is settled, and replicas are missing. Seconds are 0 where nothing was measured.
    """

    iteration: int
    begun: int
    interval: int | None
    replicated: bool
    complete: int | None
    protected: int | None
    lacking: bool = False
    step_s: float = 0.0
    save_s: float = 0.0
    mtbf_s: float | None = None


def cautions(standing: Standing) -> tuple[Caution, ...]:
    """All that hold."""
    found = (_not_protected(standing), _replica_missing(standing), _interval_too_long(standing))
    return tuple(caution for caution in found if caution is not None)


def _not_protected(standing: Standing) -> Caution | None:
    """Older than two intervals: the one in the making may take one, so that a healthy job never comes near."""
    if standing.interval is None:
        return None
    safe = standing.protected if standing.replicated else standing.complete
    at_risk = standing.iteration - max(safe or 0, standing.begun)
    if at_risk <= _OLD_INTERVALS * standing.interval or 0 < at_risk * standing.step_s < _TRIVIAL_LOSS_S:
        return None
    kind = "save that outlives the loss of a node" if standing.replicated else "complete save"
    newest = f"the newest {kind} is of iteration {safe}" if safe is not None else f"there is no {kind}"
    return Caution(
        "not_protected",
        f"not protected right now: {newest}; a failure now loses {at_risk} iterations.",
        "Look for failed or skipped saves, or save less often if they take longer than an interval.",
    )


def _replica_missing(standing: Standing) -> Caution | None:
    if not (standing.replicated and standing.lacking):
        return None
    return Caution(
        "replica_missing",
        f"replicas or parity are missing: the save of iteration {standing.complete} is on its own nodes only, at least "
        "in part.",
        "The links are rebuilt by themselves; if it stays so, a node is out of room or cannot be reached.",
    )


def _interval_too_long(standing: Standing) -> Caution | None:
    if standing.interval is None or standing.mtbf_s is None or standing.step_s <= 0:
        return None
    goodput = partial(expected_goodput, save_s=standing.save_s, step_s=standing.step_s, mtbf_s=standing.mtbf_s)
    best = best_interval(save_s=standing.save_s, step_s=standing.step_s, mtbf_s=standing.mtbf_s)
    if best >= standing.interval:
        return None
    lost = goodput(best) - goodput(standing.interval)
    if lost <= _TOLERATED_LOSS:
        return None
    return Caution(
        "interval_too_long",
        f"a save every {standing.interval} iterations is too rare for a failure every {standing.mtbf_s / 3600:.3g} h: "
        f"it costs {100 * lost:.1f} % more of the time than one every {best}.",
        f"Set the interval to {best}, or cadence to auto.",
    )
