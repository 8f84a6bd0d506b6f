"""One small model under DDP with an optimizer that is divided over the ranks, or is not: what ranks do with it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer

from resilience import CheckpointConfig, ParallelLayout, ResiliencyConfig, ResilientTrainer, shard
from resilience.state.distributed_optimizer import DistributedOptimizer
from tests.ranks import run_ranks, values
from tests.resharding.layouts import Part, parts_of

TIMEOUT_S = 240.0
BATCH = 12  # every number of ranks shares it evenly


class Net(nn.Module):
    """Sizes that no number of ranks shares evenly; under tensor parallelism `up`'s two sections and `down` are cut."""

    def __init__(self, tp: int = 1, tp_rank: int = 0) -> None:
        super().__init__()
        hidden = 6 // tp
        whole = [torch.randn(2, 6, 5), torch.randn(2, 6), torch.randn(7, 6), torch.randn(7)]
        mine = slice(tp_rank * hidden, (tp_rank + 1) * hidden)
        self.up = shard(nn.Parameter(whole[0][:, mine].reshape(-1, 5)), 0, tp_rank, tp, stacked=2)
        self.up_bias = shard(nn.Parameter(whole[1][:, mine].reshape(-1)), 0, tp_rank, tp, stacked=2)
        self.down = shard(nn.Parameter(whole[2][:, mine].clone()), 1, tp_rank, tp)
        self.down_bias = nn.Parameter(whole[3])
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, batch: torch.Tensor, tp_group: dist.ProcessGroup | None = None) -> torch.Tensor:
        gate, up = (batch @ self.up.t() + self.up_bias).chunk(2, dim=-1)
        return (torch.tanh(gate) * up) @ self.down.t() * self.scale + self.down_bias


@dataclass(frozen=True)
class Way:
    """How a job is run. `kind`: "divided", "plain" for AdamW itself, "zero" for torch's optimizer that shares out whole
    parameters. `kill_at`: a step in which all are killed."""

    size: int
    memory: str
    steps: int
    save: str | None = None
    load: str | None = None
    kind: str = "divided"
    dtype: str = "float32"
    tp: int = 1
    bucket_numel: int | None = None
    options: tuple[tuple[str, Any], ...] = ()
    kill_at: int = -1
    run_id: str | None = None
    in_buckets: bool = False  # how a divided optimizer's state is stored


@dataclass(frozen=True)
class Ran:
    """What one rank tells. `parts`: model and optimizer right after the load; `last`: the same at the end."""

    losses: list[float]
    resumed: int | None
    tier: str
    parts: list[Part]
    last: list[Part]
    kept: int  # elements of the optimizer's first moment


def run(way: Way) -> list[Ran]:
    return values(run_ranks(way.size, work, way, timeout_s=TIMEOUT_S, distributed=way.size > 1))


def built(way: Way, rank: int) -> tuple[nn.Module, Any, ParallelLayout, dist.ProcessGroup | None]:
    torch.manual_seed(3)
    net = Net(way.tp, rank % way.tp).to(getattr(torch, way.dtype))
    layout, group = ParallelLayout(tp=way.tp), None
    if way.tp > 1:
        groups = [dist.new_group(list(range(first, way.size, way.tp))) for first in range(way.tp)]
        group = groups[rank % way.tp]
    big = [each for each in net.parameters() if each.dim() > 1]
    rest = [each for each in net.parameters() if each.dim() <= 1]
    trained = [{"params": big, "weight_decay": 0.1}, {"params": rest, "lr": 0.02}]
    if way.kind == "plain":
        return net, torch.optim.AdamW(trained, lr=0.05, foreach=False), layout, group
    if way.kind == "zero":
        zero: Any = ZeroRedundancyOptimizer(trained, torch.optim.AdamW, process_group=group, lr=0.05, foreach=False)
        return net, zero, layout, group
    optimizer = DistributedOptimizer(
        trained, torch.optim.AdamW, process_group=group, bucket_numel=way.bucket_numel, lr=0.05, foreach=False
    )
    return net, optimizer, layout, group


def work(rank: int, way: Way) -> Ran:
    net, optimizer, layout, group = built(way, rank)
    model: Any = nn.parallel.DistributedDataParallel(net) if way.tp == 1 and way.size > 1 else net
    torch.manual_seed(5)  # the same batches whoever looks at them
    losses: list[float] = []
    with ResilientTrainer(
        model,
        optimizer,
        layout=layout,
        checkpoint=CheckpointConfig(
            save=way.save,
            load=way.load,
            **{"dist_ckpt_optim_fully_reshardable": not way.in_buckets, **dict(way.options)},
        ),
        resiliency=ResiliencyConfig(memory_dir=way.memory, run_id=way.run_id, exchange_timeout_s=60.0),
    ) as trainer:
        resumed = trainer.resumed_from
        parts = parts_of(trainer) if resumed else []
        for step in trainer.iterations(way.steps):
            losses.append(_step(model, net, rank, way))
            if step == way.kill_at:
                trainer.wait()  # for the saves until here: what is resumed does not depend on who is quicker
                _die_together(rank, way)
            _sum_of_replicas(net, way, group)
            optimizer.step()
            optimizer.zero_grad()
        last = parts_of(trainer)
    kept = sum(part.numel() for key, _, _, part in last if key.endswith("/exp_avg"))
    return Ran(losses, resumed.iteration if resumed else None, resumed.tier if resumed else "", parts, last, kept)


def _die_together(rank: int, way: Way) -> None:
    """As `kill -9`, and none before all have come here: a rank whose peer died first would raise an error instead."""
    marks = [Path(f"{way.memory}.dying-{peer}") for peer in range(way.size)]
    marks[rank].touch()
    until = time.monotonic() + 60
    while not all(mark.exists() for mark in marks) and time.monotonic() < until:
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)


def _step(model: nn.Module, net: nn.Module, rank: int, way: Way) -> float:
    whole = torch.rand(BATCH, 5)
    mine = whole.chunk(way.size)[rank] if way.tp == 1 else whole
    loss = model(mine.to(getattr(torch, way.dtype))).float().square().mean()
    loss.backward()
    return float(loss)


def _sum_of_replicas(net: nn.Module, way: Way, group: dist.ProcessGroup | None) -> None:
    """Equal gradients where parameters are equal; DistributedDataParallel has seen to it without tensor parallelism."""
    if way.tp > 1:
        for name, parameter in net.named_parameters():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad, group=None if name in ("down_bias", "scale") else group)


def whole_of(ranks: Sequence[Sequence[Part]]) -> dict[str, torch.Tensor]:
    """What all ranks hold together, by key; every element of it is on some rank."""
    wholes: dict[str, torch.Tensor] = {}
    seen: dict[str, torch.Tensor] = {}
    for key, shape, offsets, part in (each for parts in ranks for each in parts):
        here = tuple(slice(start, start + length) for start, length in zip(offsets, part.shape, strict=True))
        wholes.setdefault(key, torch.zeros(shape, dtype=part.dtype))[here] = part
        seen.setdefault(key, torch.zeros(shape, dtype=torch.bool))[here] = True
    assert all(bool(each.all()) for each in seen.values()), "a part is on no rank"
    return wholes
