"""One replicated job of a given size: how its saves' stall and commit grow with bytes, tensors and ranks.

Each rank, on a virtual node of its own, stores all of its state, and the next one keeps its replica. The limits are of
as many bytes in the same processes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.limits import Limits
from benchmarks.rank import Place, boundary_and_step, timed
from benchmarks.state import changes
from benchmarks.told import told_at
from resilience import CheckpointConfig, ResiliencyConfig, ResiliencyController, TrainingState

__all__ = ["make"]

_BOUND_S: Final = 120.0
_LARGEST_BUFFER: Final = 256 << 20  # of a limit: more bytes are that many times over, since memory is short


class _Growth:
    """`options`: `shard_bytes` and `tensors` of each rank, which part of these is `frozen`, `mode` of the snapshots."""

    def __init__(self, place: Place) -> None:
        place.node_directory.mkdir(exist_ok=True)
        nbytes, tensors = int(place.options["shard_bytes"]), int(place.options["tensors"])
        self._limits = Limits(place, min(nbytes, _LARGEST_BUFFER), repeat=-(-nbytes // _LARGEST_BUFFER))
        self._place = place
        self._events = place.directory / "events"
        model = nn.ParameterList(torch.full((nbytes // tensors // 4,), float(n)) for n in range(tensors))
        trained = list(model)[int(place.options["frozen"] * tensors) :]
        self._change = changes(nn.ParameterList(trained))
        tick = nn.Parameter(torch.zeros(4))
        model.append(tick)
        tick.grad = torch.zeros(4)
        self._optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        directory = str(place.node_directory / "kept")
        checkpoint = CheckpointConfig(
            non_persistent_ckpt_type="local", non_persistent_save_interval=1, non_persistent_local_ckpt_dir=directory,
            non_persistent_local_ckpt_algo="atomic", replication=place.size > 1,
        )  # fmt: skip
        resiliency = ResiliencyConfig(
            run_id="growth", node_id=f"node{place.rank}", memory_dir=directory, events=str(self._events), keep_last=1,
            snapshot_mode=place.options["mode"], max_restarts_without_progress=1_000_000,
        )  # fmt: skip
        self._controller = ResiliencyController(TrainingState(model, self._optimizer), checkpoint, resiliency)
        self._controller.restore()
        for _ in range(4):
            self._save(0.0)

    def measures(self) -> dict[str, Callable[..., dict[str, Any]]]:
        limits = {name: each for name, each in self._limits.measures().items() if name in ("memcpy", "hash", "gloo")}
        return limits | {"save": self.save}

    def save(self, pause_s: float) -> dict[str, Any]:
        """The boundary of a save and the optimizer's next step after a pause, and when the save was committed."""
        began, stall_s = self._save(pause_s)
        bare_s = min(timed(self._optimizer.step) for _ in range(3))
        told = "protected" if self._place.size > 1 else "committed"
        at = told_at(self._events / f"node{self._place.rank}.jsonl", told, self._controller.iteration)
        return {"stall": max(stall_s - bare_s, 0.0), "committed": at - began}

    def close(self) -> None:
        self._controller.close()
        self._limits.close()

    def _save(self, pause_s: float) -> tuple[float, float]:
        """When the boundary began (Unix seconds), and how long it and the next step took."""
        self._change()
        dist.barrier()
        began = time.time()
        stall_s = boundary_and_step(self._boundary, self._optimizer.step, pause_s)
        self._controller.wait()
        self._controller.wait_idle(_BOUND_S)
        dist.barrier()
        return began, stall_s

    def _boundary(self) -> None:
        self._controller.after_step(self._controller.iteration + 1)


def make(place: Place) -> _Growth:
    return _Growth(place)
