"""FSDP2 on the device: sharded parameters, snapshots while they are gathered, a resume."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from resilience import CheckpointConfig, ResiliencyConfig, ResilientTrainer
from tests.cuda.jobs import digest_of


@pytest.fixture
def group(tmp_path: Path) -> Any:
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def start(directory: Path, seed: int) -> tuple[Any, Any, ResilientTrainer]:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.GELU()) for _ in range(4))).cuda()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in model:
        fully_shard(layer, mp_policy=policy)
    fully_shard(model, mp_policy=policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    trainer = ResilientTrainer(
        model,
        optimizer,
        checkpoint=CheckpointConfig(non_persistent_ckpt_type="in_memory", non_persistent_save_interval=1),
        resiliency=ResiliencyConfig(
            snapshot_mode="overlapped", memory_dir=str(directory), run_id="job", node_id="a", keep_after_success=True
        ),
    )
    return model, optimizer, trainer


def test_sharded_parameters_are_copied_while_they_are_gathered(memory_mount: Path, group: None) -> None:
    model, optimizer, trainer = start(memory_mount, 0)
    digests = {}
    with trainer:
        for number in trainer.iterations(5):
            model(torch.randn(32, 512, device="cuda")).float().square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            digests[number] = digest_of(trainer)
        trainer.wait()
        assert trainer.status()["failed_saves"] == 0
    _, _, resumed = start(memory_mount, 1)
    assert resumed.iteration == 5
    assert digest_of(resumed) == digests[5]
    resumed.close()
