"""What users would otherwise call to keep and read back the same bytes: torch.save, DCP, zarr's own writer.

None of them makes a digest; DCP alone fsyncs.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from benchmarks.folders import fresh_folder
from benchmarks.rank import Place, timed

__all__ = ["PersistentRivals"]


class PersistentRivals:
    """Each measure gives `save` and `load` seconds; what was read is compared."""

    def __init__(self, place: Place, half: dict[str, torch.Tensor], into: dict[str, torch.Tensor]) -> None:
        self._place = place
        self._half = half
        self._into = into

    def measures(self) -> dict[str, Callable[..., dict[str, Any]]]:
        return {"dcp": self.dcp, "torch": self.torch, "zarr_own": self.zarr_own}

    def dcp(self) -> dict[str, Any]:
        return self._both(
            "dcp",
            lambda folder: save(self._half, checkpoint_id=folder),
            lambda folder: load(self._into, checkpoint_id=folder),
        )

    def torch(self) -> dict[str, Any]:
        """One file per rank."""
        name = f"{self._place.rank}.pt"
        return self._both(
            "torch",
            lambda folder: torch.save(self._half, folder / name),
            lambda folder: self._torch_load(folder / name),
        )

    def _torch_load(self, path: Path) -> None:
        stored = torch.load(path, weights_only=True)
        for key, tensor in self._into.items():
            tensor.copy_(stored[key])

    def zarr_own(self) -> dict[str, Any]:
        """A group per rank, a chunk per tensor, with the codecs that ours has: bytes and crc32c."""
        return self._both("zarr-own", self._zarr_save, self._zarr_load)

    def _zarr_save(self, folder: Path) -> None:
        import zarr
        from zarr.codecs import Crc32cCodec

        group = zarr.open_group(folder / str(self._place.rank), mode="w")
        for key, tensor in self._half.items():
            group.create_array(key, data=tensor.numpy(), chunks=tuple(tensor.shape), compressors=[Crc32cCodec()])

    def _zarr_load(self, folder: Path) -> None:
        import zarr

        group = zarr.open_group(folder / str(self._place.rank), mode="r")
        for key, tensor in self._into.items():
            array = group[key]
            assert isinstance(array, zarr.Array)
            tensor.copy_(torch.as_tensor(array[:]))

    def _both(self, name: str, write: Callable[[Path], object], read: Callable[[Path], object]) -> dict[str, Any]:
        with fresh_folder(self._place, name) as folder:
            save_s = timed(lambda: write(folder))
            for tensor in self._into.values():
                tensor.zero_()
            load_s = timed(lambda: read(folder))
            dist.barrier()
        if not all(torch.equal(tensor, self._half[key]) for key, tensor in self._into.items()):
            raise RuntimeError(f"what {name} read is not what it wrote")
        return {"save": save_s, "load": load_s}
