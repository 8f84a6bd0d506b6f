"""The buffer that snapshots are copied into: a mapped file, laid out as the shard it will become.

Arenas are reserved and pre-faulted once and re-used for the life of the job; sealing one is writing its header. The
mapping follows the inode through renames, so that the warm pages stay.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import numpy as np
import torch

from resilience.planning.inventory import SaveId
from resilience.snapshot.layout import Layout, PlacedPiece, ShardIdentity
from resilience.stores.filesystem import MappedFile

__all__ = ["Arena", "bytes_of", "typed_view", "view_of"]


class Arena:
    """One arena: free, filling, or sealed. Only its rank's training thread fills it."""

    def __init__(self, mapped: MappedFile) -> None:
        self.mapped = mapped
        self.layout: Layout | None = None
        self.views: list[torch.Tensor] = []
        self.content = bytes_of(mapped)
        #: Of which save it has a verified shard, as long as nobody may write to it.
        self.holds: SaveId | None = None
        self._unlock: weakref.finalize[[], Arena] | None = None

    @property
    def nbytes(self) -> int:
        return self.mapped.nbytes

    def use(self, layout: Layout) -> None:
        """Lay views over the mapping for `layout`; cached while it stays the same."""
        if layout is self.layout:
            return
        if layout.nbytes != self.nbytes:
            raise ValueError(f"a layout of {layout.nbytes} bytes does not fit an arena of {self.nbytes}")
        self.views = [view_of(self.content, placed) for placed in layout.placed]
        self.layout = layout

    def write_values(self, values: bytes) -> None:
        """Store the plain values, padded with spaces (JSON ignores them)."""
        layout = self._planned()
        start, capacity = layout.values_start, layout.values_capacity
        self.mapped.view[start : start + capacity] = values.ljust(capacity, b" ")

    def seal(self, identity: ShardIdentity) -> None:
        """Write the header; from here on the bytes do not change until the arena is recycled."""
        layout = self._planned()
        self.mapped.view[: layout.data_start] = layout.header(identity)

    def segment(self, start: int, stop: int) -> torch.Tensor:
        """A byte tensor over part of the file, for sending."""
        return self.content[start:stop]

    @property
    def pages_locked(self) -> bool:
        return self._unlock is not None

    def lock_pages(self, lock: Callable[[torch.Tensor], Callable[[], None]]) -> None:
        """Have `lock` lock its pages, until it is closed. Raises what `lock` raises."""
        if self._unlock is None:
            self._unlock = weakref.finalize(self, lock(self.content))  # an arena may be dropped without being closed
            self._unlock.atexit = False

    def close(self) -> None:
        unlock, self._unlock = self._unlock, None
        if unlock is not None:
            unlock()
        self.views = []
        self.content = torch.empty(0, dtype=torch.uint8)
        self.mapped.close()

    def _planned(self) -> Layout:
        if self.layout is None:
            raise ValueError("the arena has no layout yet")
        return self.layout


def bytes_of(mapped: MappedFile) -> torch.Tensor:
    """A byte tensor over a mapping. It keeps the mapping, whoever closes it:

    `torch.frombuffer` would let it go, and the next touch of the tensor would be the end of the process.
    """
    return torch.from_numpy(np.frombuffer(mapped.view, dtype=np.uint8))


def view_of(content: torch.Tensor, placed: PlacedPiece) -> torch.Tensor:
    """The piece's tensor over the shard's bytes (`content`: uint8, one axis)."""
    piece = placed.piece
    return typed_view(content, placed.start, piece.dtype, piece.shape)


def typed_view(content: torch.Tensor, start: int, dtype: torch.dtype, shape: Sequence[int]) -> torch.Tensor:
    """`shape` elements of `dtype` over the bytes of `content` from `start` on."""
    count = 1
    for length in shape:
        count *= length
    if count == 0:
        return torch.empty(tuple(shape), dtype=dtype)
    return content[start : start + count * dtype.itemsize].view(dtype).view(tuple(shape))
