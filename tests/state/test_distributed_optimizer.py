"""The optimizer that is divided over the ranks steps as the undivided one does, and says what it cannot take."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist

from resilience.errors import ConfigError
from resilience.state.distributed_optimizer import DistributedOptimizer
from tests.ranks import run_ranks, values


def model(dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    torch.manual_seed(3)
    return torch.nn.Sequential(torch.nn.Linear(7, 9), torch.nn.LayerNorm(9), torch.nn.Linear(9, 5)).to(dtype)


def steps(net: torch.nn.Module, optimizer: torch.optim.Optimizer, count: int = 5, halve_every: int = 2) -> None:
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, halve_every, 0.5)
    generator = torch.Generator().manual_seed(11)
    for _ in range(count):
        optimizer.zero_grad()
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        optimizer.step()
        scheduler.step()


def groups(net: torch.nn.Module) -> list[dict[str, Any]]:
    weights = [each for each in net.parameters() if each.dim() > 1]
    return [
        {"params": weights, "weight_decay": 0.1},
        {"params": [e for e in net.parameters() if e.dim() == 1], "lr": 0.01},
    ]


def stepped(rank: int, dtype_name: str, bucket_numel: int | None) -> tuple[list[Any], int, int]:
    net = model(getattr(torch, dtype_name))
    optimizer = DistributedOptimizer(
        groups(net), torch.optim.AdamW, lr=0.1, weight_decay=0.0, bucket_numel=bucket_numel
    )
    steps(net, optimizer)
    kept = sum(part.main.numel() for part in optimizer.slices())
    state = sum(optimizer.state_of(part)["exp_avg"].numel() for part in optimizer.slices())
    return [parameter.detach().float().numpy() for parameter in net.parameters()], kept, state


@pytest.mark.parametrize("bucket_numel", [None, 60])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_float32_parameters_end_where_the_undivided_optimizer_takes_them(size: int, bucket_numel: int | None) -> None:
    net = model()
    steps(net, torch.optim.AdamW(groups(net), lr=0.1, weight_decay=0.0))
    ranks = values(run_ranks(size, stepped, "float32", bucket_numel))
    for found, _, _ in ranks:
        for parameter, its in zip(net.parameters(), found, strict=True):
            torch.testing.assert_close(torch.from_numpy(its), parameter.detach(), rtol=1e-6, atol=1e-7)
    count = sum(parameter.numel() for parameter in net.parameters())
    assert sum(kept for _, kept, _ in ranks) == sum(state for _, _, state in ranks) == count


def test_bfloat16_parameters_follow_main_parameters_of_float32_on_every_rank() -> None:
    exact = model(torch.bfloat16).float()
    steps_of_rounded_gradients(exact)
    for found, _, _ in values(run_ranks(2, stepped, "bfloat16", None)):
        for parameter, its in zip(exact.parameters(), found, strict=True):
            rounded = parameter.detach().to(torch.bfloat16).float()
            torch.testing.assert_close(torch.from_numpy(its), rounded, rtol=1e-2, atol=1e-6)


def steps_of_rounded_gradients(net: torch.nn.Module) -> None:
    optimizer = torch.optim.AdamW(groups(net), lr=0.1, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    generator = torch.Generator().manual_seed(11)
    for _ in range(5):
        for parameter in net.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator).to(torch.bfloat16).float()
        optimizer.step()
        scheduler.step()


def reloaded(rank: int) -> bool:
    net = model()
    optimizer = DistributedOptimizer(net.parameters(), torch.optim.AdamW, lr=0.1)
    steps(net, optimizer, 2, halve_every=100)
    state = copy.deepcopy(optimizer.state_dict())
    steps(net, optimizer, 2, halve_every=100)
    after = [parameter.detach().clone() for parameter in net.parameters()]
    optimizer.load_state_dict(state)
    optimizer.publish()
    steps(net, optimizer, 2, halve_every=100)
    dist.barrier()
    return all(torch.equal(mine, its) for mine, its in zip(net.parameters(), after, strict=True))


def test_a_ranks_own_state_goes_back_into_it() -> None:
    assert values(run_ranks(2, reloaded)) == [True, True]


def test_main_parameters_are_remade_from_parameters_that_somebody_filled() -> None:
    net = model(torch.bfloat16)
    optimizer = DistributedOptimizer(net.parameters(), torch.optim.SGD, lr=0.5)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(3.0)
    optimizer.remake_main_parameters()
    assert all(bool((part.main == 3.0).all()) for part in optimizer.slices())


def test_what_it_cannot_take_is_refused_in_words() -> None:
    net = model()
    optimizer = DistributedOptimizer(net.parameters(), torch.optim.AdamW)
    with pytest.raises(ConfigError, match="no further param group"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.zeros(3))]})
    with pytest.raises(ConfigError, match="cannot be trained"):
        DistributedOptimizer(
            [torch.nn.Parameter(torch.zeros(3, dtype=torch.int64), requires_grad=False)], torch.optim.SGD
        )
    with pytest.raises(ConfigError, match="bucket_numel is 0"):
        DistributedOptimizer(model().parameters(), torch.optim.AdamW, bucket_numel=0)
    state = copy.deepcopy(optimizer.state_dict())
    other = torch.nn.Linear(40, 50)
    with pytest.raises(ConfigError, match="buckets with parts"):
        DistributedOptimizer(other.parameters(), torch.optim.AdamW).load_state_dict(state)
