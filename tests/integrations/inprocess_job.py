"""A job inside NVRx's in-process restart: rank 1 fails, or dies, at step 7, and all that live begin again.

Without postponed annotations: the wrapper looks for its own type in the function's.
"""

import datetime
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from nvidia_resiliency_ext import inprocess
from torch import nn

from resilience import CheckpointConfig, ResiliencyConfig, ResilientTrainer, TrainingState
from resilience.state.digest import state_digest

STEPS, FAILS_AT = 12, 7


@inprocess.Wrapper(
    store_kwargs={"timeout": datetime.timedelta(seconds=60)},
    monitor_thread_interval=datetime.timedelta(seconds=1),
    monitor_process_interval=datetime.timedelta(seconds=1),
    soft_timeout=datetime.timedelta(seconds=40),
    hard_timeout=datetime.timedelta(seconds=60),
)
def train(root: Path, how: str, call_wrapper: inprocess.CallWrapper = None) -> None:  # type: ignore[valid-type]
    state = call_wrapper.state
    rank, size = state.rank, state.world_size
    store = dist.TCPStore(
        "127.0.0.1", int(os.environ["MASTER_PORT"]) + 1 + call_wrapper.iteration, size, is_master=rank == 0,
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    torch.manual_seed(rank)
    model: nn.Module = nn.Linear(4, 1)
    if how == "die":
        model = nn.parallel.DistributedDataParallel(model)  # equal on all ranks: one of them has all of it
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    checkpoint = CheckpointConfig(
        non_persistent_ckpt_type="local", non_persistent_save_interval=1, save=str(root / "save"),
        non_persistent_local_ckpt_dir=str(root / "mem"), non_persistent_local_ckpt_algo="atomic",
    )  # fmt: skip
    resiliency = ResiliencyConfig(
        run_id="run", memory_dir=str(root / "mem"), events=str(root / "events"), non_persistent_sync=True
    )
    with ResilientTrainer(model, optimizer, checkpoint=checkpoint, resiliency=resiliency) as trainer:
        for step in trainer.iterations(STEPS):
            if how != "go-on" and call_wrapper.iteration == 0 and step == FAILS_AT and rank == 1:
                if how == "die":
                    os.kill(os.getpid(), signal.SIGKILL)
                raise RuntimeError("a fault")
            model(torch.randn(2, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            call_wrapper.ping()
            time.sleep(0.1)
    digest = state_digest(TrainingState(model, optimizer).collect(("model", "optimizer")))
    resumed = trainer.resumed_from and trainer.resumed_from.iteration
    (root / f"end-{state.initial_rank}").write_text(f"{digest} {resumed} {call_wrapper.iteration} {os.getpid()}")
    dist.destroy_process_group()


def begin(arguments: list[str]) -> Any:
    return train(Path(arguments[0]), arguments[1])


if __name__ == "__main__":
    begin(sys.argv[1:])
