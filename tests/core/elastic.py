"""A job that goes on with another number of ranks: what its ranks do, and what they tell of it afterwards.

The batches are the numbers of their samples, so that a test can hold what was seen against the list of all of them.
Parameters are averaged gradients of all samples of a step, so that replicas stay equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from resilience import DistributedOptimizer
from resilience.state.tensors import local_part
from tests.core.training import Act, Ran, Training

SAMPLES = 204  # what the crews of the longest test see in one epoch
BATCH = 2


class Numbers(Dataset[torch.Tensor]):
    """The number of each sample."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor(index)


class Model(nn.Module):
    """Sizes that two and three ranks cannot share evenly; weights that are tied; numbers drawn at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 10)
        self.norm = nn.LayerNorm(10)
        self.drop = nn.Dropout(0.2)
        self.down = nn.Linear(10, 7)
        self.out = nn.Linear(10, 7, bias=False)
        self.out.weight = self.down.weight

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        features = torch.stack([torch.sin(numbers * (k + 1) / 7.0) for k in range(6)], 1)
        hidden = self.drop(torch.tanh(self.norm(self.up(features))))
        return self.down(hidden) + self.out(hidden)


class Counter:
    """Extra state, equal on all ranks."""

    def __init__(self) -> None:
        self.seen = torch.zeros(3)

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def world_of(training: Training) -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def elastic(training: Training, batch: int = BATCH) -> None:
    """Replicated state: one model on every rank, samples shared out."""
    rank, size = world_of(training)
    torch.manual_seed(training.plan.seed)
    training.model = Model()
    training.optimizer = torch.optim.AdamW(training.model.parameters(), lr=0.01)
    training.scheduler = torch.optim.lr_scheduler.StepLR(training.optimizer, 5, 0.5)
    sampler: DistributedSampler[torch.Tensor] = DistributedSampler(Numbers(), size, rank, seed=3)
    training.loader = DataLoader(Numbers(), batch, sampler=sampler, drop_last=True)
    training.extra = {"counter": Counter()}
    torch.manual_seed(1000 * training.plan.seed + rank)
    watch(training)


def sharded(training: Training) -> None:
    """FSDP2: parameters and optimizer state are DTensors."""
    from torch.distributed.fsdp import fully_shard

    elastic(training)
    torch.manual_seed(training.plan.seed)
    training.model = Model()
    fully_shard(training.model)
    training.optimizer = torch.optim.AdamW(training.model.parameters(), lr=0.01, foreach=False)
    training.scheduler = torch.optim.lr_scheduler.StepLR(training.optimizer, 5, 0.5)
    torch.manual_seed(1000 * training.plan.seed + training.rank)
    watch(training)


def divided(training: Training) -> None:
    """A distributed optimizer: main parameters in float32 and moments lie in slices over the ranks."""
    elastic(training)
    training.model = training.model.to(torch.bfloat16)
    group = dist.group.WORLD if dist.is_initialized() else None
    training.optimizer = DistributedOptimizer(
        training.model.parameters(), torch.optim.AdamW, process_group=group, lr=0.01
    )
    training.scheduler = None
    watch(training)


def watch(training: Training) -> None:
    """Put the sample numbers, with the iteration that they were seen in, into the notes; step on what they say."""

    def step(batch: torch.Tensor) -> None:
        training.notes.append((training.trainer.iteration + 1, tuple(batch.tolist())))
        dtype = next(training.model.parameters()).dtype
        loss = training.model(batch.to(dtype)).square().mean()
        loss.backward()
        if dist.is_initialized() and not hasattr(next(training.model.parameters()), "placements"):
            for parameter in training.model.parameters():
                if parameter.grad is not None and not isinstance(training.optimizer, DistributedOptimizer):
                    dist.all_reduce(parameter.grad)
                    parameter.grad /= dist.get_world_size()
        for counter in training.extra.values():
            counter.seen += 1
        training.optimizer.step()
        if training.scheduler is not None:
            training.scheduler.step()
        training.optimizer.zero_grad()

    training.step = step  # type: ignore[method-assign]


def whole_state(training: Training) -> dict[str, torch.Tensor]:
    """Model and optimizer, put together from all ranks, by key and part."""
    found: dict[str, torch.Tensor] = {}
    for item in training.trainer._state.collect(("model", "optimizer", "extra")).items:
        found[f"{item.key} {item.global_shape} {item.offsets} {tuple(item.tensor.shape)}"] = (
            local_part(item.tensor).detach().float().clone()
        )
    return found


def note_whole(training: Training) -> None:
    """What this rank holds goes into its notes."""
    training.notes.append(("held", whole_state(training)))


def put_together(ran: Sequence[Ran], which: int = -1) -> dict[str, torch.Tensor]:
    """The whole tensors that the ranks noted; parts at one place have to be the same."""
    whole: dict[str, torch.Tensor] = {}
    for each in ran:
        held = [note[1] for note in each.notes if note[0] == "held"][which]
        for described, tensor in held.items():
            key, shape, offsets, size = _parsed(described)
            key = key.partition("/~[")[0]
            out = whole.setdefault(key, torch.full(shape, float("nan")))
            place = tuple(slice(start, start + length) for start, length in zip(offsets, size, strict=True))
            there = out[place]
            known = ~there.isnan()
            assert torch.equal(there[known], tensor[known]), key
            out[place] = tensor
    assert not any(tensor.isnan().any() for tensor in whole.values())
    return whole


def _parsed(described: str) -> tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    import re

    match = re.fullmatch(r"(.*) (\([^)]*\)) (\([^)]*\)) (\([^)]*\))", described)
    assert match is not None
    shapes = [tuple(int(each) for each in re.findall(r"\d+", text)) for text in match.groups()[1:]]
    return match[1], shapes[0], shapes[1], shapes[2]


def seen(ran: Sequence[Ran], until: int) -> list[int]:
    """Sample numbers that all ranks saw up to that iteration."""
    return [
        number for each in ran for note in each.notes if note[0] != "held" and note[0] <= until for number in note[1]
    ]


NOTED = Act(10**6, note_whole)
