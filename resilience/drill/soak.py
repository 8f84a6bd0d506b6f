"""A soak: one run, attempt after attempt, with faults drawn from a seed for as long as asked. Does anything grow?

The number of iterations is not known before. When the time is up the job is ended as by a scheduler, and a last
attempt, undisturbed, trains a little further to a fixed end. Only then the run is made that this end is compared with.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from resilience.drill.flatness import Flatness
from resilience.drill.result import FaultResult
from resilience.drill.scenario import KINDS, CopyChoice, Fault, Scenario

__all__ = ["SoakResult", "allowed_loss", "cut_short", "problems_of_soak", "soak_scenario"]

_SHORTEST_ATTEMPT_S = 3.0  # no restart is quicker, so that the faults drawn last for the time asked
_QUIET_EVERY = 6  # about one fault in so many is waited for much longer: processes grow old enough to show what grows
_QUIET_TIMES = 12
_GAP_TIMES = 10  # intervals between two faults, at most
_HEALED_AFTER = 5  # intervals after a mount was full: it is so for two, and the next save has to be planned anew
_ENDLESS = 10_000_000  # iterations
_COPIES: tuple[CopyChoice, ...] = ("primary", "replica", "all")


def soak_scenario(scenario: Scenario, seed: int, minutes: float, *, mounts: bool = False) -> Scenario:
    """The scenario with more faults drawn from the seed than `minutes` can hold, each of which can be recovered from.

    A lost node comes back empty as a spare. Nothing strikes before the first save. `mounts`: each node has one of its
    own, so that it can run full.
    """
    assert minutes > 0, "a soak takes time"
    random = Random(seed)
    shape = replace(scenario, train_iters=_ENDLESS, repaired=True, faults=())
    active = list(range(shape.nodes))
    spares = list(range(shape.nodes, shape.nodes + shape.spares))
    kinds = [*_kinds(shape), *(["full"] if mounts else [])]
    faults: list[Fault] = []
    at = shape.save_every
    for _ in range(int(60 * minutes / _SHORTEST_ATTEMPT_S) + 1):
        gap = random.randrange(1, _GAP_TIMES * shape.save_every)
        at += shape.save_every + gap * (_QUIET_TIMES if random.randrange(_QUIET_EVERY) == 0 else 1)
        kind = random.choice(kinds)
        index = random.choice(active) if KINDS[kind].target == "node" else random.randrange(shape.world_size)
        copy = random.choice(_COPIES) if kind in ("corrupt", "torn") and shape.nodes > 1 else "primary"
        faults.append(Fault(kind, index, at, copy))
        if kind == "lose":
            active[active.index(index)] = spares.pop(0)
            spares.append(index)
    return replace(shape, faults=tuple(faults))


def _kinds(scenario: Scenario) -> list[str]:
    """What this shape recovers from without losing more than one interval."""
    kinds = ["kill", "kill", "hang", "stop"]
    replicated = scenario.save_type == "global" or (scenario.nodes > 1 and scenario.replication_factor > 1)
    if replicated and scenario.spares:
        kinds += ["lose", "lose"]
    if scenario.save_type != "global" and replicated:
        kinds += ["reboot", "corrupt", "torn"]
    return kinds


def cut_short(scenario: Scenario, struck: int, reached: int) -> Scenario:
    """The same as it turned out: the faults that happened, and an end a little further than training had come."""
    happened = tuple(fault for strike in scenario.strikes[:struck] for fault in strike.faults)
    return replace(scenario, faults=happened, train_iters=reached + scenario.save_every + 1)


def allowed_loss(scenario: Scenario, fault_at: int) -> int:
    """Iterations that a fault may cost: an interval, and the step that was being done.

    While a mount was full no save was possible: what was done in that time, and the interval before, may be lost too.
    """
    full = [fault.iteration for fault in scenario.faults if fault.kind == "full" and fault.iteration < fault_at]
    since = fault_at - max(full, default=-_ENDLESS)
    return scenario.save_every + 1 + (since if since <= _HEALED_AFTER * scenario.save_every else 0)


@dataclass(frozen=True)
class SoakResult:
    """What a soak adds to a drill's answer."""

    minutes: float
    seed: int
    attempts: int
    iterations: int
    faults_by_kind: dict[str, int]
    most_lost_iterations: int
    most_lost_of_allowed: float
    flatness: tuple[Flatness, ...]

    @classmethod
    def of(
        cls,
        scenario: Scenario,
        faults: Sequence[FaultResult],
        flatness: tuple[Flatness, ...],
        *,
        minutes: float,
        seed: int,
        attempts: int,
    ) -> SoakResult:
        return cls(
            minutes=minutes,
            seed=seed,
            attempts=attempts,
            iterations=scenario.train_iters,
            faults_by_kind=dict(sorted(Counter(fault.kind for fault in scenario.faults).items())),
            most_lost_iterations=max((fault.lost_iterations for fault in faults), default=0),
            most_lost_of_allowed=max(
                (fault.lost_iterations / allowed_loss(scenario, fault.iteration) for fault in faults), default=0.0
            ),
            flatness=flatness,
        )

    def as_json(self) -> dict[str, Any]:
        return {
            **{name: value for name, value in vars(self).items() if name != "flatness"},
            "flat": not any(each.flat is False for each in self.flatness),
            "samples": [each.as_json() for each in self.flatness],
        }


def problems_of_soak(soak: SoakResult, scenario: Scenario, faults: Sequence[FaultResult]) -> list[str]:
    """Why it did not pass, beyond what any drill asks for."""
    found = [f"It grows: {each}." for each in soak.flatness if each.flat is False]
    found += [
        f"After {fault.spec} {fault.lost_iterations} iterations were lost; {allowed} are allowed."
        for fault in faults
        if fault.lost_iterations > (allowed := allowed_loss(scenario, fault.iteration))
    ]
    if not faults:
        found.append("The time was too short for a single fault.")
    return found
