"""One history, executed: nodes with their disks, starts of the job, the launcher, and the faults that strike."""

from __future__ import annotations

import json
import random
import traceback
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

import resilience.formats.torch_dist_reader
import resilience.formats.torch_dist_writer  # noqa: F401 - not in the middle of a history: both take seconds
from resilience.config import CheckpointConfig, ResiliencyConfig
from resilience.drill.simulator.communicator import SimCommunicator
from resilience.drill.simulator.disk import SimFileSystem
from resilience.drill.simulator.history import SECRET_NAME, Fault, History, StartPlan
from resilience.drill.simulator.network import Network, World
from resilience.drill.simulator.schedule import Process, Scheduler, Violation
from resilience.drill.simulator.storage import Inode, Mount
from resilience.drill.simulator.strike import strike
from resilience.drill.simulator.threads import SimClock, SimThreads
from resilience.drill.simulator.training import SimController, Training
from resilience.drill.simulator.truth import ALIKE, FENCED, NO_MISTAKE, STOPPED, StartObserver, StartTruth, Truth
from resilience.errors import (
    CheckpointNotFoundError,
    DivergedRanksError,
    EvictedError,
    MemoryBudgetError,
    NoUsableSaveError,
    ResilienceError,
    StoppedExit,
)
from resilience.state.rng import capture_host, restore_host
from resilience.stores.trackers import TEXT_TRACKER

__all__ = ["Cluster", "Outcome", "execute"]

RUN: Final = "run"
_TIMEOUT_S: Final = 8.0  # of exchanges
_ENVIRONMENT: Final = {SECRET_NAME: "a secret of the whole job's"}
_STEP_S: Final = 1.0
_MAY_END_A_JOB: Final = {"kill", "crash", "lose", "blackout", "partition", "delay", "disconnect", "twin"}
_IMPAIRS_A_RESTORE: Final = {
    "torn_write", "full_disk", "flip", "flip_record", "flip_shared", "wire", "full_shared",
    "lying_fsync",
}  # fmt: skip
_LEFT_ALONE_S: Final = 900.0  # survivors must come to an end by themselves within that


@dataclass(eq=False)
class Node:
    name: str
    mounts: dict[str, Mount]
    clock_jump_s: float = 0.0
    down: bool = False


@dataclass(eq=False)
class Rank:
    """A rank of one start: its process, and how it ended."""

    rank: int
    node: Node
    process: Process
    ended: str = ""  # "", or "finished", "stopped", "killed", or the error
    unhealthy_until: float = -1.0
    controller: SimController | None = None


@dataclass(eq=False)
class Start:
    """One start of the job."""

    plan: StartPlan
    truth: StartTruth
    world: World
    ranks: list[Rank] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    failed_at: float | None = None
    late: int = 0  # names that it published on shared storage after another start had taken it over
    thought_dead: bool = False  # the launcher starts the next one beside it

    @property
    def over(self) -> bool:
        return all(rank.ended for rank in self.ranks)


@dataclass(frozen=True)
class Outcome:
    """What came of a history: `violation` None if all promises were kept."""

    violation: Violation | None
    trace: str
    points: int
    struck: Mapping[str, int]
    story: tuple[str, ...]
    ends: tuple[str, ...]  # of each start


def execute(history: History) -> Outcome:
    """Run one history in this process. Raises only for a mistake of the simulator's own."""
    cluster = Cluster(history)
    violation = None
    try:
        cluster.run()
    except Violation as error:
        violation = error
    return Outcome(
        violation, cluster.scheduler.trace, cluster.scheduler.points, dict(cluster.struck), tuple(cluster.truth.story),
        tuple(cluster.ends),
    )  # fmt: skip


class Cluster:
    """The machines and the launcher of one history."""

    def __init__(self, history: History) -> None:
        self.history = history
        self.scheduler = Scheduler(history.seed, history.eagerness)
        self.chance = random.Random(f"cluster {history.seed}")
        self.network = Network(self.scheduler, history.latency_s)
        self.shared = Mount("shared")
        self.nodes: dict[str, Node] = {}
        self.placed = [self.add_node() for _ in range(history.nodes)]
        mounts = {name: node.mounts for name, node in self.nodes.items()}
        self._mounts = mounts
        self.truth = Truth(self.scheduler, mounts, history.kind or "local", self.copies)
        self.struck: Counter[str] = Counter()
        self.ends: list[str] = []
        self.starts: list[Start] = []
        self.flip_hits: Callable[[], None] = lambda: None

    @property
    def copies(self) -> int:
        replicated = self.history.replication and self.history.kind in ("local", "in_memory")
        return self.history.factor if replicated else 1

    def add_node(self) -> Node:
        node = Node(f"n{len(self.nodes)}", {"mem": Mount("memory"), "disk": Mount("disk"), "shared": self.shared})
        self.nodes[node.name] = node
        if hasattr(self, "_mounts"):
            self._mounts[node.name] = node.mounts
        return node

    # -- the launcher -------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """The whole history. The generators of random numbers of this process, which all simulated ones share and
        store, begin as its seed says, and are put back at its end. Raises what ended it early."""
        before = capture_host()
        try:
            random.seed(self.history.seed)
            np.random.seed(self.history.seed % (1 << 32))
            torch.manual_seed(self.history.seed)
            self.scheduler.run(self._launch)
        finally:
            restore_host(before)

    def _launch(self) -> None:
        """The world's thread: one start after the other, until the job finished."""
        self._launcher = self.scheduler.current
        for number, plan in enumerate(self.history.starts):
            start = self._begin(number, plan)
            self._watch(start)
            if start.thought_dead and number + 1 < len(self.history.starts):
                continue  # the next one begins beside it
            self._end_leftovers()
            end = self._end_of(start)
            self.ends.append(end)
            self.truth.tell(f"start {number} ended: {end}")
            if end == "finished":
                return
            self.scheduler.sleep(1.0)

    def _begin(self, number: int, plan: StartPlan) -> Start:
        self._repair()
        beside = [start for start in self.starts if not start.over]
        elsewhere = bool(beside) and self.chance.random() < 0.5
        nodes = [self.add_node() for _ in self.placed] if elsewhere else self._nodes_of(plan)
        per_node = self.history.ranks_per_node
        names = tuple(node.name for node in nodes for _ in range(per_node))
        truth = StartTruth(number, names)
        truth.beside = [start.truth for start in beside]
        checkpoint = self._checkpoint(plan, truth)
        self.truth.begins(truth)
        start = Start(plan, truth, World(self.network, names, _TIMEOUT_S))
        start.faults = [fault for fault in self.history.faults if fault.start == number]
        self.starts.append(start)
        self.truth.tell(f"start {number} on {', '.join(node.name for node in nodes)} ({plan})")
        for rank in range(len(names)):
            process = Process(f"s{number}r{rank}", partial(self._at_point, start, rank))
            start.ranks.append(Rank(rank, nodes[rank // per_node], process))
            start.world.join(rank, process)
        for one in start.ranks:
            self.scheduler.spawn(
                "main", one.process, partial(self._main, start, one, checkpoint), partial(self.kill, start, one)
            )
        return start

    def _end_leftovers(self) -> None:
        """Starts that were thought to be dead are ended for good."""
        for start in self.starts:
            for rank in start.ranks:
                if not rank.ended:
                    self.kill(start, rank)

    def take_for_dead(self, start: Start) -> None:
        """The launcher believes that the job ended, and goes on to the next start."""
        start.thought_dead = True
        self.scheduler.wake(self._launcher)

    def _watch(self, start: Start) -> None:
        """Until all ranks ended; the launcher kills the survivors of a failure, or leaves them to themselves."""
        while not start.over and not start.thought_dead:
            failed_at, grace_s = start.failed_at, start.plan.grace_s
            if failed_at is not None:
                until = failed_at + (_LEFT_ALONE_S if grace_s is None else grace_s)
                if self.scheduler.now >= until:
                    left = [rank for rank in start.ranks if not rank.ended]
                    if grace_s is None:
                        what = f"rank {left[0].rank} goes on {_LEFT_ALONE_S:g} s after another failed"
                        self.scheduler.fail(ALIKE, f"{what}; {self.scheduler.where()}")
                    for rank in left:
                        self.kill(start, rank)
                    continue
                self.scheduler.block(until)
            else:
                self.scheduler.block()

    def kill(self, start: Start, rank: Rank) -> None:
        """As SIGKILL, if it lives."""
        if not rank.process.dead:
            self.scheduler.kill(rank.process)
            rank.ended = rank.ended or "killed"
            start.world.gone(rank.rank)
        if rank.ended not in ("finished", "stopped") and start.failed_at is None:
            start.failed_at = self.scheduler.now
        start.truth.over = start.over
        self.scheduler.wake(self._launcher)

    def _end_of(self, start: Start) -> str:
        """How the start ended, and whether it had a reason to."""
        ends = {rank.ended for rank in start.ranks}
        for end in sorted(ends):
            if ends == {end} and end in ("finished", "stopped"):
                return end
        disturbed = start.truth.disturbed & _MAY_END_A_JOB | start.truth.hindered
        said = "; ".join(f"rank {rank.rank}: {rank.ended}" for rank in start.ranks)
        if not disturbed and not start.truth.may_fail:
            self.scheduler.fail(STOPPED, f"start {start.truth.number} ended without a reason: {said}")
        return said

    # -- machines -----------------------------------------------------------------------------------------------------

    def power_off(self, node: Node) -> None:
        """The node loses power: its processes, its memory, and what its disk had not made durable."""
        self.network.silent.add(node.name)
        node.down = True
        for start in self.starts:
            for rank in start.ranks:
                if rank.node is node and not rank.process.dead:
                    self.kill(start, rank)
        if node.mounts["disk"].lies or self.truth_place == "mem":
            self.truth.lost(node.name)
        node.mounts["mem"].fail_power(self.chance)
        node.mounts["disk"].fail_power(self.chance)

    @property
    def truth_place(self) -> str:
        return "mem" if self.history.kind == "in_memory" else "disk"

    def wipe(self, node: Node) -> None:
        self.truth.lost(node.name)
        for place in ("mem", "disk"):
            node.mounts[place].wipe()

    def _repair(self) -> None:
        """Before a start: power is back, disks are empty enough, the network is whole."""
        self.network.silent.clear()
        self.network.slow.clear()
        self.network.flips = 0
        self.network.mend()
        for mount in [self.shared, *(mount for node in self.nodes.values() for mount in node.mounts.values())]:
            mount.full = mount.lies = False
            mount.slow_s, mount.failing, mount.tearing = 0.0, 0, 0
        for node in self.nodes.values():
            node.down = False

    def _nodes_of(self, plan: StartPlan) -> list[Node]:
        nodes = list(self.placed)
        for place in plan.away:
            nodes[place % len(nodes)] = self.add_node()
        order = plan.order % len(nodes)
        return nodes[order:] + nodes[:order]

    # -- faults -------------------------------------------------------------------------------------------------------

    def _at_point(self, start: Start, rank: int, process: Process, what: str) -> None:
        for fault in start.faults:
            if fault.rank == rank and fault.phase == process.phase and fault.point <= process.points:
                start.faults.remove(fault)
                self.struck[fault.kind] += 1
                for alive in [each for each in self.starts if each is start or not each.over]:
                    alive.truth.disturbed.add(fault.kind)
                    if len(alive.truth.resumed) < len(alive.ranks):
                        alive.truth.hindered.add(fault.kind)
                        alive.truth.impaired |= {fault.kind} & _IMPAIRS_A_RESTORE
                self.truth.tell(f"FAULT {fault}")
                strike(self, start, start.ranks[rank], fault)
                return

    # -- a rank -------------------------------------------------------------------------------------------------------

    def _main(self, start: Start, rank: Rank, checkpoint: CheckpointConfig) -> None:
        """What the process of a rank does, as a user's script would."""
        history, scheduler, process = self.history, self.scheduler, rank.process
        observer = StartObserver(self.truth, start.truth)
        fs = SimFileSystem(
            scheduler, process, rank.node.mounts, lambda path, inode: self._seen(start, rank, path, inode)
        )  # fmt: skip
        chance = random.Random(f"rank {history.seed} {start.truth.number} {rank.rank}")
        training = Training(
            rank.rank, f"{history.seed}/{start.truth.number}", observer, lambda: self._is_healthy(start, rank),
            overlapped=("snapshot_mode", "overlapped") in history.resiliency,
        )  # fmt: skip
        clock = SimClock(scheduler, lambda: rank.node.clock_jump_s)
        try:
            controller = rank.controller = SimController(
                training.state, checkpoint, self._resiliency(rank.node),
                communicator=SimCommunicator(start.world, rank.rank, rank.rank % history.ranks_per_node),
                clock=clock, filesystem=fs, threads=SimThreads(scheduler, process), env=_ENVIRONMENT,
                draw=lambda nbytes: chance.randbytes(nbytes).hex(),
            )  # fmt: skip
            controller.hear = lambda event, fields: None
            failed = True
            try:
                training.run(controller, history.steps, lambda: _STEP_S * chance.uniform(0.8, 1.2), process.enter)
                failed, rank.ended = False, "finished"
            except StoppedExit:
                failed, rank.ended = False, "stopped"
            finally:
                if not process.dead:
                    controller.close(failed=failed)
        except (ResilienceError, OSError) as error:
            rank.ended = f"{type(error).__name__}: {error}"
            self._judge_error(start, error)
        except Exception as error:  # noqa: BLE001 - what is no error of ours is a mistake of ours
            traceback.print_exception(error)
            self.scheduler.fail(NO_MISTAKE, f"rank {rank.rank}: {error!r}")

    def _is_healthy(self, start: Start, rank: Rank) -> bool:
        healthy = self.scheduler.now >= rank.unhealthy_until
        if not healthy and rank.controller is not None:
            self.truth.void(start.truth, rank.controller.iteration, f"rank {rank.rank} was not healthy then")
        return healthy

    def _judge_error(self, start: Start, error: Exception) -> None:
        if isinstance(error, DivergedRanksError):
            self.scheduler.fail(ALIKE, str(error))
        if isinstance(error, (NoUsableSaveError, CheckpointNotFoundError)):
            start.truth.may_fail = True
            self.truth.refused(start.truth, str(error))
        if isinstance(error, MemoryBudgetError) or "cannot hold its checkpoints" in str(error):
            start.truth.may_fail = bool({"full_disk", "full_shared"} & start.truth.disturbed)
        twins = len([each for each in self.starts if not each.over]) > 1 or start.thought_dead
        if twins and ("in use by" in str(error) or isinstance(error, EvictedError) or "could not start" in str(error)):
            start.truth.may_fail = True

    def _seen(self, start: Start, rank: Rank, path: Path, inode: Inode | None) -> None:
        if path.parts[1] == "shared":
            if inode is not None and _publishes(path):
                self._check_fence(start, path)
            return
        if not path.name.startswith("rank_") or path.suffix != ".json":
            return
        if inode is not None:
            self.truth.committed(start.truth, rank.node.name, path, rank.node.mounts[path.parts[1]])
        elif rank.process.phase == "train":
            self.truth.uncommitted(start.truth, rank.node.name, path)

    def _check_fence(self, start: Start, path: Path) -> None:
        """A start that lost the directory to another may be late by the one rename that it was about to make."""
        owner = self.shared.find(("save", "resilience.json"))
        if not isinstance(owner, Inode) or not start.truth.attempt:
            return
        attempt = json.loads(bytes(owner.content))["attempt"]
        if not start.truth.attempt.endswith(attempt[:8]):
            start.late += 1
            if start.late > 1:
                what = f"start {start.truth.number} publishes {path}, which belongs to attempt {attempt[:8]} now"
                self.scheduler.fail(FENCED, what)

    # -- configuration ------------------------------------------------------------------------------------------------

    def _checkpoint(self, plan: StartPlan, truth: StartTruth) -> CheckpointConfig:
        history = self.history
        fields: dict[str, Any] = dict(history.checkpoint)
        if history.persist_every is not None:
            fields |= {"save": "/shared/save", "save_interval": history.persist_every}
        if history.kind is not None:
            fields |= {"non_persistent_ckpt_type": history.kind, "non_persistent_save_interval": history.interval}
        if history.kind == "local":
            fields["non_persistent_local_ckpt_dir"] = "/disk"
        if history.replication and history.kind in ("local", "in_memory"):
            fields |= {"replication": True, "replication_factor": history.factor}
        step = self._rollback_to() if plan.rollback else None
        if step is not None:
            fields |= {"load": "/shared/save", "ckpt_step": step}
            truth.rollback = step
        return CheckpointConfig(**fields)

    def _rollback_to(self) -> int | None:
        there = [name for name in (entry for entry in self._shared_folders()) if name.startswith("iter_")]
        return int(self.chance.choice(there)[5:]) if there else None

    def _shared_folders(self) -> list[str]:
        save = self.shared.find(("save",))
        return sorted(getattr(save, "names", {}))

    def _resiliency(self, node: Node) -> ResiliencyConfig:
        return ResiliencyConfig(
            run_id=RUN, node_id=node.name, memory_dir="/mem", exchange_timeout_s=_TIMEOUT_S,
            max_restarts_without_progress=1000, **dict(self.history.resiliency),
        )  # fmt: skip


def _publishes(path: Path) -> bool:
    """Whether a name on shared storage is seen by those who look for checkpoints."""
    return (path.name == "resilience.json" and path.parent.name.startswith("iter_")) or path.name == TEXT_TRACKER
