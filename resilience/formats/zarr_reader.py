"""How any region of any tensor is read from `tensors.zarr`, ours or another program's.

A chunk's length and checksum are held against what the metadata say before its bytes go anywhere. A chunk that is not
there has the array's fill value, as zarr wants it; of ours none may be missing, which `ZarrV3.problem` has seen to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from resilience.errors import CorruptCopyError, LayoutMismatchError, MissingKeysError
from resilience.formats.directory import COMMON, MARKER, FolderFiles, verify_files
from resilience.formats.keys import tree_key
from resilience.formats.protocol import RankState, StoredTensor, Target
from resilience.formats.rank_object import rank_state_of
from resilience.formats.region import MAPPED_BYTES, narrow, row_steps, rows
from resilience.formats.torch_archive import read_archive
from resilience.formats.zarr_checksum import checksum
from resilience.formats.zarr_metadata import ARRAY, CHECKSUM_BYTES, STORE, ZarrArray, read_index
from resilience.formats.zarr_names import OBJECTS, object_files
from resilience.stores.filesystem import FileSystem
from resilience.stores.shared_inventory import read_folder
from resilience.stores.shared_records import RECORD_NAME
from resilience.stores.trackers import TRAIN_STATE

__all__ = ["ZarrReader"]

_COMMON_LIMIT = 1 << 30
_ALWAYS_READ = frozenset({f"{STORE}/{ARRAY}", COMMON, MARKER, TRAIN_STATE, RECORD_NAME})

#: One chunk of an array and those who want something of it.
_Wants = dict[str, tuple[ZarrArray, tuple[int, ...], list[Target]]]


class ZarrReader:
    """See `CheckpointReader`. Made by `ZarrV3.open`, which has checked that the folder is whole."""

    def __init__(self, folder: Path, fs: FileSystem) -> None:
        self.folder = folder
        self.record = read_folder(folder, fs)
        self._fs = fs
        self._files = FolderFiles(folder, fs)
        stored = read_index(folder, fs)
        self._arrays = {tree_key(key): array for key, array in stored.arrays.items()}
        self._aliases = {tree_key(alias): tree_key(key) for alias, key in stored.aliases.items()}
        self._arrays |= {alias: self._arrays[key] for alias, key in self._aliases.items()}

    @cached_property
    def index(self) -> Mapping[str, StoredTensor]:
        return {
            path: StoredTensor(getattr(torch, array.dtype), array.grid.shape) for path, array in self._arrays.items()
        }

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._aliases

    @cached_property
    def common(self) -> Mapping[str, Any]:
        path = self.folder / COMMON
        if self._fs.stat(path) is None:
            return {}
        common = read_archive(memoryview(self._fs.read(path, _COMMON_LIMIT)), str(path))
        if not isinstance(common, dict):
            raise CorruptCopyError(f"The common state in {self.folder} is no dictionary.")
        return common

    @property
    def objects(self) -> tuple[str, ...]:
        return ()

    def read_object(self, key: str) -> Any:
        raise MissingKeysError(f"{self.folder} has no object {key}: the format zarr keeps none for other programs.")

    def rank_state(self, rank: int) -> RankState | None:
        name = self._rank_files.get(rank)
        if name is None:
            return None
        what = str(self.folder / name)
        return rank_state_of(read_archive(self._files.view(name), what), what)

    def read(self, targets: Sequence[Target]) -> None:
        for name, (array, place, wanting) in sorted(self._wants(targets).items()):
            try:
                self._read_chunk(name, array, place, wanting)
            finally:
                self._files.close()  # there may be more chunks than a process may have mappings

    def files(self, targets: Sequence[Target], rank: int | None = None) -> frozenset[str]:
        names = set(self._wants(targets)) | _ALWAYS_READ
        if rank in self._rank_files:
            names.add(self._rank_files[rank])
        return frozenset(name for name in names if self._fs.stat(self.folder / name) is not None)

    def verify(self, files: Iterable[str] | None = None) -> None:
        data = [name for name in self.record.files if name.startswith(f"{STORE}/")] if self.record else []
        verify_files(self.folder, self._fs, data, files, ours=self.record is not None)

    def close(self) -> None:
        self._files.close()

    @cached_property
    def _rank_files(self) -> dict[int, str]:
        """Rank → its object, of the world that wrote this checkpoint; another program's has none."""
        if self.record is None:
            return {}
        found = object_files(self._fs.list_dir(self.folder / OBJECTS), self.record.world_size)
        return {rank: name for rank, name in found.items() if rank < self.record.world_size}

    def _wants(self, targets: Sequence[Target]) -> _Wants:
        """The chunks that the targets need, by file."""
        missing = sorted({target.key for target in targets} - self._arrays.keys())
        if missing:
            raise MissingKeysError(
                f"{self.folder} lacks {len(missing)} of {len(targets)} items asked for: {_some(missing)}. "
                f"It has {len(self._arrays)}: {_some(sorted(self._arrays))}."
            )
        wants: _Wants = {}
        for target in targets:
            array = self._arrays[target.key]
            self._check_fits(target, array)
            for place in array.grid.touched(target.offsets, tuple(target.out.shape)):
                wants.setdefault(array.chunk_file(place), (array, place, []))[2].append(target)
        return wants

    def _check_fits(self, target: Target, array: ZarrArray) -> None:
        sizes, shape, expected = tuple(target.out.shape), array.grid.shape, target.global_shape
        inside = len(sizes) == len(target.offsets) == len(shape) and all(
            start >= 0 and start + length <= whole
            for start, length, whole in zip(target.offsets, sizes, shape, strict=True)
        )
        if not inside or (expected is not None and tuple(expected) != shape):
            wanted = f"{sizes} at {target.offsets}" + (f" of {tuple(expected)}" if expected is not None else "")
            raise LayoutMismatchError(f"{target.key} has shape {shape} in {self.folder}; asked for is {wanted}.")

    def _read_chunk(self, name: str, array: ZarrArray, place: tuple[int, ...], wanting: Sequence[Target]) -> None:
        if self._fs.stat(self.folder / name) is None:
            filled = self._filled(name, array)
            self._hand_out(array, place, wanting, lambda: filled)
            return
        self._check(name, array)
        self._hand_out(array, place, wanting, lambda: self._box(name, array))

    def _hand_out(
        self, array: ZarrArray, place: tuple[int, ...], wanting: Sequence[Target], box: Callable[[], torch.Tensor]
    ) -> None:
        """Copy what each target wants of a chunk, step by step; the file is let go of after each."""
        for target in wanting:
            overlap = array.grid.overlap(place, target.offsets, tuple(target.out.shape))
            starts = [start - offset for start, offset in zip(overlap.starts, target.offsets, strict=True)]
            into = narrow(target.out.detach(), starts, overlap.lengths)
            for start, stop in row_steps(overlap.lengths, into.element_size()):
                rows(into, start, stop).copy_(rows(narrow(box(), overlap.in_chunk, overlap.lengths), start, stop))
                self._files.close()

    def _filled(self, name: str, array: ZarrArray) -> torch.Tensor:
        """A chunk that is not there."""
        if self.record is not None:
            raise CorruptCopyError(f"{self.folder / name} is missing.")
        fill = torch.tensor(array.fill, dtype=getattr(torch, array.stored)).reshape(1).view(getattr(torch, array.dtype))
        return fill.reshape((1,) * len(array.grid.chunk)).expand(array.grid.chunk)

    def _check(self, name: str, array: ZarrArray) -> None:
        """Hold a chunk's length and checksum against what is expected, before any of its bytes go anywhere."""
        nbytes = len(self._files.view(name))
        if nbytes != array.chunk_bytes:
            raise CorruptCopyError(
                f"{self.folder / name} has {nbytes} bytes; a chunk of {array.dtype} {array.grid.chunk} has "
                f"{array.chunk_bytes}."
            )
        if not array.checksum:
            return
        found, end = 0, nbytes - CHECKSUM_BYTES
        for start in range(0, end, MAPPED_BYTES):
            found = checksum(self._files.view(name)[start : min(start + MAPPED_BYTES, end)], found)
            if nbytes > MAPPED_BYTES:  # else it is copied from this mapping, and let go of then
                self._files.close()
        if found != int.from_bytes(self._files.view(name)[end:], "little"):
            raise CorruptCopyError(f"{self.folder / name} does not match its CRC-32C.")

    def _box(self, name: str, array: ZarrArray) -> torch.Tensor:
        """A whole chunk, over the mapped file."""
        content = self._files.view(name)
        content = content[:-CHECKSUM_BYTES] if array.checksum else content
        return torch.frombuffer(content, dtype=torch.uint8).view(getattr(torch, array.dtype)).view(array.grid.chunk)


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:20]) + (", …" if len(keys) > 20 else "")
