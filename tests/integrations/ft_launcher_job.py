"""A job for `ft_launcher`: two ranks that save at every step; in the first start one of them stands still at step 7."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from resilience import CheckpointConfig, ResiliencyConfig, ResilientTrainer, TrainingState
from resilience.state.digest import state_digest

STEPS, STILL_AT = 12, 7


def main(root: Path, stands_still: bool) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    model = nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    checkpoint = CheckpointConfig(
        non_persistent_ckpt_type="local", non_persistent_save_interval=1, save=str(root / "save"),
        non_persistent_local_ckpt_dir=str(root / "mem"), non_persistent_local_ckpt_algo="atomic",
    )  # fmt: skip
    resiliency = ResiliencyConfig(
        run_id="run",
        memory_dir=str(root / "mem"),
        events=str(root / "events"),
        ft_launcher=True,
        non_persistent_sync=True,
    )
    with ResilientTrainer(model, optimizer, checkpoint=checkpoint, resiliency=resiliency) as trainer:
        first = trainer.resumed_from is None
        for step in trainer.iterations(STEPS):
            if stands_still and first and step == STILL_AT and rank == 1:
                time.sleep(3600)
            model(torch.randn(2, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            time.sleep(0.1)
    digest = state_digest(TrainingState(model, optimizer).collect(("model", "optimizer")))
    (root / f"end-{rank}").write_text(f"{digest} {trainer.resumed_from and trainer.resumed_from.iteration}")
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]), sys.argv[2] == "stand-still")
