"""What happens to a simulated run: its shape, its starts and the faults that strike, all drawn from one seed.

A history is a value: it can be printed, made smaller, and executed again. A fault strikes when a rank has come to a
number of points in a phase of a start; one whose moment never comes does nothing.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

__all__ = ["FAULTS", "Fault", "FaultKind", "History", "StartPlan", "draw_history"]

FaultKind = Literal[
    "kill",  # the rank's process is killed
    "crash",  # its node loses power and comes back with its disk
    "lose",  # its node is lost with everything on it; a spare or an empty node takes its place
    "blackout",  # all nodes and the shared storage lose power
    "partition",  # its node is cut off from the others for a while
    "delay",  # what comes from or goes to its node takes long, for a while
    "disconnect",  # a connection of one of its groups breaks
    "slow_disk", "full_disk", "io_error", "torn_write", "lying_fsync",  # its node's mounts
    "slow_shared", "full_shared", "shared_io_error",  # the shared mount
    "flip",  # a bit of a committed copy on its node
    "flip_record",  # a bit of such a copy's record
    "flip_shared",  # a bit of a file of the newest persistent checkpoint
    "wire",  # a bit of the next large messages
    "clock",  # its host's clock jumps
    "unhealthy",  # the rank says for a while that its state is not healthy
    "stop",  # the rank asks for an orderly end
    "twin",  # the launcher takes the job for dead and starts it again elsewhere
]  # fmt: skip
Phase = Literal["start", "train"]

FAULTS: Final[tuple[FaultKind, ...]] = get_args(FaultKind)
_WEIGHTS: Final[dict[FaultKind, int]] = {
    "kill": 6,
    "crash": 5,
    "lose": 5,
    "flip": 3,
    "disconnect": 3,
    "stop": 1,
    "twin": 1,
}
_ENDING: Final[tuple[FaultKind, ...]] = ("kill", "crash", "lose", "blackout")  # so that there are restarts
_POINTS: Final = {"start": 220, "train": 600}


@dataclass(frozen=True)
class Fault:
    """`kind` strikes in `start` (counted from 0) when `rank` has come to `point` points of `phase`."""

    kind: FaultKind
    start: int
    phase: Phase
    rank: int
    point: int
    seconds: float = 0.0

    def __str__(self) -> str:
        lasting = f" for {self.seconds:g} s" if self.seconds else ""
        return f"start {self.start}: {self.kind}{lasting} by rank {self.rank} at point {self.point} of its {self.phase}"


@dataclass(frozen=True)
class StartPlan:
    """One start: in which order nodes are given ranks, which are away, whether a person rolls the run back."""

    order: int = 0  # by how many places nodes are rotated
    away: tuple[int, ...] = ()  # places of nodes that are not there, and come back with old data later
    rollback: bool = False  # with ckpt_step, to an older persistent checkpoint
    grace_s: float | None = 1.0  # how long after the first failure the launcher kills the others; None: it does not

    def __str__(self) -> str:
        said = [f"nodes rotated by {self.order}"] if self.order else []
        said += [f"without node {place}" for place in self.away]
        said += ["rolled back with ckpt_step"] if self.rollback else []
        said += [
            "survivors are left to themselves" if self.grace_s is None else f"survivors killed after {self.grace_s:g} s"
        ]
        return ", ".join(said)


@dataclass(frozen=True)
class History:
    """Everything that an execution depends on, but the code."""

    seed: int
    nodes: int = 2
    ranks_per_node: int = 1
    steps: int = 8
    kind: Literal["local", "in_memory", "global"] | None = "local"
    interval: int = 2
    persist_every: int | None = None
    checkpoint: tuple[tuple[str, Any], ...] = ()
    resiliency: tuple[tuple[str, Any], ...] = ()
    replication: bool = True
    factor: int = 2
    eagerness: float = 0.2
    latency_s: float = 0.001
    starts: tuple[StartPlan, ...] = (StartPlan(), StartPlan())
    faults: tuple[Fault, ...] = ()

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    def lines(self) -> Iterator[str]:
        """For a person."""
        copies = self.factor if self.replication else 1
        yield (
            f"seed {self.seed}: {self.nodes} nodes x {self.ranks_per_node} ranks, {self.steps} steps, {self.kind} "
            f"every {self.interval}, persistent every {self.persist_every}, factor {copies}"
        )
        options = dict(self.checkpoint) | dict(self.resiliency)
        yield "  options: " + (", ".join(f"{name}={value!r}" for name, value in options.items()) or "defaults")
        for number, start in enumerate(self.starts):
            yield f"  start {number}: {start}"
        for fault in self.faults:
            yield f"  fault, {fault}"


#: The variable that holds the key of a run that has one.
SECRET_NAME: Final = "SIMULATED_SECRET"


def draw_history(seed: int, focus: Sequence[FaultKind] = ()) -> History:
    """The history of a seed. `focus`: only faults of these kinds."""
    chance = random.Random(f"history {seed}")
    nodes = chance.choice((2, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 5, 6))
    ranks_per_node = chance.choice((1, 1, 1, 2)) if nodes < 4 else 1
    kind: Any = chance.choice(("local", "local", "local", "in_memory", "in_memory", "global", None))
    persist = chance.choice((None, 3, 4, 5)) if kind in ("local", "in_memory") else chance.choice((2, 3))
    starts = tuple(
        _draw_start(chance, nodes, number, persist is not None) for number in range(chance.choice((2, 3, 3, 4)))
    )
    world = nodes * ranks_per_node
    faults = tuple(
        _draw_fault(chance, number, world, focus or (_ENDING if one == 0 and chance.random() < 0.6 else FAULTS))
        for number in range(len(starts) - 1)
        for one in range(_count(chance))
    )
    checkpoint, resiliency = _draw_options(chance, persist, ranks_per_node)
    resiliency += tuple(_draw_apart(seed))
    return History(
        seed, nodes, ranks_per_node, chance.choice((3, 4, 5, 6, 8)), kind, chance.choice((1, 2, 2, 3)), persist,
        checkpoint, resiliency, chance.random() < 0.85, chance.choice((2, 2, 2, 3)) if nodes > 2 else 2,
        chance.choice((0.05, 0.2, 0.5)), chance.choice((0.0002, 0.001, 0.01)), starts, faults,
    )  # fmt: skip


def _count(chance: random.Random) -> int:
    return chance.choice((1, 1, 1, 2, 2, 3))


def _draw_start(chance: random.Random, nodes: int, number: int, persists: bool) -> StartPlan:
    if number == 0:
        return StartPlan(grace_s=chance.choice((0.0, 1.0, 30.0, None)))
    away = (chance.randrange(nodes),) if chance.random() < 0.2 else ()
    return StartPlan(
        chance.randrange(nodes) if chance.random() < 0.2 else 0, away, persists and chance.random() < 0.15,
        chance.choice((0.0, 1.0, 30.0, None)),
    )  # fmt: skip


def _draw_fault(chance: random.Random, start: int, world: int, kinds: Sequence[FaultKind]) -> Fault:
    kind = chance.choices(kinds, [_WEIGHTS.get(each, 2) for each in kinds])[0]
    phase: Phase = "start" if start and chance.random() < 0.3 else "train"
    most = _POINTS[phase]
    point = chance.randint(1, most) if chance.random() < 0.7 else int(most ** chance.random())
    seconds = chance.choice((0.5, 3.0, 12.0, 60.0))
    return Fault(kind, start, phase, chance.randrange(world), point, seconds)


def _draw_options(
    chance: random.Random, persist: int | None, ranks_per_node: int
) -> tuple[tuple[tuple[str, Any], ...], tuple[tuple[str, Any], ...]]:
    checkpoint: dict[str, Any] = {}
    resiliency: dict[str, Any] = {}
    if chance.random() < 0.5:
        checkpoint["non_persistent_local_ckpt_algo"] = chance.choice(("fully_parallel", "atomic"))
    if chance.random() < 0.3:
        checkpoint["replication_jump"] = ranks_per_node
    if persist is not None and chance.random() < 0.5:
        checkpoint["async_save"] = chance.choice((True, False))
    if chance.random() < 0.5:
        resiliency["keep_last"] = chance.choice((1, 2, 3))
    if persist is not None and chance.random() < 0.3:
        resiliency["keep_persistent"] = chance.choice((1, 2))
    if chance.random() < 0.2:
        resiliency["non_persistent_sync"] = True
    return tuple(checkpoint.items()), tuple(resiliency.items())


def _draw_apart(seed: int) -> Iterator[tuple[str, Any]]:
    """Each with a source of its own, so that all else of a seed stays what it was."""
    if random.Random(f"overlapped {seed}").random() < 0.4:
        yield "snapshot_mode", "overlapped"
    if random.Random(f"key {seed}").random() < 0.15:
        yield "secret_env", SECRET_NAME
