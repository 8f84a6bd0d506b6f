"""How any region of any tensor is read from a folder of torch.distributed.checkpoint, ours or another program's.

DCP's planner says which stored boxes a region needs; the bytes come through our own reader, which unpickles nothing but
tensors and plain values and believes no length that it has not checked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from resilience.errors import CorruptCopyError, LayoutMismatchError, MissingKeysError
from resilience.formats.dcp_metadata import METADATA, DcpIndex, Extent, StoredChunk, StoredRegion, read_metadata
from resilience.formats.directory import COMMON, MARKER, FolderFiles, verify_files
from resilience.formats.keys import OWN_PREFIX, rank_of, tree_key
from resilience.formats.protocol import RankState, StoredTensor, Target
from resilience.formats.rank_object import rank_state_of
from resilience.formats.region import MAPPED_BYTES, narrow, row_steps, rows
from resilience.formats.torch_archive import aligned, read_archive, tensor_in
from resilience.formats.torch_dist import COMMON_STATE
from resilience.stores.filesystem import FileSystem
from resilience.stores.shared_inventory import read_folder
from resilience.stores.shared_records import RECORD_NAME
from resilience.stores.trackers import TRAIN_STATE

__all__ = ["TorchDistReader"]

_COMMON_LIMIT = 1 << 30
_ALWAYS_READ = frozenset({METADATA, COMMON, MARKER, TRAIN_STATE, RECORD_NAME})


class TorchDistReader:
    """See `CheckpointReader`. Made by `TorchDist.open`, which has checked that the folder is whole."""

    def __init__(self, folder: Path, fs: FileSystem) -> None:
        self.folder = folder
        self.record = read_folder(folder, fs)
        self._fs = fs
        self._stored = read_metadata(folder, fs)
        paths = self._paths(self._stored)
        self._regions = {path: self._stored.tensors[key] for key, path in paths.items()}
        self._files = FolderFiles(folder, fs)
        self._mapped_bytes = 0  # read since the files were last let go of

    def _paths(self, stored: DcpIndex) -> Mapping[str, str]:
        """Key → tree path of every tensor that is part of the state."""
        return {key: tree_key(key) for key in stored.tensors}

    @cached_property
    def index(self) -> Mapping[str, StoredTensor]:
        return {
            path: StoredTensor(getattr(torch, region.dtype), region.shape) for path, region in self._regions.items()
        }

    @cached_property
    def aliases(self) -> Mapping[str, str]:
        first: dict[tuple[StoredChunk, ...], str] = {}
        found = {path: first.setdefault(region.chunks, path) for path, region in self._regions.items() if region.chunks}
        return {path: root for path, root in found.items() if path != root}

    @cached_property
    def common(self) -> Mapping[str, Any]:
        if COMMON_STATE in self._stored.objects:
            common = self._object(COMMON_STATE)
        else:
            path = self.folder / COMMON
            common = read_archive(memoryview(self._fs.read(path, _COMMON_LIMIT)), str(path))
        if not isinstance(common, dict):
            raise CorruptCopyError(f"The common state in {self.folder} is no dictionary.")
        return common

    @cached_property
    def objects(self) -> frozenset[str]:
        return frozenset(key for key in self._stored.objects if not key.startswith(OWN_PREFIX)) - {COMMON_STATE}

    def read_object(self, key: str) -> Any:
        return self._object(key, arrays=True)

    def rank_state(self, rank: int) -> RankState | None:
        key = self._rank_keys.get(rank)
        if key is None:
            return None
        return rank_state_of(self._stored_object(key), f"{key} in {self.folder}")

    def read(self, targets: Sequence[Target]) -> None:
        reads = self._plan(targets)
        # In the order of the files, each stored box read once, however many targets share it.
        by_extent: dict[Extent, list[tuple[StoredChunk, ReadItem, Target]]] = {}
        for target, chunk, item in reads:
            by_extent.setdefault(chunk.extent, []).append((chunk, item, target))
        for extent in sorted(by_extent, key=lambda extent: (extent.file, extent.start)):
            self._read_box(extent, by_extent[extent])

    def _read_box(self, extent: Extent, wanting: Sequence[tuple[StoredChunk, ReadItem, Target]]) -> None:
        """What was read counts as this process's memory while it is mapped, so that it is let go of in between."""
        box, lies_in_file = None, False
        for chunk, item, target in wanting:
            into = narrow(target.out.detach(), item.dest_offsets, item.lengths)
            for start, stop in row_steps(item.lengths, into.element_size()):
                if box is None:
                    box, lies_in_file = self._box(extent, chunk, self._regions[target.key])
                stored = rows(narrow(box, item.storage_offsets, item.lengths), start, stop)
                _copy(stored, rows(into, start, stop))
                self._mapped_bytes += stored.nbytes
                if self._mapped_bytes >= MAPPED_BYTES:
                    del stored
                    box = None if lies_in_file else box
                    self._files.close()
                    self._mapped_bytes = 0

    def files(self, targets: Sequence[Target], rank: int | None = None) -> frozenset[str]:
        names = {chunk.extent.file for _, chunk, _ in self._plan(targets)}
        if rank in self._rank_keys:
            names.add(self._stored.objects[self._rank_keys[rank]].file)
        return frozenset(names | {name for name in _ALWAYS_READ if self._fs.stat(self.folder / name) is not None})

    def verify(self, files: Iterable[str] | None = None) -> None:
        verify_files(self.folder, self._fs, self._stored.file_bytes, files, ours=self.record is not None)

    def close(self) -> None:
        self._files.close()

    @cached_property
    def _rank_keys(self) -> dict[int, str]:
        """Rank → key of its object, for the world that wrote this checkpoint."""
        found = {key: place for key in self._stored.objects if (place := rank_of(key)) is not None}
        world_size = self.record.world_size if self.record else max((world for _, world in found.values()), default=0)
        return {rank: key for key, (rank, world) in found.items() if world == world_size and rank < world}

    def _stored_object(self, key: str, *, arrays: bool = False) -> Any:
        extent = self._stored.objects[key]
        content = self._files.part(extent.file, extent.start, extent.nbytes)
        return read_archive(content, f"{key} in {self.folder}", arrays=arrays)

    def _object(self, key: str, *, arrays: bool = False) -> Any:
        stored = self._stored_object(key, arrays=arrays)
        if not isinstance(stored, list) or len(stored) != 1:
            raise CorruptCopyError(f"{key} in {self.folder} is no list of one object.")
        return stored[0]

    def _box(self, extent: Extent, chunk: StoredChunk, region: StoredRegion) -> tuple[torch.Tensor, bool]:
        """A whole stored part, and whether it is the mapped file itself."""
        what = f"{extent.file} in {self.folder} at byte {extent.start}"
        content = self._files.part(extent.file, extent.start, extent.nbytes)
        expected = getattr(torch, region.dtype), torch.Size(chunk.sizes)
        box, lies_in_file = tensor_in(content, what, expected)
        if not isinstance(box, torch.Tensor) or (box.dtype, box.shape) != expected:
            found = f"{box.dtype} {tuple(box.shape)}" if isinstance(box, torch.Tensor) else type(box).__name__
            raise CorruptCopyError(f"{what} is {found}; .metadata says {region.dtype} {chunk.sizes}.")
        return box, lies_in_file

    def _plan(self, targets: Sequence[Target]) -> list[tuple[Target, StoredChunk, ReadItem]]:
        missing = sorted({target.key for target in targets} - self._regions.keys())
        if missing:
            raise MissingKeysError(
                f"{self.folder} lacks {len(missing)} of {len(targets)} items asked for: {_some(missing)}. "
                f"It has {len(self._regions)}: {_some(sorted(self._regions))}."
            )
        return [entry for target in targets for entry in self._plan_one(target, self._regions[target.key])]

    def _plan_one(self, target: Target, region: StoredRegion) -> Iterator[tuple[Target, StoredChunk, ReadItem]]:
        sizes = tuple(target.out.shape)
        expected = target.global_shape
        inside = len(sizes) == len(target.offsets) == len(region.shape) and all(
            start >= 0 and start + length <= whole
            for start, length, whole in zip(target.offsets, sizes, region.shape, strict=True)
        )
        if not inside or (expected is not None and tuple(expected) != region.shape):
            wanted = f"{sizes} at {target.offsets}" + (f" of {tuple(expected)}" if expected is not None else "")
            raise LayoutMismatchError(f"{target.key} has shape {region.shape} in {self.folder}; asked for is {wanted}.")
        stored = TensorStorageMetadata(
            TensorProperties(dtype=getattr(torch, region.dtype)),
            torch.Size(region.shape),
            [ChunkStorageMetadata(torch.Size(chunk.offsets), torch.Size(chunk.sizes)) for chunk in region.chunks],
        )
        wanted_box = ChunkStorageMetadata(torch.Size(target.offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(target.key, stored, [wanted_box]) if 0 not in sizes else []
        if sum(math.prod(item.lengths) for item in items) != math.prod(sizes):
            raise CorruptCopyError(f"The stored parts of {target.key} in {self.folder} do not cover what is asked for.")
        for item in items:
            assert item.storage_index.index is not None, "DCP's planner numbers the boxes that it was given"
            yield target, region.chunks[item.storage_index.index], item


def _copy(stored: torch.Tensor, into: torch.Tensor) -> None:
    """Byte by byte where that will do: archives follow each other without regard to what a dtype is aligned to."""
    if stored.dtype == into.dtype and stored.is_contiguous() and into.is_contiguous():
        into.reshape(-1).view(torch.uint8).copy_(stored.reshape(-1).view(torch.uint8))
    else:
        into.copy_(aligned(stored))


def _some(keys: Sequence[str]) -> str:
    return ", ".join(keys[:20]) + (", …" if len(keys) > 20 else "")
