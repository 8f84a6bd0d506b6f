"""The bytes of `torch.save(tensor)` around those of the tensor: made once for each dtype and shape, then filled in.

Of a tensor's archive only its bytes and their CRC-32 are its own. torch makes the rest anew for each (0.2 ms), and its
CRC-32 at 2.4 GB/s; zlib has 3.8, and `fastcrc` (the extra `speed`) 12. The archive is laid out by torch itself, told to
skip the bytes (`torch.serialization.skip_data`): whatever this version of it writes is what is written. The other way
round, an archive that a frame fits need not be taken apart to be read.
"""

from __future__ import annotations

import functools
import struct
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch

from resilience.state.tensors import memory_of

__all__ = ["framed", "lying_in", "remember"]

_KEPT: Final = 1024  # frames, of some 1.5 kB each
_ENTRY, _DESCRIPTOR = b"PK\x01\x02", b"PK\x07\x08"
_STORAGE = b"/data/0"
_ENTRY_HEAD: Final = struct.Struct("<4s6H3I5H2I")
_CRC_IN_ENTRY, _CRC_IN_DESCRIPTOR = 16, 4
_END_BYTES: Final = 22  # where the directory lies, and how long it is


@dataclass(frozen=True)
class _Frame:
    """What comes before a tensor's bytes and after them. `crc_at`: where in the latter their CRC-32 stands."""

    head: bytes
    tail: bytes
    crc_at: tuple[int, int]


def framed(tensor: torch.Tensor) -> list[memoryview] | None:
    """The pieces of `torch.save(tensor)`, whose bytes are not copied; the archive's own id says nothing of them.

    `tensor`: contiguous, alone in its storage, not empty. None where torch lays it out in a way that is not known here.
    """
    frame = _FRAMES.of(tensor)
    if frame is None:
        return None
    content = memory_of(tensor)
    checksum = struct.pack("<I", _crc32()(content))
    tail = bytearray(frame.tail)
    for at in frame.crc_at:
        tail[at : at + 4] = checksum
    return [memoryview(frame.head), content, memoryview(tail)]


def lying_in(content: memoryview, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor | None:
    """The tensor in an archive that a frame fits, as a view of `content`; None if none does, or none was made as yet.

    All that says where its bytes lie is compared, so that this is what torch would load.
    """
    frame = _FRAMES.known(dtype, shape)
    if frame is None:
        return None
    start, stop = len(frame.head), len(content) - len(frame.tail)
    if stop - start != shape.numel() * dtype.itemsize or bytes(content[:start]) != frame.head:
        return None
    if bytes(content[stop : stop + 4]) != _DESCRIPTOR or bytes(content[-_END_BYTES:]) != frame.tail[-_END_BYTES:]:
        return None
    return torch.frombuffer(content[start:stop], dtype=torch.uint8).view(dtype).view(shape)


def remember(tensor: torch.Tensor) -> None:
    """Have a frame for archives of such tensors: contiguous, alone in their storage, not empty."""
    _FRAMES.of(tensor)


class _Frames:
    """Those that were needed last. Several threads may ask."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._made: OrderedDict[tuple[torch.dtype, torch.Size], _Frame | None] = OrderedDict()

    def known(self, dtype: torch.dtype, shape: torch.Size) -> _Frame | None:
        with self._guard:
            return self._made.get((dtype, shape))

    def of(self, tensor: torch.Tensor) -> _Frame | None:
        kind = (tensor.dtype, tensor.shape)
        with self._guard:
            if kind in self._made:
                self._made.move_to_end(kind)
                return self._made[kind]
        frame = _make(tensor)
        with self._guard:
            self._made[kind] = frame
            if len(self._made) > _KEPT:
                self._made.popitem(last=False)
        return frame


_FRAMES = _Frames()


class _Sink:
    """What torch writes, and where it steps over the tensor's bytes."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.gaps: list[tuple[int, int]] = []  # before which write, and how many bytes

    def write(self, content: memoryview) -> int:
        self.written.append(bytes(content))
        return len(content)

    def seek(self, offset: int, whence: int = 0) -> int:
        if whence != 1:
            raise ValueError(f"torch.save seeks to {offset} ({whence})")
        self.gaps.append((len(self.written), offset))
        return 0

    def flush(self) -> None:
        return


def _make(tensor: torch.Tensor) -> _Frame | None:
    sink: Any = _Sink()
    try:
        with torch.serialization.skip_data():
            torch.save(tensor, sink)
    except (AttributeError, RuntimeError, ValueError):
        return None
    if len(sink.gaps) != 1 or sink.gaps[0][1] != tensor.nbytes:
        return None
    cut = sink.gaps[0][0]
    head, tail = b"".join(sink.written[:cut]), b"".join(sink.written[cut:])
    entry = _entry_of_the_storage(tail)
    if entry is None or tail[:4] != _DESCRIPTOR:
        return None
    crc_at = (_CRC_IN_DESCRIPTOR, entry + _CRC_IN_ENTRY)
    return _Frame(head, tail, crc_at) if all(tail[at : at + 4] == bytes(4) for at in crc_at) else None


def _entry_of_the_storage(tail: bytes) -> int | None:
    """Where the archive's directory speaks of the tensor's bytes; None if it is not understood."""
    at = max(0, tail.find(_ENTRY))  # what lies before it is a version and an identity, in digits
    while tail[at : at + 4] == _ENTRY and at + _ENTRY_HEAD.size <= len(tail):
        fields = _ENTRY_HEAD.unpack_from(tail, at)
        name_bytes, extra_bytes, comment_bytes = fields[10:13]
        name = tail[at + _ENTRY_HEAD.size : at + _ENTRY_HEAD.size + name_bytes]
        if name.endswith(_STORAGE):
            return at
        at += _ENTRY_HEAD.size + name_bytes + extra_bytes + comment_bytes
    return None


@functools.cache
def _crc32() -> Callable[[memoryview], int]:
    """The quickest that is there. All of them let go of the interpreter's lock."""
    try:
        from fastcrc.crc32 import iso_hdlc
    except ImportError:
        return zlib.crc32
    return iso_hdlc
