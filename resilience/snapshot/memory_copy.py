"""Plain tensors on the host, copied by the C library's memcpy.

torch copies a tensor with loads and stores; the C library with whatever the processor is quickest at (a string move,
and stores around the cache for large blocks), which takes four fifths of the time (docs/performance.md). It does not
know what a tensor is: `is_block` says for which ones their bytes are all there is to copy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch

from resilience.errors import SaveFailedError

__all__ = ["copy_blocks", "is_block", "read_block"]

_LARGE_BYTES: Final = 4 << 20
_NO_MEMORY: Final = "a tensor that is to be saved has no memory: its storage was given back."


def _memcpy(library: ctypes.CDLL) -> Callable[[int, int, int], Any]:
    function = library.memcpy
    function.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    function.restype = None
    return function


# A lock that was given up may take 5 ms to get back: for each tensor more than it takes to copy a few megabytes. So
# these are copied with the interpreter lock held, which others get in between; larger ones without.
_copy_small: Final = _memcpy(ctypes.PyDLL(None))
_copy_large: Final = _memcpy(ctypes.CDLL(None))


def is_block(tensor: torch.Tensor) -> bool:
    """Whether the tensor is a block of the host's memory that holds its elements in order, with nothing more to it."""
    return (
        type(tensor) is torch.Tensor
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.is_contiguous()
        and not (tensor.is_conj() or tensor.is_neg())
        and tensor.numel() > 0
    )


def copy_blocks(targets: Sequence[int], sources: Sequence[torch.Tensor], sizes: Sequence[int]) -> None:
    """Copy `sources`, which are blocks of `sizes` bytes, to the addresses `targets`.

    Where a source lies is asked at each copy: memory that was given back and got anew (FSDP does that to the storage of
    its parameters) is another one. SaveFailedError, before anything is copied, where one has no memory at all.
    """
    origins = [source.data_ptr() for source in sources]
    if not all(origins):
        raise SaveFailedError(_NO_MEMORY)
    for target, origin, nbytes in zip(targets, origins, sizes, strict=True):
        (_copy_large if nbytes >= _LARGE_BYTES else _copy_small)(target, origin, nbytes)


def read_block(block: torch.Tensor, start: int, count: int) -> bytes:
    """The bytes of `count` elements from number `start` on. SaveFailedError where the block has no memory."""
    origin, width = block.data_ptr(), block.element_size()
    if not origin:
        raise SaveFailedError(_NO_MEMORY)
    return ctypes.string_at(origin + start * width, count * width)
