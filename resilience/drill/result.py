"""What a drill found: made from the events of both runs and from what was done to them. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from resilience.drill.scenario import Scenario, Strike
from resilience.observe.timeline import spent_of

Event = dict[str, Any]

#: Relative. Another number of ranks averages over other samples at each step. State that was not loaded, or loaded
#: wrongly, shows as a loss that jumps back to where training began.
LOSS_TOLERANCE = 0.25
Decision = Mapping[str, Any]  # {iteration, generation, tier}


@dataclass(frozen=True)
class StrikeRecord:
    """One strike as the drill carried it out. Times are seconds since the epoch.

    `decision` is what `explain` said between the end of the old processes and the start of new ones; None with
    `explained` means "nothing to resume from".
    """

    strike: Strike
    fault_t: float
    gone_t: float
    finished_iteration: int
    explained: bool = False
    decision: Decision | None = None


@dataclass(frozen=True)
class FaultResult:
    """One fault and how the job came back from it; the keys of the interface's `faults`."""

    spec: str
    iteration: int
    resumed_from: Decision | None
    lost_iterations: int
    detect_s: float | None
    restore_s: float | None
    downtime_s: float | None
    retrieved_bytes: int
    own_copies: int
    replica_copies: int
    rebuilt: int
    predicted: bool | None
    passed_over: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class DrillResult:
    """The answer of a drill; `as_json` has the interface's keys. `problems` says in words why it did not pass.

    `bit_identical` is None where `why_not_bits` says that bits cannot be compared; then `loss_difference` is, the
    largest relative one from the undisturbed run's at any iteration that both told of.
    """

    passed: bool
    nodes: int
    ranks_per_node: int
    train_iters: int
    faults: list[FaultResult]
    world_sizes: list[int]
    final_digest: str | None
    reference_digest: str | None
    bit_identical: bool | None
    why_not_bits: str
    loss_difference: float | None
    goodput: float
    stall_s_per_save: float | None
    saves_failed: int
    unplanned_restarts: int
    wall_s: float
    problems: list[str]
    events: str
    report: str
    workdir: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def digest_of(events: Sequence[Event], train_iters: int, world_size: int) -> str | None:
    """One digest of all ranks' final states; None unless every rank told its own at `train_iters`."""
    last: dict[int, str] = {}
    for event in events:
        if event["event"] == "digest" and event.get("iteration") == train_iters and event.get("digest"):
            last[int(event["rank"])] = str(event["digest"])
    if sorted(last) != list(range(world_size)):
        return None
    text = "\n".join(f"{rank} {last[rank]}" for rank in sorted(last))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def loss_difference(events: Sequence[Event], reference: Sequence[tuple[int, float]]) -> float | None:
    """The largest relative difference between the last told loss of an iteration and the undisturbed run's."""
    told = {
        int(event["iteration"]): float(event["value"])
        for event in events
        if event["event"] == "metric" and event.get("name") == "loss"
    }
    return max((abs(told[at] - loss) / abs(loss) for at, loss in reference if at in told and loss), default=None)


def goodput_of(events: Sequence[Event]) -> float:
    """Useful training time over wall time, from the first start of a process to the last word of training."""
    spent = spent_of(events)
    return min(1.0, spent.useful / spent.wall) if spent.wall > 0 else 0.0


def stall_per_save(events: Sequence[Event]) -> float | None:
    """Median over saves of the longest wait of any rank, in seconds."""
    worst: dict[tuple[int, str], float] = {}
    for event in events:
        told = event["event"] in ("snapshot", "joined") and event.get("stall_s") is not None
        if told and event.get("iteration") is not None:
            key = (int(event["iteration"]), str(event.get("attempt", "")))
            worst[key] = max(worst.get(key, 0.0), float(event["stall_s"]))
    return median(worst.values()) if worst else None


def recoveries(records: Sequence[StrikeRecord], events: Sequence[Event]) -> list[FaultResult]:
    """One entry per fault; faults of one strike share how the job came back."""
    found: list[FaultResult] = []
    for place, record in enumerate(records):
        until = records[place + 1].fault_t if place + 1 < len(records) else float("inf")
        after = [event for event in events if record.fault_t < event["t"] <= until]
        found += [_recovery(record, fault.spec, after) for fault in record.strike.faults]
    return found


def _recovery(record: StrikeRecord, spec: str, after: Sequence[Event]) -> FaultResult:
    restarts = record.strike.restarts  # a disk that is full ends nothing: a later resume is not its doing
    resumes = [event for event in after if event["event"] == "resume" and restarts]
    attempt = resumes[0].get("attempt") if resumes else None
    resumes = [event for event in resumes if event.get("attempt") == attempt]
    first_steps = [e["t"] for e in after if e["event"] == "step" and e["t"] > record.gone_t]
    back = bool(resumes) or (restarts and any(event["event"] == "fresh" for event in after))
    decision = {key: resumes[0].get(key) for key in ("iteration", "generation", "tier")} if resumes else None

    def total(name: str) -> int:
        return max((int(event.get(name) or 0) for event in resumes), default=0)  # every rank tells the job's total

    seconds = [float(event["seconds"]) for event in resumes if event.get("seconds") is not None]
    base = int(decision["iteration"] or 0) if decision else 0
    return FaultResult(
        spec=spec,
        iteration=record.strike.iteration,
        resumed_from=decision,
        lost_iterations=max(0, record.finished_iteration - base) if restarts else 0,
        detect_s=round(record.gone_t - record.fault_t, 3) if restarts else None,
        restore_s=max(seconds, default=None),
        downtime_s=round(min(first_steps) - record.fault_t, 3) if restarts and first_steps else None,
        retrieved_bytes=total("retrieved_bytes"),
        own_copies=total("own_copies"),
        replica_copies=total("replica_copies"),
        rebuilt=total("rebuilt"),
        predicted=_same(record.decision, decision) if record.explained and back else None,
        passed_over=[item for event in resumes[:1] for item in event.get("passed_over") or []],
    )


def _same(predicted: Decision | None, happened: Decision | None) -> bool:
    if predicted is None or happened is None:
        return predicted is None and happened is None
    return all(predicted.get(key) == happened.get(key) for key in ("iteration", "generation", "tier"))


def problems_of(
    scenario: Scenario,
    records: Sequence[StrikeRecord],
    faults: Sequence[FaultResult],
    events: Sequence[Event],
    final: str | None,
    reference: str | None,
    difference: float | None = None,
) -> list[str]:
    """Why the drill did not pass, in words; empty when it did.

    `difference`: of the losses, which are compared where world sizes changed on the way, and bits cannot be.
    """
    found: list[str] = []
    done = {record.strike.iteration for record in records}
    found += [f"The fault {strike.spec} never happened." for strike in scenario.strikes if strike.iteration not in done]
    finished = {int(event["rank"]) for event in events if event["event"] == "finished"}
    if missing := sorted(set(range(scenario.world_sizes[-1])) - finished):
        found.append(f"Training did not finish on ranks {missing}.")
    found += [
        f"After {fault.spec} the job came back from {fault.resumed_from}, which `resilience explain` had not said."
        for fault in faults
        if fault.predicted is False
    ]
    if final is None or reference is None:
        which = [name for name, value in (("the drill", final), ("the reference run", reference)) if value is None]
        found.append(f"No digest of the final state came from every rank of {' and '.join(which)}.")
    elif scenario.resized:
        if difference is not None and difference > LOSS_TOLERANCE:
            found.append(
                f"The loss differs by up to {difference:.1%} from the undisturbed run's; {LOSS_TOLERANCE:.0%} are let "
                "pass where the number of ranks changes, and with it what a step averages over."
            )
    elif final != reference:
        found.append(
            "The final state differs from the undisturbed run's. If two undisturbed runs of the script differ as well, "
            "it is the script that is not deterministic (seeds, data order; with DDP: find_unused_parameters=True, so "
            "that gradient buckets are not rebuilt)."
        )
    return found


def unplanned_restarts(records: Sequence[StrikeRecord], events: Sequence[Event]) -> int:
    """Attempts beyond the first and those that the strikes called for."""
    attempts = {event.get("attempt") for event in events if event["event"] in ("resume", "fresh")}
    called_for = 1 + sum(record.strike.restarts for record in records)
    return max(0, len(attempts - {"", None}) - called_for)
