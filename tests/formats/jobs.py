"""Small training jobs of one process, for tests that look at what a resume does with a persistent checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resilience import CheckpointConfig, ResiliencyConfig, ResilientTrainer
from resilience.reports import Resume


class Net(nn.Module):
    """Two layers; `more` adds a third, `adapter` a low-rank pair, and then all else is frozen."""

    def __init__(self, *, more: bool = False, adapter: bool = False, less: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(3, 4)
        if not less:
            self.down = nn.Linear(4, 2)
        if more:
            self.extra = nn.Linear(2, 2)
        if adapter:
            for parameter in self.parameters():
                parameter.requires_grad_(False)
            self.lora = nn.Linear(3, 4, bias=False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        hidden = self.up(batch)
        if hasattr(self, "lora"):
            hidden = hidden + self.lora(batch)
        hidden = hidden if not hasattr(self, "down") else self.down(hidden)
        return self.extra(hidden) if hasattr(self, "extra") else hidden


def tensors_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: each.clone() for name, each in model.state_dict().items() if isinstance(each, torch.Tensor)}


@dataclass
class Job:
    """One start in `root`: builds everything afresh under `seed`, resumes, and trains to `steps` if asked."""

    root: Path
    seed: int = 0
    make: Callable[[], nn.Module] = Net
    optimizer: Callable[[nn.Module], Any] = lambda model: torch.optim.AdamW(
        [each for each in model.parameters() if each.requires_grad], lr=0.1
    )
    options: dict[str, Any] = field(default_factory=dict)
    resiliency: dict[str, Any] = field(default_factory=dict)
    trainer_arguments: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.model = self.make().to(self.dtype)
        self.before = tensors_of(self.model)
        self.opt = self.optimizer(self.model)
        self.scheduler = (
            torch.optim.lr_scheduler.StepLR(self.opt, 3, 0.5) if isinstance(self.opt, torch.optim.Optimizer) else None
        )

    def run(self, steps: int | None = None) -> Job:
        """Resume, and train until `steps` iterations are finished (None: not at all)."""
        options = {"save": str(self.root), "load": str(self.root), **self.options}
        resiliency = {"events": str(self.root.parent / "events"), "memory_dir": str(self.root.parent / "mem")}
        with ResilientTrainer(
            self.model, self.opt, scheduler=self.scheduler, checkpoint=CheckpointConfig(**options),
            resiliency=ResiliencyConfig(**resiliency | self.resiliency), **self.trainer_arguments,
        ) as trainer:  # fmt: skip
            self.loaded = tensors_of(self.model)
            with torch.random.fork_rng():
                self.drawn = torch.rand(1).item()  # what would be drawn next
            self.step, self.resumed = trainer.iteration, trainer.resumed_from
            self.counters = trainer.train_state.to_dict()
            if steps is not None:
                for _ in trainer.iterations(steps):
                    self.train()
                    trainer.train_state.consumed_train_samples += 5
                trainer.wait()
        return self

    def train(self) -> None:
        self.model(torch.randn(5, 3).to(self.dtype)).float().square().mean().backward()
        self.opt.step()
        if self.scheduler is not None:
            self.scheduler.step()
        self.opt.zero_grad()

    @property
    def resume(self) -> Resume:
        assert self.resumed is not None
        return self.resumed

    @property
    def moments(self) -> dict[str, torch.Tensor]:
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {names[id(parameter)]: state["exp_avg"] for parameter, state in self.opt.state.items()}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
