"""A distributed optimizer whose state lies in buckets goes through a conversion and on, for any number of ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from resilience import CheckpointConfig, DistributedOptimizer, ResiliencyConfig, ResilientTrainer
from resilience.formats.convert import convert
from resilience.stores.filesystem import PosixFileSystem
from tests.ranks import run_ranks, values


def train(rank: int, root: str, form: str, steps: int, seed: int) -> tuple[int, list[float]]:
    """Where it resumed, and its weights there; then it trains to `steps`, alike on all ranks."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)).bfloat16()
    optimizer = DistributedOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)
    checkpoint = CheckpointConfig(save=root, load=root, save_interval=2, ckpt_format=form)
    limits = ResiliencyConfig(node_id="a", memory_dir=f"{root}-memory")
    with ResilientTrainer(model, optimizer, checkpoint=checkpoint, resiliency=limits) as trainer:
        resumed = trainer.iteration
        weights = [value for each in model.parameters() for value in each.flatten().tolist()]
        for number in trainer.iterations(steps):
            generator = torch.Generator().manual_seed(number)
            model(torch.randn(4, 5, generator=generator).bfloat16()).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return resumed, weights


def final(root: Path, form: str, ranks: int) -> list[float]:
    """The weights after two more iterations, and that they began at the fourth."""
    (resumed, _), *_ = values(run_ranks(ranks, train, str(root), form, 6, 1))
    assert resumed == 4
    resumed, weights = values(run_ranks(ranks, train, str(root), form, 6, 2))[0]
    assert resumed == 6
    found: list[float] = weights
    return found


@pytest.mark.parametrize(("to", "ranks"), [("zarr", 2), ("torch_dist", 1)])
def test_state_in_buckets_goes_through_a_conversion(to: str, ranks: int, tmp_path: Path) -> None:
    values(run_ranks(2, train, str(tmp_path / "first"), "torch_dist", 4, 0))
    convert(tmp_path / "first", tmp_path / "second", to, PosixFileSystem())
    assert final(tmp_path / "second", to, ranks) == final(tmp_path / "first", "torch_dist", 2), "moments went along"
