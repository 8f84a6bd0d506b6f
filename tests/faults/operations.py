"""What is attacked: the saves and restores of a small job of one process, through the trainer, as users run them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard

from resilience.errors import ResilienceError
from resilience.explain import explain_paths
from tests.core.training import RUN, Act, Plan, Training
from tests.faults.edge import Edge
from tests.faults.leaks import Held, stray_files
from tests.faults.loop import Place, forked

__all__ = ["Restore", "Save", "small", "small_and_sharded"]

NODE = "a"
OLD, EVERY = 3, 3


def plan_on(place: Place, **fields: Any) -> Plan:
    return Plan(place.memory, place.disk, (NODE,), every=EVERY, **fields)


def elected(place: Place, plan: Plan) -> int | None:
    """The iteration that a start would resume from, by `explain`'s own functions."""
    save = Path(place.disk, "save") if plan.save or plan.kind == "global" else None
    nodes = [Path(place.memory, NODE), Path(place.disk, NODE)]
    found = explain_paths([each for each in nodes if each.exists()], save, None, RUN, 1)
    return None if found is None else found["iteration"]


def ended_as_undisturbed(training: Training, reference: str) -> None:
    digest = training.report().digest
    assert digest == reference, f"at {training.trainer.iteration} the state is not that of an undisturbed run"


@dataclass(frozen=True)
class _Job:
    """`fields`: of the plan. `reference`: digest of an undisturbed run of `steps`."""

    fields: Mapping[str, Any]
    steps: int
    reference: str = ""
    sharded: bool = False  # the model is one of FSDP2, over this one rank

    def ready(self, home: Place) -> Any:
        """With the digest of a run that nothing disturbs. In the process that loops."""

        def undisturbed() -> str:
            self.join()
            alone = {"kind": None, "steps": self.steps, "resiliency": {"events": None}}
            return Training(0, plan_on(home, **alone, make=self.fields.get("make"))).run().digest

        return replace(self, reference=forked(undisturbed))

    def plan(self, place: Place, seed: int = 0, **more: Any) -> Plan:
        return plan_on(place, **{**self.fields, "steps": self.steps, "seed": seed, **more})

    def prepare(self, place: Place) -> None:
        """An attempt that saved iteration 3 and ended there, in the middle of its work."""
        self.join()
        Training(0, self.plan(place, steps=OLD)).run()

    def join(self) -> None:
        """Before anything is counted: sharding needs a world, even if it is of one."""
        if self.sharded and not dist.is_initialized():
            os.environ.update({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "lo"})
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

    def go_on(self, place: Place, seed: int, resumes: set[int], *acts: Act) -> None:
        """One more attempt in this process, to the end: it resumes where it must, and ends as an undisturbed run."""
        training = Training(0, self.plan(place, seed, acts=acts))
        with training.start() as trainer:
            assert trainer.iteration in resumes, f"resumed from {trainer.iteration}, expected one of {resumes}"
            for batch in trainer.iterations(self.steps):
                training.between(trainer.iteration)
                training.step(batch)
            ended_as_undisturbed(training, self.reference)

    def clean(self, place: Place, held: Held) -> None:
        leaks = held.leaks()
        assert not leaks, leaks
        stray = stray_files(*map(Path, place.roots))
        assert not stray, stray


@dataclass(frozen=True)
class Save(_Job):
    """Saves of one attempt, from when iteration `begins` is finished until that of `ends` is settled.

    The attempt resumes from iteration 3. Saves are due every 3 iterations.
    """

    begins: int = 3
    ends: int = 6

    def attempt(self, place: Place, edge: Edge) -> None:
        self.join()
        held = Held(place.roots)

        def begin(training: Training) -> None:
            edge.armed = True

        def end(training: Training) -> None:
            training.trainer.wait()
            training.trainer._controller.wait_idle(60.0)
            edge.armed = False
            now, new = elected(place, training.plan), self.ends - self.ends % EVERY
            assert now in (new - EVERY, new), f"{now} would be elected"
            assert now == new or edge.struck, "a save that nothing disturbed is the newest"

        self.go_on(place, 1, {OLD}, Act(self.begins, begin), Act(self.ends, end))
        edge.armed = False
        self.afterwards_in_order(place, held)

    def afterwards_in_order(self, place: Place, held: Held) -> None:
        last = self.steps
        assert elected(place, self.plan(place)) == last, "the next save works"
        self.go_on(place, 2, {last})  # in the same process; nothing but a start and an end
        self.clean(place, held)

    def afterwards(self, place: Place) -> None:
        self.join()
        held = Held(place.roots)
        new = self.ends - self.ends % EVERY
        found = elected(place, self.plan(place))
        assert found in (new - EVERY, new), f"{found} would be elected"
        self.go_on(place, 1, {found})
        self.afterwards_in_order(place, held)


@dataclass(frozen=True)
class Restore(_Job):
    """A start, from the trainer's construction to its return: it resumes from iteration 3 or says why it cannot."""

    def attempt(self, place: Place, edge: Edge) -> None:
        self.join()
        held = Held(place.roots)
        training = Training(0, self.plan(place, 1))
        edge.armed = True
        try:
            trainer = training.start()
        except ResilienceError:
            assert edge.struck, "nothing was wrong"
        else:
            edge.armed = False
            assert trainer.iteration == OLD, f"resumed from {trainer.iteration}"
            trainer.close(failed=True)
        edge.armed = False
        leaks = held.leaks()
        assert not leaks, leaks
        self.afterwards(place)
        self.clean(place, held)

    def afterwards(self, place: Place) -> None:
        self.join()
        held = Held(place.roots)
        found = elected(place, self.plan(place))
        assert found == OLD, f"{found} would be elected"
        self.go_on(place, 2, {OLD})
        assert elected(place, self.plan(place)) == self.steps, "the next save works"
        self.clean(place, held)


def small(training: Training) -> None:
    """Few tensors: formats that make a file of each are called often enough with these."""
    training.model = nn.Linear(6, 1)
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.05, momentum=0.5)
    training.scheduler = torch.optim.lr_scheduler.StepLR(training.optimizer, 5, 0.5)


def small_and_sharded(training: Training) -> None:
    training.model = fully_shard(nn.Linear(6, 1))
    training.optimizer = torch.optim.SGD(training.model.parameters(), lr=0.05, momentum=0.5)
    training.scheduler = torch.optim.lr_scheduler.StepLR(training.optimizer, 5, 0.5)
