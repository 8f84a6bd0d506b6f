"""NVRx's local checkpoints put back, from the own node and, where that comes empty, from the clique.

Runs in NVRx's environment. What comes from the clique goes by way of a GPU there, which is left out: here is none.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import LocalCheckpointManager
from nvidia_resiliency_ext.checkpointing.local.replication.strategies import CliqueReplicationStrategy

from benchmarks.nvrx_rank import CpuStateDict
from benchmarks.putting_back import PuttingBack, State, fill
from benchmarks.rank import Bench, Place

__all__ = ["make"]


class _Nvrx:
    def __init__(self, replicated: bool, place: Place) -> None:
        strategy: Any = CliqueReplicationStrategy.from_replication_params(1, 2) if replicated else None
        where = place.node_directory / ("nvrx_replicated" if replicated else "nvrx")
        self._manager: Any = LocalCheckpointManager(where, "putting-back", strategy)

    def save(self, state: State) -> None:
        self._manager.save(CpuStateDict(state), 1)

    def load(self, state: State) -> None:
        if self._manager.find_latest() != 1:
            raise RuntimeError("the save is not found")
        loaded, _ = self._manager.load()
        fill(state, dict(zip(state, loaded.tensors, strict=True)))


def _stay_on_the_host() -> None:
    empty_like = torch.empty_like
    torch.Tensor.cuda = lambda tensor: tensor  # type: ignore[method-assign, assignment, misc]
    torch.empty_like = lambda tensor, **_: empty_like(tensor)


def make(place: Place) -> Bench:
    _stay_on_the_host()
    return PuttingBack(place, {"nvrx": partial(_Nvrx, False), "nvrx_replicated": partial(_Nvrx, True)})
