"""What a drill is to do: its shape, its faults, and whether the two go together. Pure; nothing is started here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from random import Random
from typing import Literal

from resilience.errors import ConfigError

SaveType = Literal["local", "in_memory", "global"]
SAVE_TYPES: tuple[SaveType, ...] = ("local", "in_memory", "global")

CopyChoice = Literal["primary", "replica", "all"]


@dataclass(frozen=True)
class FaultKind:
    """What a word in a fault's spec stands for."""

    target: Literal["rank", "node", "shared"]
    ends_attempt: bool  # the scheduler starts the job anew; else torchrun restarts in place, or nothing restarts
    restarts: bool
    meaning: str
    happens: str  # the sentence of the story, with the index of the rank or node


KINDS: dict[str, FaultKind] = {
    "kill": FaultKind("rank", False, True, "SIGKILL one rank; torchrun restarts the job in place", "rank {} is killed"),
    "hang": FaultKind(
        "rank", False, True, "the rank stops making progress; the watchdog ends it", "rank {} stops making progress"
    ),
    "lose": FaultKind(
        "node",
        True,
        True,
        "kill the node, wipe its memory and disk; a spare takes its place, or with --elastic none",
        "node{} is lost for good: its processes are killed, its memory and disk are wiped",
    ),
    "stop": FaultKind(
        "node",
        True,
        True,
        "kill the node's processes; its memory and disk stay, and it comes back",
        "node{} stops: its processes are killed, its memory and disk stay",
    ),
    "reboot": FaultKind(
        "node",
        True,
        True,
        "kill the node and wipe its memory; its disk stays, and it comes back",
        "node{} reboots: its processes are killed, its memory is wiped, its disk stays",
    ),
    "corrupt": FaultKind(
        "node",
        True,
        True,
        "flip bytes in a committed copy on the node before the restart",
        "the job is stopped, and bytes on node{} are not what they were",
    ),
    "torn": FaultKind(
        "node",
        True,
        True,
        "cut a committed copy on the node in half before the restart",
        "the job is stopped, and a file on node{} is torn",
    ),
    "join": FaultKind(
        "node",
        True,
        True,
        "with --elastic: the job is started again on one more node, a new or a lost one",
        "the job is stopped, to go on with node{} as well",
    ),
    "full": FaultKind(
        "node",
        False,
        False,
        "the node's disk (in_memory: its memory mount) fills up; training must go on",
        "the mount that holds node{}'s saves is full",
    ),
}

_MOST_NODES = 64

_SPEC = re.compile(r"(?P<kind>[a-z]+):(?P<target>[a-z]+)(=(?P<index>\d+))?(,copy=(?P<copy>[a-z]+))?@(?P<at>\d+)")


@dataclass(frozen=True)
class Fault:
    """One thing that breaks, after `iteration` finished iterations. `index` is a rank, or K of `nodeK`."""

    kind: str
    index: int
    iteration: int
    copy: CopyChoice = "primary"  # for corrupt and torn: which of the node's copies of the newest save

    @property
    def spec(self) -> str:
        option = f",copy={self.copy}" if self.copy != "primary" else ""
        return f"{self.kind}:{KINDS[self.kind].target}={self.index}{option}@{self.iteration}"

    @property
    def on_node(self) -> bool:
        return KINDS[self.kind].target == "node"


@dataclass(frozen=True)
class Strike:
    """All faults of one iteration: they happen together and are recovered from together."""

    iteration: int
    faults: tuple[Fault, ...]

    @property
    def ends_attempt(self) -> bool:
        return any(KINDS[fault.kind].ends_attempt for fault in self.faults)

    @property
    def restarts(self) -> bool:
        return any(KINDS[fault.kind].restarts for fault in self.faults)

    @property
    def spec(self) -> str:
        return " + ".join(fault.spec for fault in self.faults)


@dataclass(frozen=True)
class Scenario:
    """The shape of a drill. Raises `ConfigError` when shape and faults do not go together."""

    nodes: int = 4
    spares: int = 1
    ranks_per_node: int = 1
    train_iters: int = 60
    faults: tuple[Fault, ...] = ()
    save_type: SaveType = "local"
    save_every: int = 5
    persist_every: int = 20
    replication_jump: int | None = None
    replication_factor: int = 2
    redundancy: str | None = None
    #: A lost node comes back, empty, as the last spare; a full mount has room again after two intervals.
    repaired: bool = False
    elastic: bool = False  # a lost node that no spare replaces is missing from then on; nodes may join
    strikes: tuple[Strike, ...] = field(init=False)

    def __post_init__(self) -> None:
        _check_counts(self)
        by_time = sorted(self.faults, key=lambda fault: fault.iteration)
        groups = groupby(by_time, key=lambda fault: fault.iteration)
        object.__setattr__(self, "strikes", tuple(Strike(at, tuple(faults)) for at, faults in groups))
        for strike in self.strikes:
            _check_strike(self, strike)
        rosters(self)

    @property
    def world_size(self) -> int:
        """Of the first start."""
        return self.nodes * self.ranks_per_node

    @property
    def world_sizes(self) -> tuple[int, ...]:
        """Ranks before the first strike and after each one."""
        return tuple(len(roster) * self.ranks_per_node for roster in rosters(self))

    @property
    def resized(self) -> bool:
        """Whether not all starts have as many ranks: then the end cannot be that of an undisturbed run, bit for bit."""
        return len(set(self.world_sizes)) > 1

    @property
    def saves_live_on(self) -> Literal["memory", "disk"]:
        """Where a node keeps its copies."""
        return "memory" if self.save_type == "in_memory" else "disk"


def parse_fault(spec: str) -> Fault:
    """`lose:node=2@35` → Fault. Raises `ConfigError` that says what is allowed."""
    match = _SPEC.fullmatch(spec.strip())
    if match is None:
        raise ConfigError(f"--fault {spec!r} cannot be read.", advice=_allowed())
    kind, target, index, copy = match["kind"], match["target"], match["index"], match["copy"]
    if kind == "slow":
        raise ConfigError(
            f"--fault {spec!r}: slow storage cannot be rehearsed yet: nothing here can slow a mount down.",
            advice=_allowed(),
        )
    if kind not in KINDS:
        raise ConfigError(f"--fault {spec!r}: there is no fault {kind!r}.", advice=_allowed())
    if target != KINDS[kind].target or index is None:
        raise ConfigError(f"--fault {spec!r}: {kind} wants {KINDS[kind].target}=<number>.", advice=_allowed())
    if copy is not None and kind not in ("corrupt", "torn"):
        raise ConfigError(f"--fault {spec!r}: copy= is for corrupt and torn only.", advice=_allowed())
    if copy not in (None, "primary", "replica", "all"):
        raise ConfigError(f"--fault {spec!r}: copy={copy} is none of primary, replica, all.", advice=_allowed())
    return Fault(kind, int(index), int(match["at"]), copy or "primary")  # type: ignore[arg-type]


def _allowed() -> str:
    forms = "; ".join(f"{kind}:{k.target}=K@N ({k.meaning})" for kind, k in KINDS.items())
    return f"Allowed: {forms}. @N counts finished iterations; corrupt and torn take ,copy=primary|replica|all."


def _check_counts(scenario: Scenario) -> None:
    for name, least in (("nodes", 1), ("spares", 0), ("ranks_per_node", 1), ("train_iters", 1), ("save_every", 1)):
        if getattr(scenario, name) < least:
            given = getattr(scenario, name)
            raise ConfigError(f"--{name.replace('_', '-')} {given}: at least {least} is needed.")
    if scenario.nodes > _MOST_NODES or scenario.world_size > 256:
        raise ConfigError(
            f"{scenario.world_size} ranks on {scenario.nodes} virtual nodes are too many for one machine."
        )
    if scenario.save_type not in SAVE_TYPES:
        raise ConfigError(f"--type {scenario.save_type!r}: allowed are {', '.join(SAVE_TYPES)}.")


def _check_strike(scenario: Scenario, strike: Strike) -> None:
    if not 1 <= strike.iteration < scenario.train_iters:
        raise ConfigError(
            f"--fault {strike.spec}: iteration {strike.iteration} is not within 1…{scenario.train_iters - 1}.",
            advice="A fault needs an iteration to follow it; see --train-iters.",
        )
    seen: set[tuple[str, int, str]] = set()
    for fault in strike.faults:
        key = (fault.kind, fault.index, fault.copy)
        if key in seen:
            raise ConfigError(f"--fault {fault.spec} is given twice.")
        seen.add(key)
        if fault.kind in ("corrupt", "torn", "full") and scenario.save_type == "global":
            raise ConfigError(
                f"--fault {fault.spec}: with --type global no node holds copies of its own.",
                advice="Use --type local or in_memory.",
            )


def rosters(scenario: Scenario) -> tuple[tuple[int, ...], ...]:
    """The nodes in rank order before the first strike and after each one; a spare takes a lost node's place.

    An elastic job goes on without it where no spare is left, and nodes may join it. Raises `ConfigError` when a fault
    names a node or a rank that does not train then, or when nothing takes a lost node's place.
    """
    active = list(range(scenario.nodes))
    spares = list(range(scenario.nodes, scenario.nodes + scenario.spares))
    found = [tuple(active)]
    for strike in scenario.strikes:
        for fault in strike.faults:
            _check_target(scenario, fault, active, spares)
        for fault in (fault for fault in strike.faults if fault.kind in ("lose", "join")):
            if fault.kind == "join":
                active.append(fault.index)
            elif spares:
                active[active.index(fault.index)] = spares.pop(0)
                spares += [fault.index] if scenario.repaired else []
            else:
                _go_on_without(scenario, fault, active)
        found.append(tuple(active))
    return tuple(found)


def _check_target(scenario: Scenario, fault: Fault, active: Sequence[int], spares: Sequence[int]) -> None:
    ranks = len(active) * scenario.ranks_per_node
    if not fault.on_node and fault.index >= ranks:
        raise ConfigError(f"--fault {fault.spec}: ranks are 0…{ranks - 1}.")
    there = ", ".join(f"node={index}" for index in active)
    if fault.kind == "join":
        if not scenario.elastic:
            raise ConfigError(f"--fault {fault.spec}: nodes join an elastic job only.", advice="Give --elastic.")
        if fault.index in active or fault.index in spares or fault.index >= _MOST_NODES:
            raise ConfigError(
                f"--fault {fault.spec}: that node trains or waits then ({there}), or is none of 0…{_MOST_NODES - 1}."
            )
    elif fault.on_node and fault.index not in active:
        raise ConfigError(f"--fault {fault.spec}: that node does not train then; these do: {there}.")


def _go_on_without(scenario: Scenario, fault: Fault, active: list[int]) -> None:
    if not scenario.elastic or len(active) == 1:
        raise ConfigError(
            f"--fault {fault.spec}: no spare is left to take node{fault.index}'s place.",
            advice=f"Give --spares {sum(f.kind == 'lose' for f in scenario.faults)} or more, or --elastic and nodes.",
        )
    active.remove(fault.index)


def random_faults(scenario: Scenario, seed: int, count: int = 3) -> Scenario:
    """The scenario with `count` faults drawn from the seed, each recoverable by what the scenario keeps.

    Never more lost nodes than spares, or in an elastic job fewer nodes than two that hold each other's copies; at least
    `save_every` iterations between faults, nothing before the first save.
    """
    random = Random(seed)
    first, last = scenario.save_every + 1, scenario.train_iters - 1
    kinds = ["kill", "lose", "stop"] if scenario.save_type == "global" else ["kill", "lose", "stop", "corrupt", "torn"]
    kinds += ["lose", "join"] if scenario.elastic else []
    faults: list[Fault] = []
    at = first + random.randrange(scenario.save_every)
    while len(faults) < count and at <= last:
        kind = random.choice(kinds)
        active = rosters(replace(scenario, faults=tuple(faults)))[-1]
        lost = sum(fault.kind == "lose" for fault in faults)
        if kind == "lose" and lost >= scenario.spares and not (scenario.elastic and len(active) > 2):
            kind = "stop"
        if kind == "join":
            gone = [index for index in range(scenario.nodes) if index not in active]
            index = random.choice([*gone, scenario.nodes + scenario.spares + len(faults)])
        else:
            ranks = len(active) * scenario.ranks_per_node
            index = random.choice(active) if KINDS[kind].target == "node" else random.randrange(ranks)
        faults.append(Fault(kind, index, at))
        at += scenario.save_every + random.randrange(1, max(2, (last - first) // max(1, count)))
    return replace(scenario, faults=tuple(faults))
