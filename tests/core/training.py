"""A small training job that every core test runs on real ranks: what a rank does, and the virtual nodes it runs on.

The model has dropout (random numbers count), batch norm (buffers that differ from rank to rank), a shuffled loader and
a scheduler; gradients are averaged by one all-reduce. Whatever the job does at a chosen point is an `Act`.
"""

from __future__ import annotations

import functools
import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from resilience import CheckpointConfig, ResiliencyConfig, ResilientTrainer
from resilience.observe.events import read_events
from resilience.planning.inventory import SaveId
from resilience.reports import Resume
from resilience.state.digest import state_digest
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.node_store import NodeStore
from tests.ranks import Outcome, run_ranks

RUN = "run"
WAIT_S = 60.0  # for anything that is sure to come


@dataclass(frozen=True)
class Act:
    """What `rank` does between two steps, when iteration `after` is finished. None: every rank, when all are there."""

    after: int
    do: Callable[[Training], Any]
    rank: int | None = None


@dataclass(frozen=True)
class Plan:
    """One attempt of the job, the same on all ranks.

    `kind` "disk" is a local save on a disk, arenas in memory; "off disk" an in-memory one with a disk configured too.
    """

    memory: str
    disk: str
    nodes: tuple[str, ...]  # of each rank
    kind: str | None = "local"
    steps: int = 12
    every: int = 3
    save: bool = False
    settle: tuple[int, ...] = ()  # all ranks wait for outstanding saves when these iterations are finished
    paced: bool = True  # no step begins before this rank's background work is done; else saves overtake each other
    acts: tuple[Act, ...] = ()
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    resiliency: Mapping[str, Any] = field(default_factory=dict)
    make: Callable[[Training], None] | None = None  # changes what is trained, before the trainer is made
    seed: int = 0

    def configs(self, node: str) -> tuple[CheckpointConfig, ResiliencyConfig]:
        memory, disk = f"{self.memory}/{node}", f"{self.disk}/{node}"
        checkpoint: dict[str, Any] = {}
        if self.kind is not None:
            checkpoint |= {
                "non_persistent_ckpt_type": {"disk": "local", "off disk": "in_memory"}.get(self.kind, self.kind),
                "non_persistent_save_interval": self.every,
            }
        if self.kind in ("local", "disk", "off disk"):
            checkpoint["non_persistent_local_ckpt_dir"] = memory if self.kind == "local" else disk
        if self.kind in ("local", "disk", "off disk", "in_memory") and len(set(self.nodes)) > 1:
            checkpoint["replication"] = True
        if self.save or self.kind == "global":
            checkpoint["save"] = f"{self.disk}/save"
        resiliency: dict[str, Any] = {
            "run_id": RUN,
            "node_id": node,
            "memory_dir": memory,
            "events": f"{self.disk}/events",
            "exchange_timeout_s": 20.0,
        }
        return CheckpointConfig(**checkpoint | self.checkpoint), ResiliencyConfig(**resiliency | self.resiliency)


@dataclass(frozen=True)
class Ran:
    """What one rank reports of an attempt that came to its end."""

    iteration: int
    digest: str
    resumed: Resume | None
    status: dict[str, Any]
    notes: tuple[Any, ...] = ()


class Net(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.up = nn.Linear(6, width)
        self.norm = nn.BatchNorm1d(width)
        self.drop = nn.Dropout(0.2)
        self.down = nn.Linear(width, 1)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.down(self.drop(torch.tanh(self.norm(self.up(batch)))))


class Training:
    """One rank's objects. A test's `make` and acts may change them."""

    def __init__(self, rank: int, plan: Plan) -> None:
        self.rank = rank
        self.plan = plan
        self.node = plan.nodes[rank]
        self.checkpoint, self.resiliency = plan.configs(self.node)
        random.seed(1000 * plan.seed + rank)
        np.random.seed(1000 * plan.seed + rank)
        torch.manual_seed(plan.seed)
        self.model: nn.Module = Net()
        self.optimizer: Any = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.scheduler: Any = torch.optim.lr_scheduler.StepLR(self.optimizer, 5, 0.5)
        data = torch.randn(40, 6, generator=torch.Generator().manual_seed(rank))
        self.loader: Any = torch.utils.data.DataLoader(data, 4, shuffle=True)
        torch.manual_seed(1000 * plan.seed + rank)  # each rank drops and draws for itself
        self.extra: dict[str, Any] = {}
        self.healthy: Callable[[], bool] | None = None
        self.trainer_arguments: dict[str, Any] = {}
        self.notes: list[Any] = []
        self.trainer: Any = None
        if plan.make is not None:
            plan.make(self)

    def start(self) -> ResilientTrainer:
        """Collective: elects and restores."""
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.barrier()  # a bound on a peer's silence is about what comes now, not about who was made first
        self.trainer = ResilientTrainer(
            self.model, self.optimizer, scheduler=self.scheduler, dataloader=self.loader, extra_state=self.extra,
            healthy=self.healthy, checkpoint=self.checkpoint, resiliency=self.resiliency, **self.trainer_arguments,
        )  # fmt: skip
        return self.trainer

    def run(self) -> Ran:
        with self.start() as trainer:
            for batch in trainer.iterations(self.plan.steps):
                self.between(trainer.iteration)
                self.step(batch)
            return self.report()

    def between(self, finished: int) -> None:
        if self.plan.paced:
            self.trainer._controller.wait_idle(WAIT_S)
        if finished in self.plan.settle:
            self.trainer.wait()
        for number, act in enumerate(self.plan.acts):
            if act.after == finished and act.rank in (None, self.rank):
                if act.rank is None:
                    self.meet(f"{finished}-{number}")
                act.do(self)

    def meet(self, where: str) -> None:
        """Until all ranks have come. Through a file: one that leaves and dies at once takes nobody along."""
        if dist.is_initialized():
            store = dist.distributed_c10d._get_default_store()
            store.add(where, 1)
            wait_until(lambda: store.add(where, 0) == dist.get_world_size())

    def step(self, batch: torch.Tensor) -> None:
        self.model(batch).square().mean().backward()
        if len(self.plan.nodes) > 1:
            gradients = [each.grad for each in self.model.parameters() if each.grad is not None]
            flat = torch.cat([each.flatten() for each in gradients])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for gradient, averaged in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(averaged.view_as(gradient))
        self.optimizer.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.optimizer.zero_grad()

    def report(self) -> Ran:
        digest = state_digest(self.trainer._state.collect())
        return Ran(
            self.trainer.iteration, digest, self.trainer.resumed_from, self.trainer.status(), tuple(self.notes)
        )  # fmt: skip


def train(rank: int, plan: Plan) -> Ran:
    """One attempt on one rank, to its end."""
    return Training(rank, plan).run()


# -- acts -------------------------------------------------------------------------------------------------------------


def wait_until(happened: Callable[[], Any]) -> None:
    """Poll for what is sure to happen; how soon is nobody's business."""
    deadline = time.monotonic() + WAIT_S
    while not happened():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def said(training: Training, name: str, **fields: Any) -> list[dict[str, Any]]:
    """The events of that name and these fields that any rank has told so far."""
    return events_of(Path(training.plan.disk), name, **fields)


def events_of(disk: Path, name: str, **fields: Any) -> list[dict[str, Any]]:
    found = [each for each in read_events([disk / "events"]) if each["event"] == name]
    return [each for each in found if all(each.get(key) == value for key, value in fields.items())]


def die(training: Training) -> None:
    """As `kill -9`: nothing gets to clean up."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail(training: Training) -> None:
    raise RuntimeError("the user's own loop failed")


def stop(training: Training) -> None:
    training.trainer.request_stop()


# -- the test's side --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The directories of one test's virtual nodes, and what the test looks up in them."""

    memory: Path
    disk: Path

    def plan(self, *nodes: str, **fields: Any) -> Plan:
        return Plan(str(self.memory), str(self.disk), nodes, **fields)

    def run(self, plan: Plan, **options: Any) -> list[Outcome]:
        return run_ranks(len(plan.nodes), train, plan, **options)

    def store(self, node: str, kind: str = "local", run_id: str = RUN) -> NodeStore:
        base = (self.disk if kind == "disk" else self.memory) / node
        store = NodeStore(base, run_id, node, "in_memory" if kind == "in_memory" else "local", PosixFileSystem())
        store._durable = kind == "disk"
        return store

    def copies(self, node: str, kind: str = "local") -> dict[int, dict[int, str]]:
        """By iteration, then owner: the roles of the copies in the node's directory."""
        held = self.store(node, kind).reader.inventory().node_saves
        return {each.save.iteration: dict(zip(each.owners, each.roles, strict=True)) for each in held}

    def saves(self, node: str, kind: str = "local") -> list[SaveId]:
        return sorted(each.save for each in self.store(node, kind).reader.inventory().node_saves)

    def shard(self, node: str, iteration: int, owner: int, kind: str = "local") -> Path:
        """The shard file of `owner` at the newest attempt's save of `iteration`."""
        base = (self.disk if kind == "disk" else self.memory) / node
        return sorted((base / RUN / node).glob(f"iter_{iteration:07d}/*/rank_{owner:05d}-of-*.safetensors"))[-1]

    def damage(self, node: str, iteration: int, owner: int, kind: str = "local") -> None:
        """Flip one bit in the middle of the shard's tensors."""
        path = self.shard(node, iteration, owner, kind)
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    def lose(self, node: str) -> None:
        """The node is gone for good, memory and disk."""
        shutil.rmtree(self.memory / node, ignore_errors=True)
        shutil.rmtree(self.disk / node, ignore_errors=True)

    def events(self, name: str, **wanted: Any) -> list[dict[str, Any]]:
        return events_of(self.disk, name, **wanted)


@functools.cache
def reference(size: int, steps: int = 12, make: Callable[[Training], None] | None = None) -> tuple[str, ...]:
    """The digests, by rank, of a run that nothing disturbs and nothing saves."""
    plan = Plan("/nonexistent", "/nonexistent", ("alone",) * size, kind=None, steps=steps, make=make)
    plan = replace(plan, resiliency={"events": None})
    outcomes = run_ranks(size, train, plan)
    failed = [outcome.trace for outcome in outcomes if outcome.error]
    assert not failed, failed[0]
    return tuple(outcome.value.digest for outcome in outcomes)
