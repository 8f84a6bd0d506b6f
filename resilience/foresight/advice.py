"""What should this job set? Interval, kind of save, cliques and redundancy, with the reason and what it is worth.

The interval is `planning/cadence.py`'s, the same function that a job with `cadence="auto"` calls; what the schemes
keep, send and survive is `planning/schemes.py`'s; the cliques are `planning/topology.py`'s. Expected goodput is Daly's,
with the share of failures that go back to shared storage; the simulation (`resilience simulate`) agrees with it.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from resilience.errors import ConfigError
from resilience.foresight.costs import Bandwidths, durations_of
from resilience.foresight.exposure import Exposure, exposure_of
from resilience.foresight.job import Redundancy
from resilience.foresight.simulation import Durations
from resilience.planning.cadence import best_interval, expected_goodput
from resilience.planning.memory import MemoryBudget, budget
from resilience.planning.schemes import SCHEMES, Scheme, loss_probability
from resilience.planning.topology import Topology

__all__ = ["Advice", "Option", "Question", "advise"]

SaveType = Literal["in_memory", "local"]
_CANDIDATES: tuple[tuple[Redundancy, int], ...] = (
    ("none", 1), ("replica", 2), ("replica", 3), ("xor", 4), ("xor", 8), ("rs", 4), ("rs", 8),
)  # fmt: skip
_PERSIST_AT_LEAST_EVERY_S = 3600.0
_PERSIST_AT_MOST_EVERY_S = 600.0  # shared storage is others' too
_WORTH = 0.0005  # goodput for which more memory or another scheme is not worth it


@dataclass(frozen=True)
class Question:
    """The job, as far as its user knows it. `shard_bytes`: of one rank at one save.

    `memory_bytes`, `disk_bytes`: free on a node (None: not known). Shares of failures as in `FailureModel`.
    """

    ranks: int
    ranks_per_node: int
    step_s: float
    shard_bytes: int
    mtbf_s: float
    speed: Bandwidths
    nodes_per_rack: int = 1
    process_share: float = 0.5
    rack_share: float = 0.0
    detect_s: float = 30.0
    restart_s: float = 60.0
    keep_last: int = 2
    memory_bytes: int | None = None
    disk_bytes: int | None = None

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)


@dataclass(frozen=True)
class Option:
    """One way to save. `available`: this version does it; `fits`: the node has room (None: not known)."""

    save_type: SaveType
    redundancy: Redundancy
    factor: int
    jump: int | None
    racks_apart: bool
    interval: int
    persist_interval: int
    expected_goodput: float
    stall_s: float
    durations: Durations
    memory: MemoryBudget
    kept_bytes: int
    sent_bytes: int
    survives: int
    loss_probability: Mapping[int, float]
    to_shared_storage: float  # share of failures
    available: bool
    fits: bool | None


@dataclass(frozen=True)
class Advice:
    """`best` of `options`; the same at other intervals; why."""

    best: Option
    options: tuple[Option, ...]
    intervals: tuple[tuple[int, float], ...]
    why: tuple[str, ...]


def advise(question: Question, available: Collection[Redundancy]) -> Advice:
    """`available`: the schemes that this version carries out. Raises ConfigError where nothing fits the node."""
    options = _options(question, available)
    usable = [option for option in options if option.available and option.fits is not False]
    if not usable:
        smallest = min(options, key=lambda option: option.memory.total)
        raise ConfigError(
            f"Nothing fits: the least that a node has to hold is {smallest.memory}.",
            advice="Spread the state over more ranks, free memory or disk, or save to shared storage only.",
        )
    best = _best(usable)
    every = best.interval
    others = sorted({*(max(1, round(every * factor)) for factor in (0.1, 0.25, 0.5, 1, 2, 4, 10)), every})
    intervals = tuple((each, _goodput(question, best, each)) for each in others)
    return Advice(best, options, intervals, _why(question, best, options))


def _options(question: Question, available: Collection[Redundancy]) -> tuple[Option, ...]:
    found = []
    for redundancy, factor in _CANDIDATES:
        if redundancy != "none" and not SCHEMES[redundancy].smallest_clique <= factor <= question.nodes:
            continue
        for save_type in ("in_memory", "local"):
            option = _option(question, save_type, redundancy, factor, redundancy in available)
            if option is not None:
                found.append(option)
    return tuple(found)


def _option(
    question: Question, save_type: SaveType, redundancy: Redundancy, factor: int, available: bool
) -> Option | None:
    """None: no cliques of that size can be placed on these nodes."""
    scheme = None if redundancy == "none" else SCHEMES[redundancy]
    placed = _place(question, scheme or SCHEMES["replica"], factor)
    if placed is None:
        return None
    topology, racks_apart = placed
    kept = scheme.kept_bytes(question.shard_bytes, factor) if scheme else 0
    sent = scheme.sent_bytes(question.shard_bytes, factor) if scheme else 0
    survives = scheme.losses(factor) if scheme else 0
    on_disk = save_type == "local"
    stall_s, takes = durations_of(
        shard_bytes=question.shard_bytes, sent_bytes=sent, kept_bytes=kept, ranks=question.ranks,
        ranks_per_node=question.ranks_per_node, on_disk=on_disk, speed=question.speed, detect_s=question.detect_s,
        restart_s=question.restart_s,
    )  # fmt: skip
    interval = best_interval(
        save_s=stall_s, step_s=question.step_s, mtbf_s=question.mtbf_s, shortest_steps=_steps(takes.protect_s, question)
    )
    node_of = [rank // question.ranks_per_node for rank in range(question.ranks)]
    exposure = exposure_of(topology, node_of, scheme) if scheme else None
    domains = question.nodes if not racks_apart else -(-question.nodes // question.nodes_per_rack)
    risk = {lost: loss_probability(domains, max(1, factor), survives, lost) for lost in (1, 2, 3) if lost <= domains}
    beyond = _to_shared_storage(question, exposure, risk, takes)
    persist = _persist_interval(question, stall_s, takes, beyond, interval)
    memory = budget(
        own_bytes=[question.shard_bytes] * question.ranks_per_node,
        replica_bytes=[kept] * question.ranks_per_node if kept else [],
        keep_last=question.keep_last,
        interval=interval,
        file_is_arena=not on_disk,
        buffer_bytes=question.ranks_per_node * scheme.buffer_bytes(topology) if scheme else 0,
        estimated=True,
    )
    needs = dict(memory.needs)
    room = ((needs["memory"], question.memory_bytes), (needs["disk"], question.disk_bytes))
    known = [need <= free for need, free in room if need and free is not None]
    option = Option(
        save_type, redundancy, factor, topology.jump if scheme else None, racks_apart, interval, persist, 0.0, stall_s,
        takes, memory, kept, sent, survives, risk, beyond, available,
        False if not all(known) else True if len(known) == sum(need > 0 for need, _ in room) else None,
    )  # fmt: skip
    return _replaced(option, _goodput(question, option, interval))


def _replaced(option: Option, goodput: float) -> Option:
    return Option(**{**vars(option), "expected_goodput": goodput})


def _place(question: Question, scheme: Scheme, factor: int) -> tuple[Topology, bool] | None:
    """Cliques over racks, where racks fail and there are enough of them; else over nodes."""
    names = [f"node{rank // question.ranks_per_node:05d}" for rank in range(question.ranks)]
    racks = {name: f"rack{int(name[4:]) // question.nodes_per_rack:05d}" for name in names}
    per_rack = question.ranks_per_node * question.nodes_per_rack
    if question.rack_share > 0 and question.nodes_per_rack > 1 and len(set(racks.values())) >= factor:
        for jump in (per_rack, None):
            try:
                return scheme.place(names, jump=jump, factor=factor, domains=racks, restart=False), True
            except ConfigError:
                continue  # these cliques would put two copies into one rack
    try:
        return scheme.place(names, jump=None, factor=factor, domains=None, restart=False), False
    except ConfigError:
        return None


def _to_shared_storage(
    question: Question, exposure: Exposure | None, risk: Mapping[int, float], takes: Durations
) -> float:
    """Share of failures that no copy on the nodes survives: alone, or with another one before copies are back."""
    node_share = 1 - question.process_share - question.rack_share
    if exposure is None:
        return node_share + question.rack_share
    firsts = range(0, question.nodes, question.nodes_per_rack)
    racks = [range(first, min(first + question.nodes_per_rack, question.nodes)) for first in firsts]
    of_racks = sum(not exposure.survives(rack) for rack in racks) / len(racks)
    open_s = takes.away_s("peers") + takes.refill_s
    second = -math.expm1(-open_s / question.mtbf_s) * (1 - question.process_share)
    return min(1.0, question.rack_share * of_racks + node_share * second * risk.get(2, 0.0))


def _persist_interval(question: Question, stall_s: float, takes: Durations, beyond: float, interval: int) -> int:
    """Steps: the best for the failures that need it, one to six an hour, and a multiple of the other interval."""
    longest = max(1, round(_PERSIST_AT_LEAST_EVERY_S / question.step_s))
    shortest = min(longest, _steps(max(takes.persist_s, _PERSIST_AT_MOST_EVERY_S), question))
    steps = longest
    if beyond > 0:
        steps = best_interval(
            save_s=stall_s, step_s=question.step_s, mtbf_s=question.mtbf_s / beyond, shortest_steps=shortest,
            longest_steps=longest,
        )  # fmt: skip
    return max(1, math.ceil(max(steps, _steps(takes.persist_s, question)) / interval)) * interval


def _goodput(question: Question, option: Option, interval: int) -> float:
    """Daly's expectation. Work that no save holds yet, and some failures' longer way back, are a longer restart."""
    takes = option.durations
    lost_nodes = 1 - question.process_share
    near_s = takes.restore_s + lost_nodes * (takes.peer_restore_s - takes.restore_s)
    far_s = option.persist_interval * question.step_s / 2 + takes.persist_s + takes.persistent_restore_s
    away_s = takes.detect_s + takes.restart_s + near_s + takes.protect_s
    return expected_goodput(
        interval,
        save_s=option.stall_s,
        step_s=question.step_s,
        mtbf_s=question.mtbf_s,
        restart_s=away_s + option.to_shared_storage * max(0.0, far_s - near_s),
    )


def _best(options: list[Option]) -> Option:
    """The most goodput; of those that are as good, one that does without shared storage and holds least on a node."""
    most = max(option.expected_goodput for option in options)
    as_good = [option for option in options if option.expected_goodput >= most - _WORTH]
    return min(as_good, key=lambda option: (option.redundancy == "none", option.memory.total, option.factor))


def _steps(seconds: float, question: Question) -> int:
    return max(1, math.ceil(seconds / question.step_s - 1e-9))


def _why(question: Question, best: Option, options: tuple[Option, ...]) -> tuple[str, ...]:
    takes = best.durations
    said = [
        f"A save makes training wait {best.stall_s:.3g} s and is safe after {takes.protect_s:.3g} s; with a failure "
        f"every {question.mtbf_s / 3600:.3g} h, {best.interval} steps ({best.interval * question.step_s:.3g} s) lose "
        "least between waiting and doing work again."
    ]
    if best.interval == _steps(takes.protect_s, question):
        said.append("More often would not do: a save has to be safe before the next one comes.")
    if best.redundancy == "none":
        said.append(
            "There is one node: other nodes cannot hold copies, and its loss goes back to shared storage."
            if question.nodes == 1
            else "Copies on other nodes are not worth their cost here: "
            f"{best.to_shared_storage:.0%} of the failures go back to shared storage."
        )
    else:
        what = {"replica": f"{best.factor} copies of each shard survive", "xor": f"One parity over {best.factor} nodes "
                "survives", "rs": f"Two parities over {best.factor} nodes survive"}[best.redundancy]  # fmt: skip
        said.append(
            f"{what} the loss of any {best.survives} of a clique; that leaves "
            f"{best.to_shared_storage:.2g} of the failures for shared storage."
        )
    if best.racks_apart:
        said.append("Racks fail whole, so that they are named as failure domains, and no clique has two nodes of one.")
    better = [option for option in options if option.expected_goodput > best.expected_goodput + _WORTH]
    for lacks, those in (
        ("does not fit the node", [option for option in better if option.fits is False]),
        ("is not in this version", [option for option in better if option.fits is not False]),
    ):
        if those:
            first = max(those, key=lambda option: option.expected_goodput)
            said.append(f"{first.redundancy} over {first.factor} ({first.save_type}) would be better, but {lacks}.")
    if best.fits is None:
        said.append("Whether it fits the node is not known: give --node-memory-bytes, or --measure on such a node.")
    return tuple(said)
