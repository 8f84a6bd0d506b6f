"""Two real processes that train together over gloo, and what each of them does: code that child processes import."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from resilience.errors import LayoutMismatchError
from resilience.state import TrainingState, state_digest
from tests.state.saving import restore, save_of


class Net(nn.Module):
    """Sizes that two ranks cannot halve: a shard of one has three rows, of another none."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 5)
        self.drop = nn.Dropout(0.2)
        self.down = nn.Linear(5, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        self.seen += len(batch)
        return self.down(self.drop(self.up(batch).relu()))


class Average:
    """A running average of parameters, kept as DTensors: extra state that is sharded like the model."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.shadow = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def update(self) -> None:
        for name, parameter in self.model.named_parameters():
            self.shadow[name].lerp_(parameter.detach(), 0.5)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.shadow)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow = state


class Run:
    """One rank of a sharded (FSDP2) or replicated (DDP) training run."""

    def __init__(self, rank: int, kind: str, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model: Any = Net()
        if kind == "fsdp":
            fully_shard(self.model.up)
            fully_shard(self.model)
        else:
            self.model = nn.parallel.DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.average = Average(self.model)
        self.state = TrainingState(self.model, self.optimizer, extra_state={"average": self.average})
        torch.manual_seed(100 * seed + rank)  # each rank drops and draws for itself

    def train(self, steps: int) -> Run:
        for _ in range(steps):
            self.optimizer.zero_grad()
            self.model(torch.rand(3, 4)).square().mean().backward()
            self.optimizer.step()
            self.average.update()
        return self


def resume(rank: int, kind: str) -> dict[str, Any]:
    """Train 7 steps; train 3, save, restore into a fresh run, train 4: both digests, and what the items were."""
    ended = state_digest(Run(rank, kind).train(7).state.collect())
    collected = Run(rank, kind).train(3).state.collect()
    save = save_of(collected)
    resumed = Run(rank, kind, seed=1)
    restore(resumed.state, save)
    restored = resumed.state.collect()
    weight = next(iter(resumed.optimizer.state))
    kinds = {name: type(value) is type(weight.data) for name, value in resumed.optimizer.state[weight].items()}
    same = state_digest(restored) == state_digest(collected)
    return {
        "same": state_digest(resumed.train(4).state.collect()) == ended
        and (restored.values == collected.values)
        and same,
        "items": {
            item.key: (item.global_shape, item.offsets, tuple(item.tensor.shape), item.replicated)
            for item in collected.items
        },
        "kinds": kinds,
        "average": all(isinstance(each, DTensor) for each in resumed.average.shadow.values()),
    }


def resume_sharded(rank: int) -> dict[str, Any]:
    return resume(rank, "fsdp")


def resume_replicated(rank: int) -> dict[str, Any]:
    return resume(rank, "ddp")


def load_the_others_shard(rank: int) -> str:
    """Plan a load of what the other rank saved: it is another part of the same tensors."""
    state = Run(rank, "fsdp").train(1).state
    save = save_of(state.collect())
    index = copy.deepcopy(save.index)
    for key, item in index.items():
        if item.shape != item.global_shape:
            moved = tuple(0 if offset else length for offset, length in zip(item.offsets, item.shape, strict=True))
            object.__setattr__(item, "offsets", moved)
            index[key] = item
    try:
        state.plan_load(save.values, index)
    except LayoutMismatchError as error:
        return str(error)
    return ""
