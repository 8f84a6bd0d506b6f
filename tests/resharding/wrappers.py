"""One small model, wrapped by DDP, FSDP2 or HSDP or cut by torch's own tensor parallelism: what ranks do with it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from resilience import CheckpointConfig, ParallelLayout, ResiliencyConfig, ResilientTrainer
from tests.ranks import run_ranks, values
from tests.resharding.layouts import TIMEOUT_S, Ran, parts_of

#: Ranks of each way to train; "hsdp": two replicas of two shards; "tp": torch's tensor parallelism over two of four.
WORLDS = {"alone": 1, "ddp": 2, "fsdp2": 2, "fsdp3": 3, "fsdp4": 4, "hsdp": 4, "tp": 4}


class Net(nn.Module):
    """Sizes that two and three ranks cannot share evenly."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)
        self.down = nn.Linear(6, 5)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(batch)))


class Average:
    """A running average of the parameters: extra state, cut as they are."""

    def __init__(self, model: nn.Module) -> None:
        self.shadow = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.shadow)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow = state


@dataclass(frozen=True)
class Way:
    kind: str
    memory: str
    steps: int
    save: str | None = None
    load: str | None = None
    average: bool = True


def run(way: Way) -> list[Ran]:
    size = WORLDS[way.kind]
    return values(run_ranks(size, work, way, timeout_s=TIMEOUT_S, distributed=size > 1))


def wrapped(kind: str) -> tuple[nn.Module, ParallelLayout]:
    torch.manual_seed(3)
    model: Any = Net()
    layout = ParallelLayout()
    if kind == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif kind.startswith("fsdp"):
        from torch.distributed.fsdp import fully_shard

        fully_shard(model)
    elif kind == "hsdp":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards")))
    elif kind == "tp":
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

        mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))["tp"]
        parallelize_module(model, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        layout = ParallelLayout(tp=2)
    return model, layout


def work(rank: int, way: Way) -> Ran:
    model, layout = wrapped(way.kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, foreach=False)
    average = Average(model.module if way.kind == "ddp" else model)
    torch.manual_seed(5)  # the same batches on all ranks: replicas stay equal without an exchange
    with ResilientTrainer(
        model,
        optimizer,
        layout=layout,
        extra_state={"average": average} if way.average else None,
        checkpoint=CheckpointConfig(save=way.save, load=way.load),
        resiliency=ResiliencyConfig(memory_dir=way.memory, exchange_timeout_s=60.0),
    ) as trainer:
        resumed = trainer.resumed_from
        parts = parts_of(trainer) if resumed else []
        losses = []
        for _ in trainer.iterations(way.steps):
            loss = model(torch.rand(3, 4)).square().sum()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            for name, parameter in (model.module if way.kind == "ddp" else model).named_parameters():
                average.shadow[name].lerp_(parameter.detach(), 0.5)
            losses.append(float(loss.full_tensor() if hasattr(loss, "full_tensor") else loss))
    whole = {name: _whole(each) for name, each in average.shadow.items()}
    return Ran(
        losses,
        resumed.iteration if resumed else None,
        resumed.notes if resumed else (),
        parts,
        [float(each.double().sum()) for each in whole.values()],
        0,
        0,
    )


def _whole(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
