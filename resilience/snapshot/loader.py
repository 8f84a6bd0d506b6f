"""From verified shards back into live tensors.

A rank's own shard has its values and what is its own; what was split over its data-parallel group lies in the group's
shards. Loading has two phases: `plan` finds out whether everything fits and changes nothing; what it returns copies.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from resilience.errors import CorruptCopyError
from resilience.snapshot.arena import bytes_of, typed_view
from resilience.snapshot.memory_copy import copy_tensors
from resilience.state.items import SavedItem
from resilience.state.training_state import TrainingState
from resilience.stores.digest import ALGORITHM, algorithm_of, digest_of
from resilience.stores.filesystem import FileSystem, MappedFile
from resilience.stores.records import ShardRecord
from resilience.stores.shard_file import SavedPiece, ShardHeader, check_header, read_header

__all__ = ["OpenShard", "open_shard", "plan_shard_load"]


@dataclass
class OpenShard:
    """A mapped shard whose header was validated; its bytes are proved by comparing `digest()` with its record's."""

    header: ShardHeader
    mapped: MappedFile
    algorithm: str = ALGORITHM

    def digest(self) -> str:
        return digest_of(self.mapped.view, self.algorithm)

    def content(self) -> torch.Tensor:
        return bytes_of(self.mapped)

    def close(self) -> None:
        self.mapped.close()


def open_shard(path: Path, fs: FileSystem, record: ShardRecord) -> OpenShard:
    """Map the shard at `path` and hold its header against its record.

    CorruptCopyError, StoreError, FileNotFoundError.
    """
    mapped = fs.open_mapping(path)
    try:
        header = read_header(mapped.view, str(path))
        check_header(header, record, str(path))
    except CorruptCopyError:
        mapped.close()
        raise
    return OpenShard(header, mapped, algorithm_of(record.digest))


def plan_shard_load(state: TrainingState, shards: Mapping[int, OpenShard], rank: int) -> Callable[[], None]:
    """Check that the shards fit `state`; returns the function that copies. `shards`: by owner, this rank's among them.

    LayoutMismatchError if the state is another one, CorruptCopyError if the shards do not make up a whole.
    """
    own = shards[rank].header
    pieces = _pieces(shards, own)
    index = {key: _whole(found) for key, found in pieces.items()}
    index |= {
        alias: SavedItem(
            alias, index[key].dtype, index[key].global_shape, index[key].offsets, index[key].shape, alias_of=key
        )
        for alias, key in own.aliases.items()
        if key in index
    }
    start, stop = own.values
    load = state.plan_load(bytes(shards[rank].mapped.view[start:stop]), index)
    contents = {owner: shard.content() for owner, shard in shards.items()}
    targets: list[torch.Tensor] = []
    sources: list[torch.Tensor] = []
    for key, target in load.targets:
        for owner, piece in pieces[key]:
            part = _part(target, piece, index[key])
            if part.numel():
                targets.append(part)
                sources.append(typed_view(contents[owner], piece.start, _dtype(piece.dtype), piece.shape))

    def copy() -> None:
        with torch.no_grad():
            copy_tensors(targets, sources)
            load.finish()

    return copy


def _pieces(shards: Mapping[int, OpenShard], own: ShardHeader) -> dict[str, list[tuple[int, SavedPiece]]]:
    """By key: all of what is this rank's own, or the group's rows of what they share."""
    found: dict[str, list[tuple[int, SavedPiece]]] = {}
    for key, piece in own.pieces.items():
        found[key] = [(own.owner, piece)]
    for owner in own.group:
        if owner == own.owner or owner not in shards:
            continue
        for key, piece in shards[owner].header.pieces.items():
            if piece.shared and (key not in found or (found[key][0][1].shared and not _is_all(found[key]))):
                found.setdefault(key, []).append((owner, piece))
    return found


def _is_all(found: list[tuple[int, SavedPiece]]) -> bool:
    return any(piece.rows is None for _, piece in found)


def _whole(found: list[tuple[int, SavedPiece]]) -> SavedItem:
    """What the pieces of one key make up together; CorruptCopyError if rows are missing, double or unlike."""
    first = found[0][1]
    dtype = _dtype(first.dtype)
    if first.rows is None:
        return SavedItem(first.key, dtype, first.global_shape, first.offsets, first.shape)
    start, count = first.rows
    ranges = sorted((piece.offsets[0], piece.offsets[0] + piece.shape[0]) for _, piece in found)
    alike = len({(p.dtype, p.global_shape, p.offsets[1:], p.shape[1:], p.rows) for _, p in found}) == 1
    ends = [start, *(stop for _, stop in ranges)]
    if not alike or [begin for begin, _ in ranges] != ends[:-1] or ends[-1] != start + count:
        raise CorruptCopyError(f"the shards' rows of {first.key!r} do not make up {count} rows from {start}: {ranges}.")
    return SavedItem(first.key, dtype, first.global_shape, (start, *first.offsets[1:]), (count, *first.shape[1:]))


def _part(target: torch.Tensor, piece: SavedPiece, item: SavedItem) -> torch.Tensor:
    """The rows of `target` (the whole item on this rank) that the piece fills."""
    if piece.shape == item.shape:
        return target
    start = piece.offsets[0] - item.offsets[0]
    return target[start : start + piece.shape[0]]


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)  # type: ignore[no-any-return]  # `read_header` admits names of dtypes only
