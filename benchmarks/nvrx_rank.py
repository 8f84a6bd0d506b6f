"""NVRx's local checkpoints of the rank's half of the state, without and with replication over a clique of two.

Runs in NVRx's environment. Its saves are synchronous here; the asynchronous ones replicate before they return just the
same, and their wait is measured too (with `torch.cuda.synchronize`, which they call without need, made void).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from nvidia_resiliency_ext.checkpointing.local.base_state_dict import TensorAwareStateDict
from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import LocalCheckpointManager
from nvidia_resiliency_ext.checkpointing.local.replication.strategies import CliqueReplicationStrategy

from benchmarks.rank import Place, timed
from benchmarks.state import Weights, adam_for, half_of
from resilience.integrations import nvrx as ours

__all__ = ["make"]


class CpuStateDict(TensorAwareStateDict):  # type: ignore[misc]  # NVRx has no types
    """NVRx's own basic state dict insists on CUDA tensors; this one takes those that are there."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self._tensors: dict[str, torch.Tensor | None] = dict(tensors)
        self._like = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}

    @property
    def tensors(self) -> Iterable[torch.Tensor]:
        return [tensor for tensor in self._tensors.values() if tensor is not None]

    @property
    def is_hollow(self) -> bool:
        return any(tensor is None for tensor in self._tensors.values())

    def pop_tensors(self) -> list[torch.Tensor]:
        popped = list(self.tensors)
        self._tensors = dict.fromkeys(self._tensors)
        return popped

    def insert_tensors(self, tensor_data: Iterable[torch.Tensor]) -> None:
        self._tensors = dict(zip(self._tensors, tensor_data, strict=True))

    def init_tensors(self) -> None:
        self._tensors = {name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in self._like.items()}

    def copy_tensors_to_cpu(self, non_blocking: bool = False) -> None:
        """Nothing to copy: a synchronous save reads the live tensors."""

    def restore_tensor_device(self, non_blocking: bool = True) -> None:
        """They are on the CPU already."""


class _NvrxBench:
    """NVRx's manager, and ours in its place, of the same states in the same processes."""

    def __init__(self, place: Place) -> None:
        model = Weights(place.settings)
        self._half = half_of(model, adam_for(model), place.rank)
        theirs, here = CliqueReplicationStrategy.from_replication_params(1, 2), place.node_directory
        self._managers = {
            "nvrx_local": LocalCheckpointManager(here / "nvrx", "alone"),
            "nvrx_replicated": LocalCheckpointManager(here / "nvrx", "cliqued", theirs),
            "drop_in_local": ours.LocalCheckpointManager(here / "ours", "alone"),
            "drop_in_replicated": ours.LocalCheckpointManager(here / "ours", "cliqued", theirs),
        }
        self._iteration = 0
        torch.cuda.synchronize = lambda *_: None

    def measures(self) -> dict[str, Callable[..., dict[str, Any]]]:
        return {
            **{name: partial(self._save, manager) for name, manager in self._managers.items()},
            "nvrx_async": partial(self._save_async, self._managers["nvrx_replicated"]),
            "drop_in_async": partial(self._save_async, self._managers["drop_in_replicated"]),
        }

    def _save(self, manager: Any) -> dict[str, Any]:
        self._iteration += 1
        return {"seconds": timed(lambda: manager.save(CpuStateDict(self._half), self._iteration))}

    def _save_async(self, manager: Any) -> dict[str, Any]:
        """The wait of a replicated save that is to be written in the background; waited for afterwards."""
        self._iteration += 1
        requests: list[Any] = []
        stall_s = timed(lambda: requests.append(manager.save(CpuStateDict(self._half), self._iteration, True)))
        requests[0].execute_sync()
        time.sleep(0.1)  # NVRx's removal of the previous save runs in a thread that nobody waits for
        dist.barrier()
        return {"stall": stall_s}

    def close(self) -> None:
        for manager in self._managers.values():
            getattr(manager, "close", bool)()


def make(place: Place) -> _NvrxBench:
    return _NvrxBench(place)
