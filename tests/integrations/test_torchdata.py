"""torchdata's own loader under the trainer: a killed run goes on behind the same sample, with and without workers."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, DistributedSampler

from resilience import CheckpointConfig, ResiliencyConfig, ResilientTrainer
from resilience.state.digest import state_digest
from tests.ranks import killed, run_ranks, values

SAMPLES, STEPS, DIE_AT = 48, 18, 10  # an epoch of 6 to 12 batches: it dies in the middle of one


class Squares(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index), float(index) ** 2 / SAMPLES])


def train(
    rank: int, root: str, nodes: tuple[str, ...], workers: int, die: bool, seed: int
) -> tuple[Any, list[Any], str]:
    from torchdata.stateful_dataloader import StatefulDataLoader

    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # it has workers of its own
    torch.manual_seed(seed)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    sampler = DistributedSampler(Squares(), len(nodes), rank, seed=7) if len(nodes) > 1 else None
    loader: Any = StatefulDataLoader(
        Squares(),
        4,
        shuffle=sampler is None,
        sampler=sampler,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )
    torch.manual_seed(seed + rank)
    seen: list[Any] = []
    node = f"{root}/{nodes[rank]}"
    with ResilientTrainer(
        model, optimizer, dataloader=loader,
        checkpoint=CheckpointConfig(
            non_persistent_ckpt_type="local", non_persistent_save_interval=1, non_persistent_local_ckpt_dir=node,
            replication=len(nodes) > 1,
        ),
        resiliency=ResiliencyConfig(
            run_id="run", node_id=nodes[rank], memory_dir=node, keep_after_success=True, exchange_timeout_s=20.0
        ),
    ) as trainer:  # fmt: skip
        for batch in trainer.iterations(STEPS):
            if die:
                time.sleep(0.05)  # its saves are to be there when it dies
                if trainer.iteration == DIE_AT and rank == len(nodes) - 1:
                    os.kill(os.getpid(), signal.SIGKILL)
            seen.append((trainer.iteration, batch[:, 0].tolist()))
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return trainer.resumed_from, seen, state_digest(trainer._state.collect(("model", "optimizer")))


def check(nodes: tuple[str, ...], workers: int, root: Path, lose: bool = False) -> None:
    size = len(nodes)
    options: dict[str, Any] = {"distributed": size > 1}
    expected = values(run_ranks(size, train, f"{root}/undisturbed", nodes, workers, False, 0, **options))
    outcomes = run_ranks(size, train, f"{root}/job", nodes, workers, True, 0, **options)
    assert killed(outcomes[-1]), outcomes
    if lose:
        shutil.rmtree(root / "job" / nodes[-1])
    again = values(run_ranks(size, train, f"{root}/job", nodes, workers, False, 1, **options))
    for (resumed, seen, digest), (_, wanted, wanted_digest) in zip(again, expected, strict=True):
        assert resumed is not None
        assert 0 < resumed.iteration <= DIE_AT
        assert seen == [each for each in wanted if each[0] >= resumed.iteration], "no sample left out, none repeated"
        assert digest == wanted_digest


@pytest.mark.parametrize("workers", [0, 2])
def test_a_killed_run_goes_on_behind_the_same_sample_of_a_stateful_loader(workers: int, memory_mount: Path) -> None:
    check(("a",), workers, memory_mount)


@pytest.mark.long
def test_two_ranks_lose_a_node_and_their_stateful_loaders_go_on_from_the_replica(memory_mount: Path) -> None:
    check(("a", "b"), 2, memory_mount, lose=True)
