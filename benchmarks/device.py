"""What a snapshot of a device's memory costs: the training thread, the device's own time, and what others take.

One rank, one device. `large` is a model of large matrices, `small` one of thousands of small tensors and as many bytes;
both with Adam's moments, fused. *cross* is the limit: as many bytes in one command into page-locked memory. A *step* is
work on the device for as long as it takes to copy and hash, and Adam's step.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from benchmarks.rank import Place, timed
from resilience import CheckpointConfig, ResiliencyConfig, ResiliencyController, TrainingState
from resilience.snapshot.arena import Arena
from resilience.snapshot.copying import Copying
from resilience.stores.filesystem import PosixFileSystem

__all__ = ["MODES", "SHAPES", "Job", "make"]

Mode = Literal["eager", "overlapped"]
MODES: Final[tuple[Mode, ...]] = ("eager", "overlapped")
SHAPES: Final = {"large": 64, "small": 1667}  # parameters; with Adam's moments three times as many tensors
_BOUND_S: Final = 60.0
_STEPS: Final = 12  # of one timed loop


class Job:
    """A state on the device, and a controller whose boundaries are at our command."""

    def __init__(self, place: Place, name: str, mode: Mode, count: int, numel: int) -> None:
        self.device = torch.device(place.options["device"])
        self.model = nn.ParameterList(nn.Parameter(torch.randn(numel, device=self.device)) for _ in range(count))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        for parameter in self.model:
            parameter.grad = torch.full_like(parameter, 1e-3)
        self.optimizer.step()
        checkpoint = CheckpointConfig(non_persistent_ckpt_type="in_memory", non_persistent_save_interval=1)
        resiliency = ResiliencyConfig(
            run_id=name, memory_dir=str(place.node_directory / name), snapshot_mode=mode,
            max_restarts_without_progress=1_000_000,
        )  # fmt: skip
        self.controller = ResiliencyController(TrainingState(self.model, self.optimizer), checkpoint, resiliency)
        self.controller.restore()

    @property
    def nbytes(self) -> int:
        return 3 * sum(parameter.nbytes for parameter in self.model)

    def boundary(self) -> None:
        """A save is due at each."""
        self.controller.after_step(self.controller.iteration + 1)

    def settle(self) -> None:
        self.controller.wait()
        self.controller.wait_idle(_BOUND_S)


class _DeviceBench:
    """Limits, ours and others in one process."""

    def __init__(self, place: Place) -> None:
        place.node_directory.mkdir(exist_ok=True)
        self._place = place
        self._device = torch.device(place.options["device"])
        total = place.settings.shard_bytes * int(place.options["times"]) // 3 // 4  # elements of the parameters
        self._jobs = {
            (shape, mode): Job(place, f"{shape}-{mode}", mode, count, total // count)
            for shape, count in SHAPES.items()
            for mode in MODES
        }
        nbytes = self._jobs["large", "eager"].nbytes
        self._source = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        self._target = Arena(PosixFileSystem().create_mapping(place.node_directory / "limit", nbytes))
        if self._device.type == "cuda":
            Copying().prepare(self._target)
        side = 4096 if self._device.type == "cuda" else 256
        self._square = torch.randn(side, side, device=self._device).bfloat16()
        self._product_s = self._time_products(20) / 20
        self._copy_s = min(self.cross()["seconds"] for _ in range(3))
        for job in self._jobs.values():  # arenas, plans, the strict witness
            for _ in range(4):
                job.boundary()
                job.settle()
                job.optimizer.step()

    def measures(self) -> dict[str, Callable[..., dict[str, Any]]]:
        found: dict[str, Callable[..., dict[str, Any]]] = {"cross": self.cross}
        for shape, mode in self._jobs:
            found[f"{mode}_{shape}"] = lambda shape=shape, mode=mode: self.stall(shape, mode)
        found["loops"] = self.loops
        found |= {"torch_save": self.torch_save, "dcp_save": self.dcp_save, "dcp_async": self.dcp_async}
        return found

    def cross(self) -> dict[str, Any]:
        """All bytes in one command."""

        def copy() -> None:
            self._target.content.copy_(self._source, non_blocking=True)
            self._wait()

        return {"seconds": timed(copy)}

    def stall(self, shape: str, mode: Mode) -> dict[str, Any]:
        """The training thread at a save's boundary, and at the optimizer's next step beyond what that takes anyway."""
        job = self._jobs[shape, mode]
        self._wait()
        boundary_s = timed(job.boundary)
        self._work(1.2 * self._copy_s)  # is enqueued at once
        step_s = timed(job.optimizer.step)
        self._wait()
        job.settle()
        bare_s = timed(job.optimizer.step)
        self._wait()
        return {"stall": boundary_s, "join": max(0.0, step_s - bare_s)}

    def loops(self) -> dict[str, Any]:
        """Loops of steps that are long enough to copy and hash in: bare, and with a save at every step."""
        busy_s = float(self._place.options["busy"]) * self._copy_s
        found = {}
        for mode in ("bare", *MODES):
            job = self._jobs["large", "eager" if mode == "bare" else mode]  # type: ignore[index]
            skipped = job.controller.status()["skipped_saves"]
            self._wait()
            began = time.perf_counter()
            for _ in range(_STEPS):
                self._work(busy_s)
                job.optimizer.step()
                self._wait()  # as for a loss that is looked at
                if mode != "bare":
                    job.boundary()
            self._wait()
            found[f"loop_{mode}"] = time.perf_counter() - began
            job.settle()
            if job.controller.status()["skipped_saves"] > skipped:
                raise RuntimeError(f"{mode}: saves were skipped; the steps are too short")
        return found

    def torch_save(self) -> dict[str, Any]:
        path = self._place.node_directory / "torch.pt"
        try:
            return {"seconds": timed(lambda: torch.save(self._tensors(), path))}
        finally:
            path.unlink(missing_ok=True)

    def dcp_save(self) -> dict[str, Any]:
        return {"seconds": timed(lambda: save(self._tensors(), checkpoint_id=self._folder("dcp")))}

    def dcp_async(self) -> dict[str, Any]:
        began = time.perf_counter()
        future: Any = async_save(self._tensors(), checkpoint_id=self._folder("dcp-async"))
        stall_s = time.perf_counter() - began
        future.result()
        return {"stall": stall_s}

    def close(self) -> None:
        for job in self._jobs.values():
            job.controller.close()

    def _folder(self, name: str) -> Path:
        return self._place.directory / name

    def _tensors(self) -> dict[str, torch.Tensor]:
        job = self._jobs["large", "eager"]
        found = {f"p{n}": parameter.detach() for n, parameter in enumerate(job.model)}
        for n, parameter in enumerate(job.model):
            found |= {f"{m}{n}": job.optimizer.state[parameter][m] for m in ("exp_avg", "exp_avg_sq")}
        return found

    def _work(self, seconds: float) -> None:
        for _ in range(max(1, int(seconds / self._product_s))):
            torch.mm(self._square, self._square)

    def _time_products(self, count: int) -> float:
        self._product_s = 1.0
        for _ in range(count):
            torch.mm(self._square, self._square)
        self._wait()
        began = time.perf_counter()
        for _ in range(count):
            torch.mm(self._square, self._square)
        self._wait()
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def make(place: Place) -> _DeviceBench:
    """For a crew of one."""
    assert dist.get_world_size() == 1
    return _DeviceBench(place)
