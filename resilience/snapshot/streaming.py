"""`streaming.c`, if it was compiled when the package was installed: many blocks copied around the processor's cache.

It takes two thirds of the time of memcpy, and holds for thousands of small blocks what the C library does for large
ones only (docs/decisions/streaming-copies.md). Nothing needs it: without a compiler the package installs all the same,
and `memory_copy` copies block after block.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from resilience.snapshot.quicker import Addresses, CopyBlocks, Quicker

__all__ = ["STREAMING", "Addresses", "Streaming", "addresses", "find_streaming", "library_in", "ways_of"]


def addresses(numbers: Iterable[int]) -> Addresses:
    return np.fromiter(numbers, np.uint64)


_LARGE_BYTES: Final = 4096  # blocks below stay in the cache for whoever reads them next
_NEVER: Final = 2**64 - 1


class Streaming(NamedTuple):
    """Two ways to copy any number of blocks in one call. Both are None where there is no library, and `why` says why.

    `much`: many megabytes, without the interpreter lock, around the cache unless the processor is quicker through it.
    `little`: through the cache, with the lock held, since to get that back may take longer than to copy a megabyte.
    """

    much: CopyBlocks | None
    little: CopyBlocks | None = None
    why: str = ""


def find_streaming(folder: Path) -> Streaming:
    """What was compiled into `folder`, once it has shown that it copies what it is given and touches nothing else."""
    compiled = library_in(folder)
    if compiled is None:
        return Streaming(None, why="it was not compiled when this package was installed, for want of a C compiler")
    try:
        ways = ways_of(compiled)
    except (OSError, AttributeError) as error:  # of another machine, or of an older package
        return Streaming(None, why=f"{compiled} cannot be used: {error}")
    if not all(map(_copies, ways)):
        return Streaming(None, why=f"{compiled} does not copy what it is given")
    around, through, little = ways
    return Streaming(Quicker(around, through).copy, little)


def library_in(folder: Path) -> Path | None:
    """What the installation compiled, if it could."""
    return next((path for suffix in EXTENSION_SUFFIXES if (path := folder / f"_streaming{suffix}").exists()), None)


def ways_of(library: Path) -> tuple[CopyBlocks, CopyBlocks, CopyBlocks]:
    """Around the cache; through it; and through it with the interpreter lock held. OSError, AttributeError."""
    free, held = ctypes.CDLL(str(library)), ctypes.PyDLL(str(library))
    return _bound(free, _LARGE_BYTES), _bound(free, _NEVER), _bound(held, _NEVER)


def _bound(library: ctypes.CDLL, large: int) -> CopyBlocks:
    function = library.resilience_copy_blocks_1
    function.argtypes = [ctypes.c_size_t, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint64]
    function.restype = None

    def copy(targets: Addresses, origins: Addresses, sizes: Addresses) -> None:
        if not len(targets) == len(origins) == len(sizes):
            raise ValueError(f"{len(targets)} targets, {len(origins)} origins and {len(sizes)} sizes of blocks")
        function(len(sizes), targets.ctypes.data, origins.ctypes.data, sizes.ctypes.data, large)

    return copy


def _copies(copy: CopyBlocks) -> bool:
    """Blocks of many lengths, at every place within a cache line, arrive whole, and what lies between them stays.

    A digest is made of the arena, and so says nothing of how the bytes came there: whoever copies has to be right.
    """
    sizes = np.array([1, 63, 64, _LARGE_BYTES - 1, *range(_LARGE_BYTES, _LARGE_BYTES + 64)], dtype=np.uint64)
    room = _LARGE_BYTES + 257  # one more than lines: each block begins a byte further in its own
    starts = np.arange(len(sizes), dtype=np.uint64) * np.uint64(room)
    source = np.resize(np.arange(251, dtype=np.uint8), len(sizes) * room)
    target, expected = np.full_like(source, 255), np.full_like(source, 255)
    for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
        expected[start + 7 : start + 7 + size] = source[start : start + size]
    copy(starts + np.uint64(target.ctypes.data + 7), starts + np.uint64(source.ctypes.data), sizes)
    return bool(np.array_equal(target, expected))


STREAMING: Final = find_streaming(Path(__file__).parent)
