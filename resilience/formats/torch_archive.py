"""How tensors become the bytes of `torch.save`, and how such bytes are read back, without a second copy in memory.

Everything here is a whole `torch.save` archive: one tensor, or one list that holds one object.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterable
from typing import IO, Any, cast

import numpy as np
import torch

from resilience.errors import CorruptCopyError

__all__ = ["archive_of", "as_own_storage", "read_archive", "saved_bytes"]


def as_own_storage(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in a contiguous tensor whose storage holds nothing else; a view where possible.

    `torch.save` writes whole storages: saving a view into an arena would write the arena.
    """
    dense = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    if dense.numel() == 0:
        return torch.empty(tensor.shape, dtype=tensor.dtype)
    content = dense.reshape(-1).view(torch.uint8).numpy().data
    own = torch.frombuffer(content, dtype=torch.uint8)
    return own.view(tensor.dtype).view(tensor.shape)


def archive_of(stored: Any, tensors: Iterable[torch.Tensor]) -> list[memoryview]:
    """The pieces of `torch.save(stored)`, in order. `tensors`: those in `stored`, each from `as_own_storage`.

    The tensors' bytes are not copied: their pieces are views, valid while the tensors are.
    """
    sink = _Pieces(tensors)
    torch.save(stored, sink)  # type: ignore[arg-type]
    return sink.pieces


def saved_bytes(stored: Any) -> bytes:
    """`torch.save` of something small."""
    buffer = io.BytesIO()
    torch.save(stored, buffer)
    return buffer.getvalue()


def read_archive(content: memoryview, what: str) -> Any:
    """What was saved, tensors on the CPU. Nothing but tensors and plain values is admitted: CorruptCopyError.

    Nor is anything that would need more memory than it has bytes: no entry may be compressed.
    """
    try:
        _refuse_what_swells(content)
        return torch.load(cast(IO[bytes], _ViewReader(content)), map_location="cpu", weights_only=True)
    except Exception as error:
        raise CorruptCopyError(
            f"{what} is refused: {str(error)[:300] or type(error).__name__}.",
            advice="It is damaged, or holds something else than tensors and plain values.",
        ) from error


def _refuse_what_swells(content: memoryview) -> None:
    """`torch.save` stores entries as they are; a few compressed bytes could unfold to any size."""
    with zipfile.ZipFile(cast(IO[bytes], _ViewReader(content))) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size for entry in entries):
        raise ValueError("it has compressed entries")
    if sum(entry.file_size for entry in entries) > len(content):
        raise ValueError("its entries claim more bytes than it has")


class _Pieces:
    """A file to write to that keeps views of the tensors it knows and copies of everything else."""

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        self.pieces: list[memoryview] = []
        self._known = {
            tensor.data_ptr(): tensor.reshape(-1).view(torch.uint8).numpy().data for tensor in tensors if tensor.numel()
        }

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
