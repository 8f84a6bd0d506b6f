"""Training that was stopped and resumed in fresh objects ends in the very bits of training that was not."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.utils.data import DataLoader, Dataset

from resilience.state import TrainingState, state_digest
from tests.state.saving import restore, save_of

Build = Callable[[nn.Module], Any]


class Noisy(Dataset[torch.Tensor]):
    """Items with augmentations from all three global generators."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((4,), float(index)) + torch.rand(4) + random.random() + np.random.rand()


class Net(nn.Module):
    """Dropout (RNG), batch norm (buffers), tied weights, a bfloat16 part and a frozen one."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.3)
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.first.weight
        self.low = nn.Linear(4, 2).to(torch.bfloat16)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        hidden = self.tied(self.drop(self.norm(self.first(batch))))
        return self.low((hidden + self.frozen(batch)).to(torch.bfloat16)).float()


class Run:
    """One training process: builds everything afresh under a seed, trains, and can be collected and restored."""

    def __init__(self, optimizer: Build, scheduler: Build | None = None, seed: int = 0, scaler: bool = False) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        self.model = Net()
        self.optimizer = optimizer(self.model)
        self.scheduler = scheduler(self.optimizer) if scheduler else None
        self.scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2) if scaler else None
        self.state = TrainingState(
            self.model,
            self.optimizer,
            scheduler=self.scheduler,
            dataloader=DataLoader(Noisy(), batch_size=2, shuffle=True),
            scaler=self.scaler,
        )

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            batch = self.state.loader.next_batch()

            def closure(batch: torch.Tensor = batch) -> torch.Tensor:
                self.optimizer.zero_grad()
                loss = self.model(batch).square().mean()
                (self.scaler.scale(loss) if self.scaler else loss).backward()
                return loss

            if isinstance(self.optimizer, torch.optim.LBFGS):
                loss = self.optimizer.step(closure)
            else:
                loss = closure().detach()
                self.scaler.step(self.optimizer) if self.scaler else self.optimizer.step()
                if self.scaler:
                    self.scaler.update()
            if isinstance(self.scheduler, schedulers.ReduceLROnPlateau):
                self.scheduler.step(loss.item())
            elif self.scheduler:
                self.scheduler.step()
            self.state.train_state.step += 1
        return self

    @property
    def digest(self) -> str:
        """Of this run now; its random state is the process's, so take it before another run goes on."""
        return state_digest(self.state.collect())


def check_that_resuming_changes_nothing(build: Callable[[int], Run]) -> None:
    undisturbed = build(0).train(7)
    ended = undisturbed.digest
    stopped = build(0).train(3)
    save, digest = save_of(stopped.state.collect()), stopped.digest
    resumed = build(1)  # another seed: what the restore forgets shows
    restore(resumed.state, save)
    assert resumed.digest == digest
    assert resumed.train(4).digest == ended
    for name, value in undisturbed.model.state_dict().items():
        assert torch.equal(value, resumed.model.state_dict()[name]), name


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def with_added_group(model: nn.Module) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.first.parameters(), lr=0.01)
    optimizer.add_param_group({"params": [*model.norm.parameters(), model.tied.bias], "lr": 0.1})
    optimizer.add_param_group({"params": list(model.low.parameters()), "weight_decay": 0.5, "name": "low"})
    return optimizer


OPTIMIZERS: dict[str, Build] = {
    "Adam": lambda m: torch.optim.Adam(trained(m), lr=0.01, amsgrad=True),
    "AdamW foreach": lambda m: torch.optim.AdamW(trained(m), lr=0.01, foreach=True),
    "AdamW fused": lambda m: torch.optim.AdamW([p for p in trained(m) if p.dtype == torch.float32], fused=True),
    "AdamW with a tensor lr": lambda m: torch.optim.AdamW(trained(m), lr=torch.tensor(0.01), foreach=False),
    "SGD": lambda m: torch.optim.SGD(trained(m), lr=0.01),
    "SGD momentum": lambda m: torch.optim.SGD(trained(m), lr=0.01, momentum=0.9, nesterov=True),
    "LBFGS": lambda m: torch.optim.LBFGS([p for p in trained(m) if p.dtype == torch.float32], max_iter=3),
    "LBFGS strong Wolfe": lambda m: torch.optim.LBFGS(
        [p for p in trained(m) if p.dtype == torch.float32], max_iter=3, line_search_fn="strong_wolfe"
    ),
    "Adafactor": lambda m: torch.optim.Adafactor(trained(m)),
    "RMSprop": lambda m: torch.optim.RMSprop(trained(m), momentum=0.1, centered=True),
    "Adagrad": lambda m: torch.optim.Adagrad(trained(m)),
    "NAdam": lambda m: torch.optim.NAdam(trained(m)),
    "added groups": with_added_group,
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_ends_alike_with(name: str) -> None:
    check_that_resuming_changes_nothing(lambda seed: Run(OPTIMIZERS[name], seed=seed))


def sequential(optimizer: Any) -> Any:
    parts = [schedulers.LinearLR(optimizer, total_iters=2), schedulers.CosineAnnealingLR(optimizer, T_max=5)]
    return schedulers.SequentialLR(optimizer, parts, milestones=[2])


SCHEDULERS: dict[str, Build] = {
    "StepLR": lambda o: schedulers.StepLR(o, step_size=2),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda step: 0.9**step),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, max_lr=0.1, total_steps=20),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=2, cycle_momentum=False),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=0),
    "SequentialLR": sequential,
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ExponentialLR(o, 0.9), schedulers.StepLR(o, 2)]
    ),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, T_0=2),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.05, anneal_epochs=5),
}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore:To get the last learning rate:UserWarning")
def test_a_resumed_run_ends_alike_with_scheduler(name: str) -> None:
    check_that_resuming_changes_nothing(lambda seed: Run(OPTIMIZERS["AdamW foreach"], SCHEDULERS[name], seed))


def test_a_resumed_run_ends_alike_with_a_gradient_scaler() -> None:
    def build(seed: int) -> Run:
        return Run(OPTIMIZERS["SGD momentum"], seed=seed, scaler=True)

    check_that_resuming_changes_nothing(build)
    assert build(0).train(3).scaler.get_scale() == 16.0  # it did move, so that there was something to restore


@pytest.mark.parametrize("steps", [0, 5, 6, 7, 13])
def test_the_place_in_the_data_is_found_at_and_around_the_end_of_an_epoch(steps: int) -> None:
    ended = Run(OPTIMIZERS["SGD"]).train(steps + 4).digest
    save = save_of(Run(OPTIMIZERS["SGD"]).train(steps).state.collect())
    resumed = Run(OPTIMIZERS["SGD"], seed=1)
    restore(resumed.state, save)
    assert resumed.train(4).digest == ended
    assert resumed.state.loader.position() == steps + 4


def test_collecting_changes_nothing() -> None:
    ended = Run(OPTIMIZERS["Adam"]).train(4).digest
    watched = Run(OPTIMIZERS["Adam"])
    for _ in range(4):
        watched.state.collect()
        watched.train(1)
    assert watched.digest == ended


def test_equal_states_give_equal_values_and_items() -> None:
    one, other = (Run(OPTIMIZERS["Adam"], SCHEDULERS["OneCycleLR"]).train(3).state.collect() for _ in range(2))
    assert one.values == other.values
    assert [item.key for item in one.items] == [item.key for item in other.items]


def test_a_save_can_be_restored_into_the_run_that_went_on() -> None:
    run = Run(OPTIMIZERS["Adam"], SCHEDULERS["SequentialLR"]).train(3)
    save = save_of(run.state.collect())
    ended = run.train(4).digest
    restore(run.state, save)
    assert run.train(4).digest == ended


def test_a_run_resumed_twice_ends_alike() -> None:
    run = Run(OPTIMIZERS["Adam"], SCHEDULERS["OneCycleLR"])
    for seed in (1, 2, 3):
        save = save_of(run.train(2).state.collect())
        run = Run(OPTIMIZERS["Adam"], SCHEDULERS["OneCycleLR"], seed)
        restore(run.state, save)
    ended = run.train(1).digest
    assert ended == Run(OPTIMIZERS["Adam"], SCHEDULERS["OneCycleLR"]).train(7).digest
