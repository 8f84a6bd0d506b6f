"""What many simulated runs have in common: means, how sure they are, and what theory says of the same figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from resilience.foresight.failures import Failure, FailureModel, drawn
from resilience.foresight.simulation import Outcome, RunPlan, Source, simulate_run
from resilience.planning.cadence import best_interval, expected_goodput, young_s

__all__ = ["Estimate", "Theory", "estimate", "estimate_model", "theory_of"]

_TWO_SIDED_95 = 1.96


@dataclass(frozen=True)
class Theory:
    """Young's (1974) and Daly's (2006) intervals in steps, and the share of time kept at this one by Daly's."""

    young_interval: int
    daly_interval: int
    goodput: float


@dataclass(frozen=True)
class Estimate:
    """Means over `runs` runs; `low` … `high` holds the true goodput with 95 % (one run: nothing is known of that).

    `unfinished`: runs given up because of too many failures. `shares`: where the wall time went, in sum 1.
    """

    runs: int
    goodput: float
    low: float
    high: float
    failures: float
    lost_steps: float
    most_lost_steps: int
    saves: float
    unrecoverable: float
    unfinished: int
    wall_hours: float
    resumed_from: dict[Source, float]
    shares: dict[str, float]

    def as_json(self) -> dict[str, Any]:
        found = asdict(self)
        return found | {"goodput_95": [found.pop("low"), found.pop("high")]}


def estimate_model(plan: RunPlan, model: FailureModel, *, runs: int, seed: int) -> Estimate:
    """Runs with failures drawn from the model: equal arguments give equal answers, on any machine."""
    return estimate(plan, lambda run: drawn(model, Random(f"{seed}/{run}")), runs)


def estimate(plan: RunPlan, failures_of: Callable[[int], Iterable[Failure]], runs: int) -> Estimate:
    """`failures_of(run)`: the failures of each of `runs` runs."""
    assert runs >= 1, "runs to estimate from"
    found = [simulate_run(plan, failures_of(run)) for run in range(runs)]
    goodput, margin = _ratio([run.useful_s for run in found], [run.wall_s for run in found])
    wall_s = sum(run.wall_s for run in found)
    return Estimate(
        runs=runs,
        goodput=goodput,
        low=max(0.0, goodput - margin),
        high=min(1.0, goodput + margin),
        failures=_mean([run.failures for run in found]),
        lost_steps=_mean([run.lost_steps for run in found]),
        most_lost_steps=max(run.most_lost_steps for run in found),
        saves=_mean([run.saves for run in found]),
        unrecoverable=_mean([run.unrecoverable for run in found]),
        unfinished=sum(not run.finished for run in found),
        wall_hours=wall_s / runs / 3600,
        resumed_from={source: _mean([run.resumed_from[source] for run in found]) for source in found[0].resumed_from},
        shares={name: _share(found, f"{name}_s", wall_s) for name in ("useful", "lost", "stall", "cut", "away", "end")},
    )


def theory_of(plan: RunPlan, mtbf_s: float, away_s: float) -> Theory | None:
    """What Young and Daly say of this plan; None where no save is ever taken.

    They know one kind of save that is complete at once: what a persistent save adds is spread over all saves, and work
    done until a save counts is lost like a longer restart.
    """
    table = plan.timetable
    every = table.save_every or table.persist_every
    if every is None:
        return None
    lag_s = plan.durations.protect_s if table.save_every else plan.durations.persist_s
    save_s = table.stalled_s(table.steps) / max(1.0, table.steps / every)
    goodput = expected_goodput(every, save_s=save_s, step_s=table.step_s, mtbf_s=mtbf_s, restart_s=away_s + lag_s)
    return Theory(
        young_interval=max(1, round(young_s(save_s, mtbf_s) / table.step_s)),
        daly_interval=best_interval(save_s=save_s, step_s=table.step_s, mtbf_s=mtbf_s),
        goodput=goodput,
    )


def _ratio(useful: Sequence[float], wall: Sequence[float]) -> tuple[float, float]:
    """Ratio of the sums, and half of its 95 % interval (from the spread of what each run adds to either sum)."""
    total = sum(wall)
    if total <= 0:
        return 1.0, 0.0
    ratio, runs = sum(useful) / total, len(wall)
    if runs == 1:
        return ratio, 1.0
    spread = sum((part - ratio * whole) ** 2 for part, whole in zip(useful, wall, strict=True))
    return ratio, _TWO_SIDED_95 * math.sqrt(spread / (runs * (runs - 1))) / (total / runs)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _share(found: Sequence[Outcome], name: str, wall_s: float) -> float:
    return sum(getattr(run, name) for run in found) / wall_s if wall_s > 0 else 0.0
