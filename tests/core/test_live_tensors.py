"""What saving and loading do to the tensors that training owns: nothing but to read and to fill them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from resilience import CheckpointConfig, ResiliencyConfig, ResiliencyController, TrainingState


def job(directory: Path, memory: Path, mode: str, **given: Any) -> tuple[ResiliencyController, TrainingState]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Linear(30, 20))
    model[2].weight = nn.Parameter(torch.randn(30, 20).t())  # not contiguous
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01))
    checkpoint = CheckpointConfig(
        save=str(directory), non_persistent_ckpt_type="local", non_persistent_local_ckpt_dir=str(memory),
        non_persistent_save_interval=2, save_interval=3, **given,
    )  # fmt: skip
    resiliency = ResiliencyConfig(run_id="marks", node_id="node0", memory_dir=str(memory), snapshot_mode=mode)
    state = TrainingState(model, optimizer)
    return ResiliencyController(state, checkpoint, resiliency), state


def step(state: TrainingState) -> None:
    model, optimizer = state.models[0].module, state.optimizers[0].optimizer
    optimizer.zero_grad()
    model(torch.randn(8, 40)).square().mean().backward()
    optimizer.step()


def storages(state: TrainingState) -> dict[str, torch.UntypedStorage]:
    return {item.key: item.tensor.untyped_storage() for item in state.collect().items if not item.key.startswith("rng")}


@pytest.mark.parametrize("mode", ["eager", "overlapped"])
@pytest.mark.parametrize(
    ("ckpt_format", "in_background"), [("torch_dist", False), ("torch_dist", True), ("zarr", False)]
)
def test_their_memory_may_be_resized_afterwards(
    tmp_path: Path, memory_mount: Path, ckpt_format: str, in_background: bool, mode: str
) -> None:
    """`Tensor.numpy` would forbid it for good, to FSDP for example, which gives memory back and gets it anew."""
    if ckpt_format == "zarr":
        pytest.importorskip("zarr")
    for lifetime in range(2):
        controller, state = job(tmp_path, memory_mount, mode, ckpt_format=ckpt_format, async_save=in_background)
        assert (controller.restore() is None) == (lifetime == 0)
        for _ in range(7):
            step(state)
            controller.after_step(controller.iteration + 1)
            controller.wait()
        fixed = {key for key, storage in storages(state).items() if not storage.resizable()}
        controller.close()
        assert not fixed
