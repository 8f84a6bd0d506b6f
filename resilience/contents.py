"""What is in a save, as `inspect` tells it: one entry per item with its chunks, over all shards that were given.

Reads shard headers, records, and a checkpoint folder's metadata; no tensor is read, and torch is not needed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from resilience.errors import CorruptCopyError
from resilience.formats.protocol import StoredItem
from resilience.formats.registry import data_files, stored_items
from resilience.stores.filesystem import FileSystem
from resilience.stores.parity_file import check_parity_header, read_parity_header
from resilience.stores.records import ShardRecord, decode_record
from resilience.stores.shard_file import SavedPiece, check_header, read_header
from resilience.stores.shared_inventory import read_folder

__all__ = ["Contents", "folder_contents", "shard_contents"]

_REFERENCES = ("$tensor", "$array")  # to items of their own: see state/tree.py
_KINDS = {"NoneType": "null", "dict": "object"}
_SHOWN_VALUE = 80  # characters: longer values are named, not shown


@dataclass(frozen=True)
class Contents:
    """`items` and `records` with the interface's keys."""

    items: list[dict[str, Any]]
    records: list[dict[str, Any]]
    nbytes: int


def shard_contents(paths: Sequence[Path], fs: FileSystem) -> Contents:
    """The items of one save from its shards (copies of one owner count once). CorruptCopyError, StoreError.

    Parity files have no items: their records are told.
    """
    items: dict[str, dict[str, Any]] = {}
    boxes: dict[tuple[object, ...], list[int]] = {}
    records: list[dict[str, Any]] = []
    total = 0
    seen: set[int] = set()
    for path in sorted(paths, key=lambda path: (path.name, path)):
        if path.name.startswith("parity_"):
            records.append(_read_parity(path, fs))
            continue
        record, nbytes, owner, pieces, values = _read_shard(path, fs)
        records.append(record)
        if owner in seen:
            continue
        seen.add(owner)
        total += nbytes
        for piece in pieces:
            _add_piece(items, boxes, piece, owner)
        for key, value in _leaves(values, ""):
            _add_value(items, key, value, owner)
    return Contents([items[key] for key in sorted(items)], records, total)


def folder_contents(folder: Path, fs: FileSystem) -> Contents:
    """The items of a persistent checkpoint folder. CorruptCopyError or FileNotFoundError if it cannot be believed."""
    items = stored_items(folder, fs)
    record = read_folder(folder, fs)
    records: list[dict[str, Any]] = []
    if record is None:
        sizes = (fs.stat(folder / name) for name in data_files(folder, fs))
        return Contents([_told(item) for item in items], records, sum(size.nbytes for size in sizes if size))
    fields = asdict(record)
    records.append({"path": str(folder), **fields.pop("save"), **fields})
    return Contents([_told(item) for item in items], records, record.nbytes)


def _told(stored: StoredItem) -> dict[str, Any]:
    item = {**_item(stored.key, stored.kind, stored.dtype, stored.global_shape), "chunks": list(stored.chunks)}
    return {**item, "path": stored.path} if stored.path else item


def _read_shard(path: Path, fs: FileSystem) -> tuple[dict[str, Any], int, int, list[SavedPiece], object]:
    """`(record, bytes, owner, pieces, values)` of one shard; a file without its record is told as it is."""
    mapped = fs.open_mapping(path)
    try:
        header = read_header(mapped.view, str(path))
        start, stop = header.values
        values = json.loads(bytes(mapped.view[start:stop]) or b"null")
        nbytes = mapped.nbytes
    except CorruptCopyError:
        raise
    except (ValueError, RecursionError) as error:
        raise CorruptCopyError(f"{path}: {error}") from error
    finally:
        mapped.close()
    told: dict[str, Any] = {"path": str(path), "owner": header.owner, "world_size": header.world_size, "bytes": nbytes}
    beside = path.with_suffix(".json")
    if fs.stat(beside) is not None:
        record = decode_record(fs.read(beside), str(beside))
        check_header(header, record, str(path))
        told = _told_record(path, record)
    return told, nbytes, header.owner, list(header.pieces.values()), values


def _read_parity(path: Path, fs: FileSystem) -> dict[str, Any]:
    beside = path.with_suffix(".json")
    record = decode_record(fs.read(beside), str(beside))
    mapped = fs.open_mapping(path)
    try:
        check_parity_header(read_parity_header(mapped.view, str(path)), record, str(path))
    finally:
        mapped.close()
    return _told_record(path, record)


def _told_record(path: Path, record: ShardRecord) -> dict[str, Any]:
    fields = asdict(record)
    if record.cover is None:
        del fields["cover"]
    return {"path": str(path), **fields.pop("save"), "bytes": fields.pop("nbytes"), **fields}


def _item(key: str, kind: str, dtype: str | None, shape: Sequence[int] | None) -> dict[str, Any]:
    return {
        "key": key,
        "kind": kind,
        "dtype": dtype,
        "global_shape": None if shape is None else list(shape),
        "chunks": [],
    }


def _add_piece(
    items: dict[str, dict[str, Any]], boxes: dict[tuple[object, ...], list[int]], piece: SavedPiece, owner: int
) -> None:
    """Ranks that each have the same box of an item of their own share one chunk, with all their numbers."""
    item = items.setdefault(piece.key, _item(piece.key, "tensor", piece.dtype, piece.global_shape))
    owners = boxes.setdefault((piece.key, piece.offsets, piece.shape), [])
    if not owners:
        item["chunks"].append({"offsets": list(piece.offsets), "shape": list(piece.shape), "owners": owners})
    owners.append(owner)


def _add_value(items: dict[str, dict[str, Any]], key: str, value: object, owner: int) -> None:
    item = items.setdefault(key, _item(key, "value", _KINDS.get(type(value).__name__, type(value).__name__), None))
    text = json.dumps(value)
    if not item["chunks"]:
        item["value"] = text if len(text) <= _SHOWN_VALUE else f"{text[: _SHOWN_VALUE - 1]}…"
        item["chunks"].append({"owners": []})
    item["chunks"][0]["owners"].append(owner)


def _leaves(value: object, path: str) -> Iterator[tuple[str, object]]:
    """The plain values of a tree's JSON by their path; references to tensors are items of their own.

    A list of nothing but scalars (a generator's state) is one value.
    """
    if isinstance(value, Mapping):
        name, content = next(iter(value.items()), ("", None))
        if name in _REFERENCES:
            return
        if name.startswith("$"):
            yield from _leaves(content, path) if isinstance(content, list | dict) else iter([(path, content)])
            return
        for key, part in value.items():
            yield from _leaves(part, f"{path}/{_escaped(key)}" if path else _escaped(key))
    elif isinstance(value, list) and any(isinstance(part, list | dict) for part in value):
        for index, part in enumerate(value):
            yield from _leaves(part, f"{path}/{index}" if path else str(index))
    else:
        yield path, value


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
