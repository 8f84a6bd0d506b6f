"""How a file's room is reserved and its pages are faulted in, without holding the interpreter or being beyond recall.

`mmap.madvise` keeps the interpreter lock for as long as the kernel takes: seconds for a large arena, in which no other
thread runs a line, the training thread least of all. The same call through ctypes lets go of it. Both halves go in
steps, between which whoever asked may change his mind (a process that ends does not wait for gigabytes).
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Final

__all__ = ["always", "populate", "reserve"]

_READ: Final = 22  # MADV_POPULATE_READ, MADV_POPULATE_WRITE: Linux 5.14
_WRITE: Final = 23
_RESERVE_STEP_BYTES: Final = 64 << 20
_POPULATE_STEP_BYTES: Final = 4 << 20  # the kernel holds the process's memory map meanwhile: whoever allocates waits

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def always() -> bool:
    """Whoever asks for pages wants them, come what may."""
    return True


def reserve(fd: int, nbytes: int, wanted: Callable[[], bool]) -> None:
    """Give the file `nbytes` of real room: a full mount is ENOSPC here, never SIGBUS later. OSError.

    ECANCELED once `wanted()` says no.
    """
    for start, length in _steps(nbytes, _RESERVE_STEP_BYTES, wanted):
        os.posix_fallocate(fd, start, length)


def populate(mapping: mmap.mmap, nbytes: int, *, writable: bool = True, wanted: Callable[[], bool] = always) -> None:
    """Fault all pages in now: a snapshot then costs what a memory copy costs, a load does not stop at each page.

    ECANCELED once `wanted()` says no.
    """
    base = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
    advice = _WRITE if writable else _READ
    for start, length in _steps(nbytes, _POPULATE_STEP_BYTES, wanted):
        if _libc.madvise(base + start, length, advice):  # an older kernel: touch one byte of each page
            for page in range(start, start + length, mmap.PAGESIZE):
                byte = mapping[page]
                if writable:
                    mapping[page] = byte


def _steps(nbytes: int, step_bytes: int, wanted: Callable[[], bool]) -> Iterator[tuple[int, int]]:
    for start in range(0, nbytes, step_bytes):
        if not wanted():
            raise OSError(errno.ECANCELED, "it is no longer wanted")
        yield start, min(step_bytes, nbytes - start)
