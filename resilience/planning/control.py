"""What the ranks tell each other at a boundary: one short vector of integers, merged by element-wise maximum.

A maximum is all that is needed: a minimum is the maximum of negated values, "any" the maximum of 0 and 1, and "all
equal" the comparison of a maximum with a minimum. Since every rank decodes the same merged vector, every rank comes to
the same agreement, or raises the same error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from resilience.errors import DivergedRanksError
from resilience.planning.inventory import SaveId
from resilience.planning.retention import Progress

SLOTS = 8  #: outstanding saves that fit into one exchange
_HEADER = 17
_PER_SLOT = 6
VECTOR_LENGTH = _HEADER + SLOTS * _PER_SLOT

_REQUESTS = ("stop", "non_persistent", "persistent")  # from the third number on
_EMPTY = -1  # iteration of a slot that is not in use
_UNUSED = (_EMPTY, -_EMPTY, 0, 0, 0, 0)
_STEPS: tuple[Progress, ...] = ("pending", "primary", "protected")


@dataclass(frozen=True)
class SlotReport:
    """How far one outstanding save has come on this rank.

    `progress` "primary": this rank's own copy is committed; "protected": the replicas of it are committed too, and so
    are those that this rank keeps for others. `failed`: this rank's own copy will never be there. `settled`: this rank
    will come no further (done, failed, or replication given up).
    """

    save: SaveId
    progress: Progress = "pending"
    failed: bool = False
    settled: bool = False
    cost_us: int = 0


class ControlReport(NamedTuple):  # a third of a frozen dataclass's time to make, at every boundary
    """What one rank has to say at one boundary.

    `step_us`: its latest step; `stall_us`: what the latest save made it wait; `idle_us`: for how long, while it
    waits for saves to settle, nothing of its background work has moved.
    """

    iteration: int
    stop: bool = False
    save_non_persistent: bool = False
    save_persistent: bool = False
    leaving: bool = False
    last: bool = False
    epoch_wanted: int = 0
    step_us: int = 0
    failures: int = 0
    free_arenas: int = 0
    stall_us: int = 0
    idle_us: int = 0
    saves: tuple[SlotReport, ...] = ()


@dataclass(frozen=True)
class SlotAgreement:
    """One outstanding save as all ranks see it: `progress` of the slowest rank, or "failed" if it failed on any."""

    iteration: int
    progress: Progress
    settled: bool
    cost_us: int


@dataclass(frozen=True)
class ControlAgreement:
    """What all ranks know after the exchange: requests of any rank, the slowest progress, the highest figures.

    `requests`: what some rank asks for, of "stop", "persistent" and "non_persistent". `all_leaving`: every rank's data
    ended at this boundary, which is an end like any other.

    `free_arenas` and `idle_us` are the lowest of any rank: something moves while it moves anywhere. With `leaving`
    (some rank's loader has ended) the ranks may be apart; `iteration` is then the lowest, and `saves` are those on
    which all ranks agree.
    """

    iteration: int
    requests: frozenset[str]
    leaving: bool
    epoch_wanted: int
    step_us: int
    failures: int
    free_arenas: int
    saves: tuple[SlotAgreement, ...]
    all_leaving: bool = False
    stall_us: int = 0
    idle_us: int = 0


def encode(report: ControlReport, slots: Sequence[SaveId]) -> list[int]:
    """This rank's vector: `slots` are the outstanding saves in agreed order; one without a report counts as pending."""
    assert len(slots) <= SLOTS, f"at most {SLOTS} saves can be outstanding, not {len(slots)}"
    reports = {each.save: each for each in report.saves}
    vector = [
        report.iteration,
        -report.iteration,
        int(report.stop),
        int(report.save_non_persistent),
        int(report.save_persistent),
        int(report.leaving),
        report.epoch_wanted,
        report.step_us,
        report.failures,
        -report.free_arenas,
        len(slots),
        -len(slots),
        -int(report.leaving),
        int(report.last),
        -int(report.last),
        report.stall_us,
        -report.idle_us,
    ]
    for save in slots:
        vector += _encode_slot(reports.get(save, SlotReport(save)))
    vector += _UNUSED * (SLOTS - len(slots))
    return vector


def _encode_slot(slot: SlotReport) -> list[int]:
    failed = slot.failed or slot.progress == "failed"
    step = 0 if failed else _STEPS.index(slot.progress)
    settled = failed or slot.settled
    return [slot.save.iteration, -slot.save.iteration, -step, int(failed), -int(settled), slot.cost_us]


def merge(vectors: Sequence[Sequence[int]]) -> list[int]:
    """Element-wise maximum; what the reduction does on the wire, here for node leaders and for simulations."""
    return [max(values) for values in zip(*vectors, strict=True)]


def decode(vector: Sequence[int]) -> ControlAgreement:
    """Read a merged vector. Raises DivergedRanksError, alike on all ranks, if they are not at one boundary."""
    if len(vector) != VECTOR_LENGTH:
        raise DivergedRanksError(f"A control vector has {VECTOR_LENGTH} numbers, not {len(vector)}.")
    leaving = bool(vector[5])
    highest, lowest = vector[0], -vector[1]
    if highest != lowest and not leaving:
        raise DivergedRanksError(
            f"Ranks are at different iterations: the furthest finished {highest}, the last one {lowest}.",
            advice="Every rank must run the same number of optimizer steps; look for a branch that only some take.",
        )
    if vector[13] != -vector[14] and not leaving:
        raise DivergedRanksError(
            f"Iteration {highest} is the last one on some ranks only.", advice="Give every rank the same train_iters."
        )
    if vector[10] != -vector[11] and not leaving:
        raise DivergedRanksError(f"Ranks count {-vector[11]} to {vector[10]} saves in the making.")
    return ControlAgreement(
        iteration=lowest,
        requests=frozenset(what for what, asked in zip(_REQUESTS, vector[2:5], strict=True) if asked),
        leaving=leaving,
        epoch_wanted=vector[6],
        step_us=vector[7],
        failures=vector[8],
        free_arenas=-vector[9],
        saves=_decode_slots(vector, -vector[11], leaving),
        all_leaving=vector[12] == -1,
        stall_us=vector[15],
        idle_us=-vector[16],
    )


def _decode_slots(vector: Sequence[int], count: int, leaving: bool) -> tuple[SlotAgreement, ...]:
    slots: list[SlotAgreement] = []
    if not 0 <= count <= SLOTS:
        raise DivergedRanksError(f"Ranks tell of {count} saves in the making; there are at most {SLOTS}.")
    for at in range(_HEADER, _HEADER + count * _PER_SLOT, _PER_SLOT):
        highest, negated_lowest, negated_step, failed, negated_settled, cost_us = vector[at : at + _PER_SLOT]
        if highest != -negated_lowest:
            if leaving:
                break
            raise DivergedRanksError(
                f"Ranks disagree on a save in the making: iteration {-negated_lowest} on one, {highest} on another."
            )
        if not 0 <= -negated_step < len(_STEPS):
            raise DivergedRanksError(f"Ranks tell of step {-negated_step} of a save in the making, which there is not.")
        progress: Progress = "failed" if failed else _STEPS[-negated_step]
        slots.append(SlotAgreement(highest, progress, bool(-negated_settled), cost_us))
    return tuple(slots)
