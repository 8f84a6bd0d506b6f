"""How a file's room is reserved, mapped and faulted in, without holding the interpreter or being beyond recall.

`mmap.madvise` keeps the interpreter lock for as long as the kernel takes: seconds for a large arena, in which no other
thread runs a line, the training thread least of all. The same call through ctypes lets go of it. Both halves go in
steps, between which whoever asked may change his mind (a process that ends does not wait for gigabytes).

On a memory-backed mount most of what a restart does with a file is page tables: to map 256 MiB in pages of 4 KiB takes
longer than to hash them. `enlarge` has the kernel put a file's content into huge pages, which stay with the file:
whoever maps it later, in another process too, does so in no time. It needs a mapping at an aligned address, which
`map_file` makes.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Iterator
from typing import Final

from resilience.stores.interrupted import again

__all__ = ["HUGE_BYTES", "always", "enlarge", "map_file", "populate", "reserve"]

_READ: Final = 22  # MADV_POPULATE_READ, MADV_POPULATE_WRITE: Linux 5.14
_WRITE: Final = 23
_COLLAPSE: Final = 25  # MADV_COLLAPSE: Linux 6.1
_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_RESERVE_STEP_BYTES: Final = 64 << 20
_POPULATE_STEP_BYTES: Final = 4 << 20  # the kernel holds the process's memory map meanwhile: whoever allocates waits

#: A huge page of x86-64, and of arm64 with small pages of 4 KiB. Elsewhere `enlarge` is refused or does less.
HUGE_BYTES: Final = 2 << 20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_int64)
_libc.mmap.restype = ctypes.c_void_p


def always() -> bool:
    """Whoever asks for pages wants them, come what may."""
    return True


def reserve(fd: int, nbytes: int, wanted: Callable[[], bool], *, start: int = 0) -> None:
    """Give the file `nbytes` of real room from `start` on: a full mount is ENOSPC here, never SIGBUS later. OSError.

    ECANCELED once `wanted()` says no.
    """
    for done, length in _steps(nbytes, _RESERVE_STEP_BYTES, wanted):
        again(os.posix_fallocate, fd, start + done, length)


def map_file(fd: int, nbytes: int, flags: int) -> tuple[mmap.mmap, int]:
    """Map the file, readable and writable, at a multiple of a huge page if it has that much. OSError.

    Returns what holds the mapping and where in it the file begins.
    """
    access = mmap.PROT_READ | mmap.PROT_WRITE
    if nbytes < HUGE_BYTES:
        return again(mmap.mmap, fd, nbytes, flags, access), 0
    # `mmap.mmap` takes no address: it holds room enough, and the file is mapped over an aligned part of that
    room = again(mmap.mmap, -1, nbytes + HUGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE, access)
    address = _address(room)
    start = -address % HUGE_BYTES
    try:
        again(_map_over, address + start, nbytes, access, flags | _MAP_FIXED, fd)
    except OSError:
        room.close()
        raise
    return room, start


def populate(
    mapping: mmap.mmap, nbytes: int, *, start: int = 0, writable: bool = True, wanted: Callable[[], bool] = always
) -> None:
    """Fault all pages in now: a snapshot then costs what a memory copy costs, a load does not stop at each page.

    `start`: where in the mapping, a multiple of a page. ECANCELED once `wanted()` says no.
    """
    base = _address(mapping) + start
    advice = _WRITE if writable else _READ
    for done, length in _steps(nbytes, _POPULATE_STEP_BYTES, wanted):
        try:
            again(_advise, base + done, length, advice)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOSYS):  # to touch these pages would be a signal
                raise
            # an older kernel: touch one byte of each page
            for page in range(start + done, start + done + length, mmap.PAGESIZE):
                byte = mapping[page]
                if writable:
                    mapping[page] = byte


def enlarge(mapping: mmap.mmap, start: int, nbytes: int, wanted: Callable[[], bool]) -> int:
    """Put the file's content into huge pages where the kernel can, and return how many bytes are.

    The content may be read and written meanwhile. `start` and `nbytes` as `map_file` gave and got them; a last part
    that fills no huge page stays as it is. ECANCELED once `wanted()` says no.
    """
    keeps_it_mapped = ctypes.c_char.from_buffer(mapping)
    base = ctypes.addressof(keeps_it_mapped) + start
    enlarged = 0
    for done, length in _steps(nbytes - nbytes % HUGE_BYTES, HUGE_BYTES, wanted):
        if not _libc.madvise(base + done, length, _COLLAPSE):
            enlarged += length
        elif ctypes.get_errno() in (errno.EINVAL, errno.ENOMEM):
            break  # this kernel or this mount knows of none, or none is free; else this one piece is busy
    return enlarged


def _map_over(address: int, nbytes: int, access: int, flags: int, fd: int) -> None:
    if _libc.mmap(address, nbytes, access, flags, fd, 0) != address:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _advise(address: int, nbytes: int, advice: int) -> None:
    if _libc.madvise(address, nbytes, advice):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _address(mapping: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(mapping))


def _steps(nbytes: int, step_bytes: int, wanted: Callable[[], bool]) -> Iterator[tuple[int, int]]:
    for start in range(0, nbytes, step_bytes):
        if not wanted():
            raise OSError(errno.ECANCELED, "it is no longer wanted")
        yield start, min(step_bytes, nbytes - start)
