"""What ranks do in the tests of `fsdp_dtensor`: train with FSDP2, and save and load with nothing but torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from resilience import CheckpointConfig, ResiliencyConfig, ResilientTrainer
from resilience.errors import ConfigError

Whole = dict[str, torch.Tensor]


def sharded_model(seed: int = 0) -> nn.Module:
    """Over all ranks. Nine rows do not divide by two, and one row leaves ranks with nothing."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.BatchNorm1d(9), nn.Linear(9, 1))
    fully_shard(model[0])
    return fully_shard(model)


def meshed_model(kind: str) -> nn.Module:
    """On a mesh of two dimensions: sharded in groups that repeat each other, or tensor-parallel below FSDP."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("outer", "inner"))
    if kind == "replicated":
        return fully_shard(model, mesh=mesh)
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return fully_shard(parallelize_module(model, mesh["inner"], plan), mesh=mesh["outer"])


def save_on_a_mesh(rank: int, root: str, kind: str) -> tuple[Whole, Whole]:
    """Train two iterations on a two-dimensional mesh, and save."""
    model = meshed_model(kind)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    checkpoint = CheckpointConfig(save=root, ckpt_format="fsdp_dtensor")
    resiliency = ResiliencyConfig(node_id="node", memory_dir=str(Path(root).parent / "memory"))
    with ResilientTrainer(model, optimizer, checkpoint=checkpoint, resiliency=resiliency) as trainer:
        for number in trainer.iterations(2):
            batch = torch.randn(4, 6, generator=torch.Generator().manual_seed(number))
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    moments = {name: state["exp_avg"] for name, state in named_moments(model, optimizer).items()}
    return whole(model.state_dict()), whole(moments)


def whole(tensors: dict[str, Any]) -> Whole:
    """Collective: every DTensor in full."""
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in tensors.items()
    }


def named_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    return {name: optimizer.state[parameter] for name, parameter in model.named_parameters()}


def trained(steps: int) -> tuple[nn.Module, torch.optim.AdamW]:
    model = sharded_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for step in range(steps):
        generator = torch.Generator().manual_seed(100 * step + dist.get_rank())
        model(torch.randn(4, 6, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def save_with_plain_dcp(rank: int, folder: str, wrapper: str) -> tuple[Whole, Whole]:
    """As Megatron's FSDP names things; returns the whole model and the whole first moments."""
    model, optimizer = trained(3)
    moments = named_moments(model, optimizer)
    state = {
        "model": {wrapper + name: tensor for name, tensor in model.state_dict().items()},
        "optimizer": {
            "state": {wrapper + name: state for name, state in moments.items()},
            "param_to_group_meta": {wrapper + name: {"lr": 0.05, "betas": (0.9, 0.999)} for name in moments},
        },
        "opt_param_scheduler": {"num_steps": 3, "lr_decay_style": "cosine"},
        "rng_state": {"(0, 0)": [{"torch_rng_state": torch.get_rng_state()}]},
        "checkpoint_version": 3.0,
        "iteration": 7,
    }
    dcp.save(state, checkpoint_id=folder)
    return whole(model.state_dict()), whole({name: state["exp_avg"] for name, state in moments.items()})


def load_with_plain_dcp(rank: int, folder: str) -> tuple[Whole, Whole, dict[str, Any]]:
    """What torch alone reads into a fresh model and optimizer on these ranks."""
    model = sharded_model(seed=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    model(torch.zeros(4, 6)).sum().backward()
    optimizer.step()
    moments = named_moments(model, optimizer)
    state: dict[str, Any] = {
        "model": model.state_dict(),
        "optimizer": {"state": moments, "param_to_group_meta": {name: {"lr": 0.0} for name in moments}},
        "opt_param_scheduler": {"last_epoch": 0},
        "checkpoint_version": 0.0,
        "iteration": 0,
    }
    dcp.load(state, checkpoint_id=folder)
    told = {name: state[name] for name in ("checkpoint_version", "iteration", "opt_param_scheduler")}
    told["group"] = state["optimizer"]["param_to_group_meta"]["0.weight"]
    assert all(each["step"].item() == 4 for each in moments.values())
    return whole(model.state_dict()), whole({name: each["exp_avg"] for name, each in moments.items()}), told


def train_and_save(
    rank: int, root: str, steps: int, resume: bool = True, options: Mapping[str, Any] | None = None
) -> tuple[Whole, Whole, int]:
    """Resume from `root`, train to `steps` iterations and save there."""
    model = sharded_model(seed=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.5)
    load = root if resume else None
    checkpoint = CheckpointConfig(save=root, load=load, ckpt_format="fsdp_dtensor", **options or {})
    resiliency = ResiliencyConfig(node_id="node", memory_dir=str(Path(root).parent / "memory"))
    with ResilientTrainer(
        model, optimizer, scheduler=scheduler, checkpoint=checkpoint, resiliency=resiliency
    ) as trainer:
        began = trainer.iteration
        for number in trainer.iterations(steps):
            generator = torch.Generator().manual_seed(100 * number + rank)
            model(torch.randn(4, 6, generator=generator)).square().mean().backward()
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    moments = {name: state["exp_avg"] for name, state in named_moments(model, optimizer).items()}
    return whole(model.state_dict()), whole(moments), began


def load_with_trainer(rank: int, root: str) -> tuple[Whole, int]:
    """The model that another program saved."""
    model = sharded_model(seed=3)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    checkpoint = CheckpointConfig(load=root)
    resiliency = ResiliencyConfig(node_id="node", run_id="run", memory_dir=str(Path(root).parent / "memory"))
    with ResilientTrainer(model, optimizer, checkpoint=checkpoint, resiliency=resiliency) as trainer:
        return whole(model.state_dict()), trainer.iteration


def start_with_plain_tensors(rank: int, root: str) -> str:
    """A job that the format does not take; returns what it is told."""
    model = nn.Linear(2, 2)
    checkpoint = CheckpointConfig(save=root, ckpt_format="fsdp_dtensor")
    try:
        ResilientTrainer(model, torch.optim.AdamW(model.parameters()), checkpoint=checkpoint).close()
        told = "nothing"
    except ConfigError as error:
        told = str(error)
    dist.barrier()  # a rank that is gone would be a failure of another kind for those that still join
    return told
