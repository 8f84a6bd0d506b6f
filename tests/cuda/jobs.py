"""A small job on the device, alone in this process: what it trains, and how it is protected."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resilience import CheckpointConfig, ResiliencyConfig, ResilientTrainer
from resilience.state.digest import state_digest
from resilience.state.training_state import PARTS

DEVICE = "cuda"

#: An optimizer of each kind that steps in its own way.
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "foreach": lambda them: torch.optim.AdamW(them, lr=1e-3, foreach=True),
    "for loop": lambda them: torch.optim.AdamW(them, lr=1e-3, foreach=False),
    "fused": lambda them: torch.optim.AdamW(them, lr=1e-3, fused=True),
    "capturable": lambda them: torch.optim.AdamW(them, lr=torch.tensor(1e-3, device=DEVICE), capturable=True),
    "momentum": lambda them: torch.optim.SGD(them, lr=1e-2, momentum=0.9),
}


def digest_of(trainer: ResilientTrainer) -> str:
    return state_digest(trainer._state.collect([part for part in PARTS if part != "train_state"]))


class Model(nn.Module):
    """Large and small parameters, buffers that the forward changes, dropout on the device."""

    def __init__(self, width: int = 1024, small: int = 200) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Dropout(0.1), nn.Linear(width, width)
        )
        self.small = nn.ParameterList(nn.Parameter(torch.randn(7, 5)) for _ in range(small))
        self.halved = nn.Parameter(torch.randn(333, width).bfloat16())

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        tail = sum((each * each).sum() for each in self.small)
        return (
            self.inner(batch).square().mean() + 1e-4 * tail + (self.halved.float() @ batch.t()).square().mean() * 1e-4
        )


class Job:
    """One start of it. `take`: called at each boundary with the trainer."""

    def __init__(
        self, directory: Path, *, optimizer: str = "foreach", mode: str = "overlapped", every: int = 1, seed: int = 0,
        accumulate: int = 1, **checkpoint: Any,
    ) -> None:  # fmt: skip
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True, warn_only=True)
        self.model = Model().to(DEVICE)
        self.optimizer = OPTIMIZERS[optimizer](self.model.parameters())
        self.accumulate = accumulate
        given = {"non_persistent_ckpt_type": "in_memory", "non_persistent_save_interval": every} | checkpoint
        self.trainer = ResilientTrainer(
            self.model,
            self.optimizer,
            checkpoint=CheckpointConfig(**given),
            resiliency=ResiliencyConfig(
                snapshot_mode=mode, memory_dir=str(directory), run_id="job", node_id="a", keep_after_success=True
            ),
        )
        self.digests: dict[int, str] = {}

    def digest(self) -> str:
        """Of all that is saved but the counters, which a boundary sets."""
        return digest_of(self.trainer)

    def step(self, number: int) -> None:
        generator = torch.Generator(DEVICE).manual_seed(number)
        for _ in range(self.accumulate):
            batch = torch.randn(64, 1024, device=DEVICE, generator=generator)
            self.model(batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def run(self, steps: int) -> None:
        """To the end; notes the state after each step."""
        with self.trainer as trainer:
            for number in trainer.iterations(steps):
                self.step(number)
                self.digests[number] = self.digest()
            self.end = self.digest()


os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
