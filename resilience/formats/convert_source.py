"""The tensors of a checkpoint as a conversion reads them: part by part, when asked for, one in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from resilience.formats.convert_parts import Extent
from resilience.formats.protocol import CheckpointReader, Chunk, RankState, StoredTensor, Target
from resilience.formats.registry import stored_items
from resilience.stores.filesystem import FileSystem

__all__ = ["PART_BYTES", "StoredChunk", "StoredTensors"]

PART_BYTES = 16 << 20  # of one tensor in memory, unless a stored box has more


class StoredTensors:
    """The tensors of a checkpoint, read part by part; one part is in memory at a time."""

    def __init__(self, reader: CheckpointReader, fs: FileSystem) -> None:
        self.reader = reader
        self.index = reader.index
        self.aliases = reader.aliases
        self._boxes = {item.path: item.chunks for item in stored_items(reader.folder, fs) if item.path}
        self._last: tuple[object, Any] = (None, None)

    @property
    def roots(self) -> list[str]:
        """All that are no second name of another one."""
        return [path for path in self.index if path not in self.aliases]

    def boxes(self, path: str) -> list[Extent]:
        """How a tensor lies in the checkpoint."""
        return [(tuple(box["offsets"]), tuple(box["shape"])) for box in self._boxes.get(path, ())]

    def part(self, path: str, extent: Extent) -> torch.Tensor:
        """A region of a tensor. It stays until the next one is asked for."""
        return self._kept((path, extent), lambda: self._read(path, extent))  # type: ignore[no-any-return]

    def rank_state(self, rank: int) -> RankState | None:
        """What a rank had for itself; stays likewise."""
        return self._kept(rank, lambda: self.reader.rank_state(rank))  # type: ignore[no-any-return]

    def _read(self, path: str, extent: Extent) -> torch.Tensor:
        out = torch.empty(extent[1], dtype=self.index[path].dtype)
        self.reader.read([Target(path, out, extent[0])])
        return out

    def _kept(self, name: object, read: Callable[[], Any]) -> Any:
        if self._last[0] != name:
            self._last = (None, None)  # before the next one is read
            self._last = (name, read())
            self.reader.close()
        return self._last[1]


class StoredChunk(Chunk):
    """A chunk whose tensor is read when it is asked for."""

    def __init__(
        self,
        key: str,
        stored: StoredTensor,
        extent: Extent,
        read: Callable[[], torch.Tensor],
        *,
        per_rank: bool = False,
    ) -> None:
        fields = {"key": key, "global_shape": stored.global_shape, "offsets": extent[0], "per_rank": per_rank}
        for name, value in {**fields, "_stored": stored, "_sizes": extent[1], "_load": read}.items():
            object.__setattr__(self, name, value)

    _stored: StoredTensor
    _sizes: tuple[int, ...]
    _load: Callable[[], torch.Tensor]

    @property
    def tensor(self) -> torch.Tensor:
        return self._load()

    @property
    def sizes(self) -> tuple[int, ...]:
        return self._sizes

    @property
    def dtype(self) -> torch.dtype:
        return self._stored.dtype
