"""What users would otherwise call, with torch alone: `torch.save`, `dcp.save`, `dcp.async_save`.

Each gets the rank's half of the state, cut out beforehand, and writes new files on the same mount.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from benchmarks.rank import Place, timed, waited

__all__ = ["Rivals"]


class Rivals:
    """Savers of `half`."""

    def __init__(self, place: Place, half: dict[str, torch.Tensor]) -> None:
        self._place = place
        self._half = half

    def measures(self) -> dict[str, Callable[..., dict[str, Any]]]:
        return {"torch_save": self.torch_save, "dcp_save": self.dcp_save, "dcp_async": self.dcp_async}

    def torch_save(self) -> dict[str, Any]:
        """One file per rank."""
        path = self._place.node_directory / "torch.pt"
        try:
            return {"seconds": timed(lambda: torch.save(self._half, path))}
        finally:
            path.unlink(missing_ok=True)

    def dcp_save(self) -> dict[str, Any]:
        """`dcp.save` of all ranks into one folder."""
        with self._shared_folder("dcp") as folder:
            return {"seconds": timed(lambda: save(self._half, checkpoint_id=folder))}

    def dcp_async(self) -> dict[str, Any]:
        """`dcp.async_save`: what the training thread waits, and when the checkpoint is there."""
        with self._shared_folder("dcp-async") as folder:
            return waited(lambda: async_save(self._half, checkpoint_id=folder), lambda future: future.result())

    @contextmanager
    def _shared_folder(self, name: str) -> Iterator[Path]:
        folder = self._place.directory / name
        try:
            yield folder
        finally:
            dist.barrier()
            if self._place.rank == 0:
                shutil.rmtree(folder, ignore_errors=True)
            dist.barrier()
