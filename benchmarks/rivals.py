"""What users would otherwise call, with torch alone: `torch.save`, `dcp.save`, `dcp.async_save` by thread and process.

Each gets the rank's half of the state, cut out beforehand, and writes new files on the same mount.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save, save

from benchmarks.folders import fresh_folder
from benchmarks.rank import Place, timed, waited

__all__ = ["Rivals"]


class Rivals:
    """Savers of `half`."""

    def __init__(self, place: Place, half: dict[str, torch.Tensor]) -> None:
        self._place = place
        self._half = half

    def measures(self) -> dict[str, Callable[..., dict[str, Any]]]:
        return {
            "torch_save": self.torch_save,
            "dcp_save": self.dcp_save,
            "dcp_async": lambda: self.dcp_async(AsyncCheckpointerType.THREAD),
            "dcp_process": lambda: self.dcp_async(AsyncCheckpointerType.PROCESS),
        }

    def torch_save(self) -> dict[str, Any]:
        """One file per rank."""
        path = self._place.node_directory / "torch.pt"
        try:
            return {"seconds": timed(lambda: torch.save(self._half, path))}
        finally:
            path.unlink(missing_ok=True)

    def dcp_save(self) -> dict[str, Any]:
        """`dcp.save` of all ranks into one folder."""
        with fresh_folder(self._place, "dcp") as folder:
            return {"seconds": timed(lambda: save(self._half, checkpoint_id=folder))}

    def dcp_async(self, by: AsyncCheckpointerType) -> dict[str, Any]:
        """`dcp.async_save`: what the training thread waits, and when the checkpoint is there.

        `by`: who writes, a thread of this process or another process, which stays from the first time on.
        """
        with fresh_folder(self._place, f"dcp-{by.value}") as folder:
            return waited(
                lambda: async_save(self._half, checkpoint_id=folder, async_checkpointer_type=by),
                lambda future: future.result(),
            )
