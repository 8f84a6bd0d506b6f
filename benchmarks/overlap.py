"""What saves cost that are taken while training goes on: the stall, and whole loops with a save at every step.

Two ranks, each on a virtual node, that hold each other's replicas. *Device-bound* steps sleep, since their work happens
elsewhere; *CPU-bound* ones multiply matrices for as long. An optimizer of one small tensor steps in both, so that every
copy is joined where it would be.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Final, Literal

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.limits import Limits
from benchmarks.rank import Place, boundary_and_step, timed
from benchmarks.state import Weights, adam_for, changes
from resilience import CheckpointConfig, ResiliencyConfig, ResiliencyController, TrainingState

__all__ = ["make"]

Mode = Literal["eager", "overlapped"]
_BOUND_S: Final = 60.0
_SIDE: Final = 192  # of the matrices of a CPU-bound step


class _Job:
    """A replicated job, every boundary of which saves."""

    def __init__(self, place: Place, name: str, model: Weights, mode: Mode, *, split: bool) -> None:
        self.tick = nn.Parameter(torch.zeros(4))
        model.register_parameter(f"tick_{name}", self.tick)
        self.tick.grad = torch.zeros(4)
        self.optimizer = torch.optim.SGD([self.tick], lr=0.1)
        directory = str(place.node_directory / name)
        checkpoint = CheckpointConfig(
            non_persistent_ckpt_type="local", non_persistent_save_interval=1,
            non_persistent_local_ckpt_dir=directory, replication=True,
            non_persistent_local_ckpt_algo="fully_parallel" if split else "atomic",
        )  # fmt: skip
        resiliency = ResiliencyConfig(
            run_id=name, node_id=f"node{place.rank}", memory_dir=directory, snapshot_mode=mode,
            max_restarts_without_progress=1_000_000,
        )  # fmt: skip
        adam = adam_for(model)
        self.change = changes(model, adam)
        state = TrainingState(model, [adam, self.optimizer])
        self.controller = ResiliencyController(state, checkpoint, resiliency)
        self.controller.restore()

    def step(self) -> None:
        """The optimizer's, which waits for what is being copied, and what it would change."""
        self.optimizer.step()
        self.change()

    def boundary(self) -> None:
        self.controller.after_step(self.controller.iteration + 1)

    def settle(self) -> None:
        self.controller.wait()
        self.controller.wait_idle(_BOUND_S)
        dist.barrier()


class _OverlapBench:
    """One shape of state: matrices of megabytes, or (`small` of them) thousands of little ones of as many bytes.

    `whole`: each rank stores all that it has, half as much, and not its half of what all have.
    """

    def __init__(self, place: Place) -> None:
        place.node_directory.mkdir(exist_ok=True)
        self._limits = Limits(place)
        sizes, small, whole = place.settings, int(place.options["small"]), bool(place.options["whole"])
        if small:
            rows = sizes.layers * sizes.rows // (place.size if whole else 1)
            sizes = replace(sizes, layers=small, rows=max(1, rows // small))
        modes: tuple[Mode, ...] = ("eager", "overlapped")
        self._jobs = {mode: _Job(place, mode, Weights(sizes), mode, split=not whole) for mode in modes}
        self._square = torch.randn(_SIDE, _SIDE)
        self._product_s = min(timed(self._multiply) for _ in range(50))
        for job in self._jobs.values():
            for _ in range(4):
                job.boundary()
                job.step()
                job.settle()

    def measures(self) -> dict[str, Callable[..., dict[str, Any]]]:
        found: dict[str, Callable[..., dict[str, Any]]] = {
            name: each for name, each in self._limits.measures().items() if name in ("memcpy", "hash", "gloo")
        }
        return found | {"stall": self.stall, "loop": self.loop}

    def stall(self, mode: Mode, pause_s: float) -> dict[str, Any]:
        """The boundary of a save, and the optimizer's next step after a pause in which the copy may run."""
        job = self._jobs[mode]
        stall_s = boundary_and_step(job.boundary, job.optimizer.step, pause_s)
        job.change()
        job.settle()
        return {"seconds": stall_s - min(timed(job.optimizer.step) for _ in range(3))}

    def loop(self, mode: Mode | Literal["bare"], kind: str, step_s: float, steps: int) -> dict[str, Any]:
        """Steps of `step_s` seconds; `mode` "bare": without boundaries. Says how many saves were skipped, too."""
        job = self._jobs["eager" if mode == "bare" else mode]
        skipped = job.controller.status()["skipped_saves"]
        dist.barrier()

        def run() -> None:
            for _ in range(steps):
                if kind == "device":
                    time.sleep(step_s)
                else:
                    for _ in range(max(1, int(step_s / self._product_s))):
                        self._multiply()
                job.step()
                if mode != "bare":
                    job.boundary()

        seconds = timed(run)
        job.settle()
        return {"seconds": seconds, "skipped": job.controller.status()["skipped_saves"] - skipped}

    def close(self) -> None:
        for job in self._jobs.values():
            job.controller.close()

    def _multiply(self) -> None:
        torch.mm(self._square, self._square)


def make(place: Place) -> _OverlapBench:
    return _OverlapBench(place)
