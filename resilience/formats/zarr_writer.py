"""How a checkpoint is written so that plain zarr opens its tensors.

    1. agree      which tensors of their own ranks give under plain names (as in all formats)
    2. plan       what every rank has; all compute the same grids and writers (`zarr_plan`, `zarr_chunks`)
    3. describe   rank 0 writes each array's metadata
    4. write      every rank its chunks, its object and its other files; fragments of others' chunks into a spill file
    5. complete   (only where a chunk has bytes of several ranks) its writer takes them from the spill files
    6. finish     rank 0 writes the group's metadata, in which all are consolidated, and the small files

No two ranks write one file. A chunk is written beside its name, fsynced and renamed, hashed as its bytes pass. A rank
that fails says so in the next exchange, so that all raise together and nobody waits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from resilience.errors import CorruptCopyError
from resilience.formats.collective import exchange, on_first
from resilience.formats.directory import FolderFiles
from resilience.formats.folder_files import (
    Backend,
    Written,
    agree_on_save,
    write_own_files,
    write_small_files,
)
from resilience.formats.kept import Kept
from resilience.formats.protocol import Chunk, RankShare, SaveMeta
from resilience.formats.rank_object import own_object
from resilience.formats.zarr_checksum import checksum
from resilience.formats.zarr_chunks import Fragment, Plan, WholeChunk
from resilience.formats.zarr_metadata import (
    ARRAY,
    CHECKSUM_BYTES,
    STORE,
    ZarrArray,
    array_document,
    group_document,
)
from resilience.formats.zarr_names import SPILL, object_file
from resilience.formats.zarr_plan import Planned, plan_grids
from resilience.replication.communicator import Agreements
from resilience.state.tensors import memory_of
from resilience.stores.filesystem import TEMPORARY_PREFIX, FileSystem

__all__ = ["write_checkpoint"]

_BACKEND = Backend("zarr", 3)
_SEGMENT_BYTES = 8 << 20  # hashed, checked and written while it is in the cache
_ZEROS = memoryview(bytes(1 << 20))


def write_checkpoint(
    folder: Path,
    share: RankShare,
    meta: SaveMeta,
    agreements: Agreements,
    fs: FileSystem,
    kept: Kept[Planned] | None = None,
) -> None:
    """See `CheckpointFormat.save`. Collective over `agreements`. `kept`: of a series whose structure stays the same."""
    alone, shared = agree_on_save(share, meta, agreements)
    planned = plan_grids(shared, share.aliases, agreements, kept)
    plan, arrays = planned.plan, planned.arrays
    described: dict[str, Written] = {}
    on_first(agreements, lambda: described.update(_describe(folder, arrays, fs)))
    rank = _Rank(folder, fs, agreements.rank, shared, plan, arrays)

    def write() -> dict[str, Any]:
        own = write_own_files(folder, share, fs)
        if share.values:
            own |= rank.write_object(object_file(agreements.rank, meta.world_size), own_object(alone, share))
        return {"files": _to_json(own | rank.write_chunks()), "spilled": rank.spill()}

    answers = exchange(agreements, write, "write")
    files = [answer["files"] for answer in answers]
    if plan.spilled:
        checks = {source: answer["spilled"] for source, answer in enumerate(answers)}
        files += exchange(agreements, lambda: _to_json(rank.complete(checks)), "complete")

    def finish() -> None:
        if plan.spilled:
            fs.remove_tree(folder / SPILL)
        written = {name: Written(**one) for each in files for name, one in each.items()}
        written |= described | _consolidate(folder, arrays, planned.aliases, fs)
        write_small_files(folder, _BACKEND, written, share, meta, fs)

    on_first(agreements, finish)


def _to_json(files: Mapping[str, Written]) -> dict[str, Any]:
    return {name: file.to_json() for name, file in files.items()}


def _describe(folder: Path, arrays: Mapping[str, ZarrArray], fs: FileSystem) -> dict[str, Written]:
    """Rank 0, before any chunk is written."""
    written: dict[str, Written] = {}
    for array in arrays.values():
        document = json.dumps(array_document(array.key, array.dtype, array.grid)).encode()
        fs.make_dir(folder / STORE / array.folder)
        written |= _write_json(folder, f"{STORE}/{array.folder}/{ARRAY}", document, fs)
    return written


def _consolidate(
    folder: Path, arrays: Mapping[str, ZarrArray], aliases: Mapping[str, str], fs: FileSystem
) -> dict[str, Written]:
    """Rank 0, once all else is there."""
    fs.make_dir(folder / STORE)
    documents = {array.folder: array_document(array.key, array.dtype, array.grid) for array in arrays.values()}
    return _write_json(folder, f"{STORE}/{ARRAY}", json.dumps(group_document(documents, aliases)).encode(), fs)


def _write_json(folder: Path, name: str, content: bytes, fs: FileSystem) -> dict[str, Written]:
    fs.write_file(folder / name, iter([memoryview(content)]))
    fs.fsync_dir((folder / name).parent)
    return {name: Written(len(content), hashlib.sha256(content).hexdigest())}


class _Rank:
    """What one rank writes of a checkpoint's tensors."""

    def __init__(
        self,
        folder: Path,
        fs: FileSystem,
        rank: int,
        shared: Sequence[Chunk],
        plan: Plan,
        arrays: Mapping[str, ZarrArray],
    ) -> None:
        self._folder = folder
        self._fs = fs
        self._rank = rank
        self._shared = shared
        self._plan = plan
        self._arrays = arrays

    def write_object(self, name: str, pieces: Sequence[memoryview]) -> dict[str, Written]:
        """What this rank has alone."""
        self._fs.make_dir((self._folder / name).parent)
        content = _Passing(pieces, closed=False)
        self._fs.write_file(self._folder / name, iter(content))
        self._fs.fsync_dir((self._folder / name).parent)
        return {name: content.written()}

    def write_chunks(self) -> dict[str, Written]:
        """The chunks that need nobody else's bytes; by name."""
        return self._write([chunk for chunk in self._plan.chunks if not chunk.fragments], {})

    def spill(self) -> list[int]:
        """Leave what belongs to others' chunks where they find it; the checksum of each fragment."""
        fragments = self._plan.spilled.get(self._rank, ())
        if not fragments:
            return []
        self._fs.make_dir(self._folder / SPILL)
        checks: list[int] = []

        def content() -> Iterator[memoryview]:
            for fragment in fragments:
                piece = memory_of(self._part(fragment.part, fragment.overlap))
                checks.append(checksum(piece))
                yield piece

        self._fs.write_file(self._folder / _spill_file(self._rank), content())
        return checks

    def complete(self, checks: Mapping[int, Sequence[int]]) -> dict[str, Written]:
        """The chunks of which others had a part. `checks`: of every rank's fragments."""
        return self._write([chunk for chunk in self._plan.chunks if chunk.fragments], checks)

    def _write(self, chunks: Sequence[WholeChunk], checks: Mapping[int, Sequence[int]]) -> dict[str, Written]:
        written: dict[str, Written] = {}
        parents: set[Path] = set()
        spilled = FolderFiles(self._folder, self._fs)
        try:
            for chunk in chunks:
                array = self._arrays[chunk.key]
                name = array.chunk_file(chunk.place)
                path = self._folder / name
                if path.parent not in parents:
                    self._fs.make_dir(path.parent)
                    parents |= _between(path, self._folder / STORE / array.folder)
                content = _Passing(self._pieces(chunk, array, spilled, checks), closed=True)
                beside = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
                self._fs.write_file(beside, iter(content))
                self._fs.rename(beside, path)
                written[name] = content.written()
        finally:
            spilled.close()
        for parent in sorted(parents, reverse=True):
            self._fs.fsync_dir(parent)
        return written

    def _pieces(
        self, chunk: WholeChunk, array: ZarrArray, spilled: FolderFiles, checks: Mapping[int, Sequence[int]]
    ) -> Iterator[memoryview]:
        """The bytes of a whole chunk, without a copy where they lie together in one part."""
        grid = array.grid
        if len(chunk.own) == 1 and not chunk.fragments:
            number, overlap = chunk.own[0]
            if overlap.lengths[1:] == grid.chunk[1:] and not any(overlap.in_chunk):
                region = self._part(number, overlap)
                yield memory_of(region)
                rows = grid.chunk[0] - overlap.lengths[0] if grid.chunk else 0
                yield from _zeros(rows * (region.nbytes // overlap.lengths[0]) if rows else 0)
                return
        dtype = self._shared[chunk.own[0][0]].dtype
        box = torch.zeros(grid.chunk, dtype=dtype)
        for number, overlap in chunk.own:
            _into(box, overlap.in_chunk, overlap.lengths).copy_(self._part(number, overlap))
        for fragment in chunk.fragments:
            content = self._fragment(fragment, spilled, checks)
            part = torch.frombuffer(content, dtype=torch.uint8).view(dtype).view(fragment.overlap.lengths)
            _into(box, fragment.overlap.in_chunk, fragment.overlap.lengths).copy_(part)
        yield memory_of(box)

    def _fragment(self, fragment: Fragment, spilled: FolderFiles, checks: Mapping[int, Sequence[int]]) -> bytearray:
        name = _spill_file(fragment.rank)
        content = bytearray(spilled.part(name, fragment.start, fragment.nbytes))
        if checksum(memoryview(content)) != checks[fragment.rank][self._plan.spilled[fragment.rank].index(fragment)]:
            raise CorruptCopyError(f"What rank {fragment.rank} left in {self._folder / name} reads otherwise.")
        return content

    def _part(self, number: int, overlap: Any) -> torch.Tensor:
        """A region of one of this rank's parts."""
        chunk = self._shared[number]
        starts = [start - offset for start, offset in zip(overlap.starts, chunk.offsets, strict=True)]
        return _into(chunk.tensor.detach(), starts, overlap.lengths)


class _Passing:
    """Bytes on their way into a file: counted and hashed as they pass, and `closed` by their checksum."""

    def __init__(self, pieces: Iterator[memoryview] | Sequence[memoryview], *, closed: bool) -> None:
        self._pieces = pieces
        self._closed = closed
        self._digest = hashlib.sha256()
        self._nbytes = 0

    def __iter__(self) -> Iterator[memoryview]:
        check = 0
        for piece in self._pieces:
            for start in range(0, len(piece), _SEGMENT_BYTES):
                segment = piece[start : start + _SEGMENT_BYTES]
                check = checksum(segment, check) if self._closed else 0
                yield self._counted(segment)
        if self._closed:
            yield self._counted(memoryview(check.to_bytes(CHECKSUM_BYTES, "little")))

    def _counted(self, segment: memoryview) -> memoryview:
        self._digest.update(segment)
        self._nbytes += len(segment)
        return segment

    def written(self) -> Written:
        """Once all has passed."""
        return Written(self._nbytes, self._digest.hexdigest())


def _spill_file(rank: int) -> str:
    return f"{SPILL}/rank_{rank}.bin"


def _into(tensor: torch.Tensor, starts: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    for axis, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        tensor = tensor.narrow(axis, start, length)
    return tensor


def _zeros(nbytes: int) -> Iterator[memoryview]:
    while nbytes > 0:
        yield _ZEROS[:nbytes]
        nbytes -= len(_ZEROS)


def _between(path: Path, array: Path) -> set[Path]:
    """The folders from the one that holds a chunk up to its array's."""
    parents = {array, path.parent}
    for parent in path.parent.parents:
        if parent == array or array not in parent.parents:
            break
        parents.add(parent)
    return parents
