"""How tensors become the bytes of `torch.save`, and how such bytes are read back, without a second copy in memory.

Everything here is a whole `torch.save` archive: one tensor, or one list that holds one object.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Iterable
from contextlib import nullcontext
from typing import IO, Any, cast

import numpy as np
import torch
from torch.utils.dlpack import from_dlpack

from resilience.errors import CorruptCopyError
from resilience.formats.archive_frame import framed, lying_in, remember
from resilience.state.tensors import memory_of

__all__ = ["aligned", "archive_of", "archive_of_one", "as_own_storage", "read_archive", "saved_bytes", "tensor_in"]

_STORAGES = "/data/"  # in the name of each entry that holds a tensor's bytes
_BYTE_ORDER = "/byteorder"
#: What the pickle of an array of numbers names, by whichever name its numpy had it. An array of objects needs no more
#: than these either: what lies in it has to be admitted like all else.
_ARRAYS: list[Any] = [
    *((np.empty(0).__reduce__()[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    np.ndarray,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("bool", "u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8")),
]


def as_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in a contiguous tensor whose storage holds nothing else; a view where possible.

    `torch.save` writes whole storages: saving a view into an arena would write the arena.
    """
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if dense.numel() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    own = from_dlpack(dense.reshape(-1).view(torch.uint8))
    return own.view(tensor.dtype).view(tensor.shape)


def archive_of(stored: Any, tensors: Iterable[torch.Tensor]) -> list[memoryview]:
    """The pieces of `torch.save(stored)`, in order. `tensors`: those in `stored`, each from `as_own_storage`.

    The tensors' bytes are not copied: their pieces are views, valid while the tensors are.
    """
    sink = _Pieces(tensors)
    torch.save(stored, sink)  # type: ignore[arg-type]
    return sink.pieces


def archive_of_one(tensor: torch.Tensor) -> list[memoryview]:
    """The same of one tensor from `as_own_storage`, quicker."""
    return (framed(tensor) if tensor.numel() else None) or archive_of(tensor, [tensor])


def saved_bytes(stored: Any) -> bytes:
    """`torch.save` of something small."""
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    return buffer.getvalue()


def read_archive(content: memoryview, what: str, *, arrays: bool = False) -> Any:
    """What was saved, tensors on the CPU. Nothing but tensors and plain values is admitted: CorruptCopyError.

    Nor is anything that would need more memory than it has bytes: no entry may be compressed. `arrays`: numpy arrays of
    numbers are admitted too (Megatron's random state has one).
    """
    try:
        _checked_entries(content)
        with torch.serialization.safe_globals(_ARRAYS) if arrays else nullcontext():
            return torch.load(cast(IO[bytes], _ViewReader(content)), map_location="cpu", weights_only=True)
    except Exception as error:
        raise _refused(what, error) from error


def tensor_in(content: memoryview, what: str, expected: tuple[torch.dtype, torch.Size]) -> tuple[Any, bool]:
    """The same for an archive of one tensor; True if it is a view of `content`, because its bytes serve as they lie.

    `expected`: dtype and shape. What it really has is for the caller to compare.

    Such a view keeps `content` alive and must not be written to, nor read but through `aligned`: archives follow each
    other in a file without gaps.
    """
    if (known := lying_in(content, *expected)) is not None:
        return known, True
    try:
        lying = _lying_in(content)
    except Exception as error:
        raise _refused(what, error) from error
    if lying is None:
        return read_archive(content, what), False
    if lying.is_contiguous() and lying.nbytes == lying.untyped_storage().nbytes():
        remember(lying)
    return lying, True


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The same values at an address that suits their dtype: a copy, made byte by byte, if they lie at another one.

    Torch takes the address for granted; a complex128 that lies elsewhere ends the process.
    """
    itemsize = tensor.element_size()
    if tensor.data_ptr() % itemsize == 0:
        return tensor
    as_bytes = torch.empty(0, dtype=torch.uint8).set_(
        tensor.untyped_storage(),
        tensor.storage_offset() * itemsize,
        (*tensor.shape, itemsize),
        (*(stride * itemsize for stride in tensor.stride()), 1),
    )
    return as_bytes.clone(memory_format=torch.contiguous_format).view(tensor.dtype).reshape(tensor.shape)


def _lying_in(content: memoryview) -> torch.Tensor | None:
    """None for all that only a real load understands: several storages, none, another byte order, a subclass."""
    entries = _checked_entries(content)
    storages = [entry for entry in entries if _STORAGES in entry.filename and "/." not in entry.filename]
    if len(storages) != 1 or storages[0].file_size == 0 or not _in_our_byte_order(content, entries):
        return None
    empty = torch.load(cast(IO[bytes], _ViewReader(content)), map_location="meta", weights_only=True)
    if type(empty) is not torch.Tensor or empty.layout != torch.strided or empty.is_quantized:
        return None
    storage: Any = empty.untyped_storage()
    start, nbytes = storage._checkpoint_offset, storages[0].file_size
    if storage.nbytes() != nbytes or empty.is_conj() or empty.is_neg():
        return None
    if not 0 <= start <= len(content) - nbytes:
        raise ValueError("its tensor's bytes lie outside of it")
    flat = torch.frombuffer(content[start : start + nbytes], dtype=torch.uint8).view(empty.dtype)
    return flat.as_strided(empty.shape, empty.stride(), empty.storage_offset())  # refuses what leaves the storage


def _in_our_byte_order(content: memoryview, entries: Iterable[zipfile.ZipInfo]) -> bool:
    """`torch.save` says it in an entry, without which the order is the machine's."""
    said = [entry for entry in entries if entry.filename.endswith(_BYTE_ORDER)]
    with zipfile.ZipFile(cast(IO[bytes], _ViewReader(content))) as archive:
        return all(archive.read(entry) == sys.byteorder.encode() for entry in said)


def _checked_entries(content: memoryview) -> list[zipfile.ZipInfo]:
    """`torch.save` stores entries as they are; a few compressed bytes could unfold to any size."""
    with zipfile.ZipFile(cast(IO[bytes], _ViewReader(content))) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries):
        raise ValueError("it has compressed entries")
    if min((entry.header_offset for entry in entries), default=0) != 0:
        # `zipfile` makes up for bytes that were lost or put before; torch's reader takes what lies there for lengths
        raise ValueError("its entries do not lie where it says")
    if sum(entry.file_size for entry in entries) > len(content):
        raise ValueError("its entries claim more bytes than it has")
    return entries


def _refused(what: str, error: Exception) -> CorruptCopyError:
    return CorruptCopyError(
        f"{what} is refused: {str(error)[:300] or type(error).__name__}.",
        advice="It is damaged, or holds something else than tensors and plain values.",
    )


class _Pieces:
    """A file to write to that keeps views of the tensors it knows and copies of everything else."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.pieces: list[memoryview] = []
        self._known = {tensor.data_ptr(): memory_of(tensor) for tensor in tensors if tensor.numel()}

    def write(self, content: memoryview) -> int:
        address = np.frombuffer(content, np.uint8).ctypes.data if len(content) else 0
        known = self._known.get(address)
        if known is not None and len(known) == len(content):
            self.pieces.append(known)
        else:
            self.pieces.append(memoryview(bytes(content)))
        return len(content)

    def flush(self) -> None:
        return


class _ViewReader(io.RawIOBase):
    """Memory as a file, so that `torch.load` copies it once."""

    def __init__(self, content: memoryview) -> None:
        super().__init__()
        self._content = content
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: len(self._content)}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, into: Any) -> int:
        part = self._content[self._position : self._position + len(into)]
        into[: len(part)] = part
        self._position += len(part)
        return len(part)
