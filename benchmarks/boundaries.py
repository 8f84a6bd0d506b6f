"""What a boundary without a save costs a loop whose ranks wait for each other at every step anyway.

The same steps (an optimizer step on a few numbers, a small all-reduce, five milliseconds asleep) run in blocks with
and without `ResilientTrainer` in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.rank import Place
from resilience import CheckpointConfig, ResiliencyConfig, ResilientTrainer

__all__ = ["make"]

_STEP_S: Final = 0.005
_NEVER: Final = 1_000_000_000


class _Training:
    """A model of a few numbers and its step."""

    def __init__(self) -> None:
        self.model = nn.Linear(4, 4)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.0)
        self._gradient = torch.zeros(64)

    def step(self) -> None:
        dist.all_reduce(self._gradient)
        time.sleep(_STEP_S)
        self.optimizer.step()


class _BoundariesBench:
    def __init__(self, place: Place) -> None:
        self._bare = _Training()
        self._wrapped = _Training()
        self._trainer = ResilientTrainer(
            self._wrapped.model,
            self._wrapped.optimizer,
            checkpoint=CheckpointConfig(
                non_persistent_ckpt_type="local",
                non_persistent_save_interval=_NEVER,
                non_persistent_local_ckpt_dir=str(place.node_directory),
            ),
            resiliency=ResiliencyConfig(run_id="boundaries", memory_dir=str(place.node_directory)),
        )
        self._batches: Iterator[Any] = self._trainer.iterations(_NEVER)
        next(self._batches)

    def measures(self) -> dict[str, Callable[..., dict[str, Any]]]:
        return {"bare": self._bare_block, "wrapped": self._wrapped_block}

    def _bare_block(self, steps: int) -> dict[str, Any]:
        """Seconds per step of the loop alone."""
        dist.barrier()
        began = time.perf_counter()
        for _ in range(steps):
            self._bare.step()
        return {"step": (time.perf_counter() - began) / steps}

    def _wrapped_block(self, steps: int) -> dict[str, Any]:
        """Seconds per step with the trainer; of each boundary by itself, and of this thread's processor time in it."""
        boundaries, worked = [], []
        dist.barrier()
        began = time.perf_counter()
        for _ in range(steps):
            self._wrapped.step()
            reached, idle = time.perf_counter(), time.thread_time()
            next(self._batches)
            boundaries.append(time.perf_counter() - reached)
            worked.append(time.thread_time() - idle)
        return {"step": (time.perf_counter() - began) / steps, "boundaries": boundaries, "worked": worked}

    def close(self) -> None:
        self._trainer.close()


def make(place: Place) -> _BoundariesBench:
    return _BoundariesBench(place)
