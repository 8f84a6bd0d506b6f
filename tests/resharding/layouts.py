"""What ranks of the example transformer do in the tests of other layouts: train, save, resume, show what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from examples.parallel_gpt import Training
from resilience import CheckpointConfig, ParallelLayout, ResiliencyConfig
from resilience.formats.protocol import Target
from resilience.formats.registry import open_checkpoint
from resilience.state.sharding import without_block
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.shared_records import folder_name
from tests.ranks import run_ranks, values

TIMEOUT_S = 240.0

Sizes = Mapping[str, int]
#: One part of a tensor: key, whole shape, offsets, content.
Part = tuple[str, tuple[int, ...], tuple[int, ...], torch.Tensor]


@dataclass(frozen=True)
class Start:
    """One start of the job. `save`: where it saves; `load`: where it looks for what to go on from."""

    sizes: Sizes
    memory: str
    steps: int
    save: str | None = None
    load: str | None = None
    dropout: float = 0.0
    every: int = 5
    options: tuple[tuple[str, Any], ...] = ()
    run_id: str | None = None
    keep: bool = False  # what lies on the nodes, although the run has finished
    divided: bool = False  # with a distributed optimizer


@dataclass(frozen=True)
class Ran:
    """What one rank tells of a start."""

    losses: list[float]
    resumed: int | None
    notes: tuple[str, ...]
    parts: list[Part]  # of model and optimizer, as they were right after the load
    lr: list[float]
    consumed: int
    position: int


def world_of(sizes: Sizes) -> int:
    result = 1
    for name, size in sizes.items():
        result *= 1 if name == "ep" else size
    return result


def run(start: Start) -> list[Ran]:
    return values(
        run_ranks(world_of(start.sizes), work, start, timeout_s=TIMEOUT_S, distributed=world_of(start.sizes) > 1)
    )


def work(rank: int, start: Start) -> Ran:
    training = Training(ParallelLayout(**start.sizes), start.dropout, divided=start.divided)
    interval = {"save_interval": start.every} if start.save else {}
    checkpoint = CheckpointConfig(save=start.save, load=start.load, **interval, **dict(start.options))
    resiliency = ResiliencyConfig(
        run_id=start.run_id, memory_dir=start.memory, exchange_timeout_s=60.0, keep_after_success=start.keep
    )
    with training.trainer(checkpoint=checkpoint, resiliency=resiliency) as trainer:
        resumed = trainer.resumed_from
        parts = parts_of(trainer) if resumed else []
        lr, consumed = training.schedulers[0].get_last_lr(), trainer.train_state.consumed_train_samples
        position = trainer._state.loader.position()
        losses = training.run(trainer, start.steps)
    return Ran(
        losses, resumed.iteration if resumed else None, resumed.notes if resumed else (), parts, lr, consumed, position
    )


def parts_of(trainer: Any) -> list[Part]:
    items = trainer._state.collect(("model", "optimizer")).items
    return [(without_block(i.key), i.global_shape, i.offsets, i.tensor.detach().clone()) for i in items]


def stored(root: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every whole tensor of the model and the optimizer in a checkpoint; second names of one are left out."""
    reader = open_checkpoint(root / folder_name(iteration), PosixFileSystem())
    try:
        wholes = {
            key: torch.empty(entry.global_shape, dtype=entry.dtype)
            for key, entry in reader.index.items()
            if key.startswith(("model/", "optimizer/")) and key not in reader.aliases
        }
        reader.read([Target(key, whole, (0,) * whole.dim()) for key, whole in wholes.items()])
    finally:
        reader.close()
    return wholes


def assert_ranks_hold(ranks: Sequence[Ran], wholes: Mapping[str, torch.Tensor]) -> None:
    """What all ranks hold together is what is stored, to the bit: every part of every tensor, and nothing else."""
    held: dict[str, torch.Tensor] = {}
    for ran in ranks:
        for key, shape, offsets, part in ran.parts:
            assert key in wholes, f"{key} is on a rank and not in the checkpoint"
            whole = wholes[key]
            assert shape == tuple(whole.shape), key
            here = tuple(slice(start, start + length) for start, length in zip(offsets, part.shape, strict=True))
            assert part.dtype == whole.dtype, key
            assert torch.equal(part, whole[here]), f"{key} at {offsets}"
            held.setdefault(key, torch.zeros(whole.shape, dtype=torch.bool))[here] = True
    assert held.keys() == wholes.keys()
    assert all(bool(seen.all()) for seen in held.values())
