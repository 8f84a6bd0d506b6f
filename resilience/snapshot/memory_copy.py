"""Plain tensors on the host, copied as blocks of memory.

torch copies a tensor with loads and stores. Many megabytes go around the processor's cache instead, in one call, where
that was compiled (`streaming`), in two thirds of the time. Else it is the C library's memcpy, which takes whatever the
processor is quickest at (docs/performance.md). Neither knows what a tensor is: `is_block` says for which ones their
bytes are all there is to copy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from resilience.errors import SaveFailedError, UnsupportedStateError
from resilience.snapshot.streaming import STREAMING, Addresses, addresses

__all__ = [
    "Blocks",
    "check_memory",
    "copy_blocks",
    "copy_others",
    "copy_tensors",
    "is_block",
    "lanes_copy_blocks",
    "read_block",
]

#: From how many bytes in all on they are copied around the cache: below, who hashes them next finds them in it.
_STREAMED_BYTES: Final = 8 << 20
_FEW: Final = 256  # small blocks that are copied sooner one by one than their addresses are put into arrays
_LARGE_BYTES: Final = 4 << 20
_WITH_MEMORY: Final = frozenset((torch.Tensor, torch.nn.Parameter))
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


def lanes_copy_blocks() -> bool:
    """Whether blocks may be copied beside training: one after the other, each would wait for the interpreter lock."""
    return STREAMING.much is not None


@dataclass(frozen=True)
class Blocks:
    """Where blocks are to lie, from some address on, and how many bytes each has."""

    starts: Addresses
    sizes: Addresses
    nbytes: int  # of all

    @classmethod
    def at(cls, starts: Iterable[int], sizes: Iterable[int]) -> Blocks:
        lengths = addresses(sizes)
        return cls(addresses(starts), lengths, int(lengths.sum()))


def copy_blocks(base: int, blocks: Blocks, sources: Sequence[torch.Tensor], *, in_lane: bool = False) -> None:
    """Copy `sources`, which are the blocks, to where they are to lie from the address `base` on.

    Where a source lies is asked at each copy: memory that was given back and got anew (FSDP does that to the storage of
    its parameters) is another one. SaveFailedError, before anything is copied, where one has no memory at all.
    """
    origins = list(map(torch.Tensor.data_ptr, sources))
    if 0 in origins:
        raise SaveFailedError(_NO_MEMORY)
    little = blocks.nbytes < _STREAMED_BYTES and not in_lane
    together = STREAMING.little if little else STREAMING.much
    if together is not None and not (little and len(origins) <= _FEW):
        together(blocks.starts + addresses([base]), addresses(origins), blocks.sizes)
        return
    for start, origin, nbytes in zip(blocks.starts.tolist(), origins, blocks.sizes.tolist(), strict=True):
        (_copy_large if nbytes >= _LARGE_BYTES else _copy_small)(base + start, origin, nbytes)


@torch.no_grad()
def copy_others(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source on the host into its target, whatever their dtypes and strides, in one call of torch's.

    SaveFailedError, before anything is copied, where a source has no memory.
    """
    if _lack_memory(sources):
        raise SaveFailedError(_NO_MEMORY)
    if targets:  # torch refuses to copy nothing
        torch._foreach_copy_(list(targets), list(sources))


@torch.no_grad()
def copy_tensors(targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
    """Copy each source into its target, of the same shape, wherever it lies and whatever its dtype and strides.

    UnsupportedStateError, before anything is copied, where one has no memory.
    """
    if _lack_memory([*targets, *sources]):
        raise UnsupportedStateError("a tensor that is to be copied has no memory: its storage was given back.")
    others, blocks = list(range(len(targets))), list[int]()
    if STREAMING.much is not None:
        alike = [_are_blocks(target, source) for target, source in zip(targets, sources, strict=True)]
        blocks = [place for place in others if alike[place]]
        others = [place for place in others if not alike[place]]
    if blocks:
        into = [targets[place] for place in blocks]
        places = Blocks.at(map(torch.Tensor.data_ptr, into), (target.nbytes for target in into))
        copy_blocks(0, places, [sources[place] for place in blocks])
    if others:
        torch._foreach_copy_([targets[place] for place in others], [sources[place] for place in others])


def _are_blocks(target: torch.Tensor, source: torch.Tensor) -> bool:
    """Whether the bytes of one are all that there is to copy into the other."""
    return target.dtype == source.dtype and target.shape == source.shape and is_block(target) and is_block(source)


def check_memory(tensor: torch.Tensor) -> None:
    """SaveFailedError where a tensor on the host that has elements lies nowhere: to read it would end the process."""
    if _lies_nowhere(tensor):
        raise SaveFailedError(_NO_MEMORY)


def _lack_memory(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether one that has elements lies nowhere. Torch would copy it all the same, and end the process."""
    return 0 in map(torch.Tensor.data_ptr, tensors) and any(map(_lies_nowhere, tensors))


def _lies_nowhere(tensor: torch.Tensor) -> bool:
    """Not of wrappers (a DTensor), which have no memory of their own."""
    return tensor.data_ptr() == 0 and tensor.numel() > 0 and type(tensor) in _WITH_MEMORY


def read_block(block: torch.Tensor, start: int, count: int) -> bytes:
    """The bytes of `count` elements from number `start` on. SaveFailedError where the block has no memory."""
    origin, width = block.data_ptr(), block.element_size()
    if not origin:
        raise SaveFailedError(_NO_MEMORY)
    return ctypes.string_at(origin + start * width, count * width)
