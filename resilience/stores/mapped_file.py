"""A file's bytes in memory: which of them may be touched, what pages they lie in, and when they go.

Made by `filesystem.py` alone, which opens files and gives them room.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from pathlib import Path

from resilience.stores import pages

__all__ = ["MappedFile"]


class MappedFile:
    """A file mapped into memory; `view` is its bytes, alive until `close`.

    The mapping follows the inode, so that the file may be renamed under it.
    """

    def __init__(self, path: Path, mapping: mmap.mmap, start: int, nbytes: int) -> None:
        """`start`: where in the mapping the file begins."""
        self.path = path
        self.nbytes = nbytes
        self.reserved = nbytes  # so many of its bytes have room, and may be touched
        self.huge_bytes: int | None = None  # how much of it lies in huge pages; None: nobody asked for any
        self._mapping: mmap.mmap | None = mapping
        self._start = start
        self.view = memoryview(mapping)[start : start + nbytes]

    def fault_in(
        self, start: int, nbytes: int, wanted: Callable[[], bool] = pages.always, *, writable: bool = True
    ) -> None:
        """Have the pages of `nbytes` from `start` on mapped. OSError."""
        if self._mapping is None:
            raise ValueError(f"{self.path} is closed")
        pages.populate(self._mapping, nbytes, start=self._start + start, writable=writable, wanted=wanted)

    def enlarge_pages(self, wanted: Callable[[], bool]) -> None:
        """Have the kernel put what lies in memory into huge pages, once, where it can. For a lane: it takes its time.

        The bytes may be in use meanwhile, and be closed. Ends early, to be called again, once `wanted()` says no.
        """
        mapping = self._mapping
        if mapping is None or self.huge_bytes is not None:
            return
        with contextlib.suppress(OSError, ValueError):  # no longer wanted; closed in this very moment
            self.huge_bytes = pages.enlarge(mapping, self._start, self.nbytes, wanted)

    def close(self) -> None:
        """Unmap. Views that somebody still holds (tensors) keep the memory until they are dropped."""
        if self._mapping is None:
            return
        mapping, self._mapping = self._mapping, None
        try:
            self.view.release()
            mapping.close()
        except BufferError:
            pass  # a tensor over the mapping is alive; the last reference unmaps
