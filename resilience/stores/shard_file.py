"""Reading a shard file that may be anything: its header is validated before a byte of it is believed or allocated.

Free of torch, so that the command line can list and verify quickly. The format is described in `snapshot/layout.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import xxhash

from resilience.errors import CorruptCopyError, in_short
from resilience.planning.inventory import SaveId
from resilience.stores.records import ShardRecord

__all__ = ["ITEM_BYTES", "SavedPiece", "ShardHeader", "check_header", "layout_id", "layout_id_of", "read_header"]

_HEADER_LIMIT: Final = 100 << 20  # safetensors' own bound
_VALUES_KEY: Final = "resilience.values"

#: Bytes per element of each dtype of torch's, by its name.
ITEM_BYTES: Final[Mapping[str, int]] = {
    "bool": 1, "uint8": 1, "int8": 1, "float8_e5m2": 1, "float8_e4m3fn": 1, "float8_e5m2fnuz": 1, "float8_e4m3fnuz": 1,
    "float8_e8m0fnu": 1, "float4_e2m1fn_x2": 1, "int16": 2, "uint16": 2, "float16": 2, "bfloat16": 2, "int32": 4,
    "uint32": 4, "float32": 4, "complex32": 4, "float64": 8, "int64": 8, "uint64": 8, "complex64": 8, "complex128": 16,
    "bits8": 1, "bits1x8": 1, "bits2x4": 1, "bits4x2": 1, "bits16": 2,
}  # fmt: skip


@dataclass(frozen=True)
class SavedPiece:
    """One tensor of a shard: what part of which item it is, and where its bytes lie in the file.

    `rows`: of a range of an item's rows, which rows of the global tensor the item has (first, count); else None.
    """

    key: str
    dtype: str
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    shared: bool
    start: int
    stop: int
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class ShardHeader:
    """What a shard says of itself."""

    run_id: str
    save: SaveId
    owner: int
    world_size: int
    group: tuple[int, ...]
    aliases: Mapping[str, str]
    pieces: Mapping[str, SavedPiece]
    values: tuple[int, int]  # where the plain values' JSON lies, padding excluded


def read_header(content: memoryview, what: str, nbytes: int | None = None) -> ShardHeader:
    """Parse and validate the header of the shard whose whole bytes are `content`; CorruptCopyError names `what`.

    `nbytes`: the shard's length, where `content` is its beginning only.
    """
    try:
        return _read(content, len(content) if nbytes is None else nbytes)
    except CorruptCopyError as error:
        raise CorruptCopyError(f"{what}: {error}") from error
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        raise CorruptCopyError(f"{what}: its header is not one of a shard ({in_short(error)}).") from error


def layout_id(index: str, data_start: int, nbytes: int) -> int:
    """63 bits that are equal where shards are laid out alike: items, places and length. Never 0."""
    text = f"{data_start} {nbytes} {index}".encode()
    return max(1, int.from_bytes(xxhash.xxh3_128_digest(text)[:8], "little") >> 1)


def layout_id_of(content: memoryview) -> int:
    """The same of a shard whose bytes were verified."""
    size = int.from_bytes(content[:8], "little")
    index = json.loads(bytes(content[8 : 8 + size]))["__metadata__"]["index"]
    return layout_id(index, 8 + size, len(content))


def check_header(header: ShardHeader, record: ShardRecord, what: str) -> None:
    """Raise CorruptCopyError if the shard and its record do not speak of the same save and owner."""
    found = (header.run_id, header.save, header.owner, header.world_size)
    expected = (record.run_id, record.save, record.owner, record.world_size)
    if found != expected:
        raise CorruptCopyError(f"{what}: its header says {found}, its record {expected}.")


def _read(content: memoryview, nbytes: int) -> ShardHeader:
    if len(content) < 8:
        raise CorruptCopyError(f"{len(content)} bytes are too few.")
    size = int.from_bytes(content[:8], "little")
    if size > min(_HEADER_LIMIT, len(content) - 8):
        raise CorruptCopyError(f"its header claims {size} bytes in a file of {len(content)}.")
    fields = json.loads(bytes(content[8 : 8 + size]))
    metadata = fields.pop("__metadata__")
    identity = json.loads(metadata["resilience"])
    index = json.loads(metadata["index"])
    data_start = 8 + size
    pieces: dict[str, SavedPiece] = {}
    position = data_start  # the index lists the tensors as they lie, without gaps
    for entry in index["items"]:
        piece = _piece(entry, fields[entry[0]], data_start)
        if piece.key in pieces:
            raise CorruptCopyError(f"{piece.key!r} is there twice.")
        if piece.start != position:
            raise CorruptCopyError(f"{piece.key!r} begins at byte {piece.start}; expected {position}.")
        pieces[piece.key] = piece
        position = piece.stop
    values_start, values_stop = (data_start + _integer(x) for x in fields[_VALUES_KEY]["data_offsets"])
    if set(fields) != set(pieces) | {_VALUES_KEY}:
        raise CorruptCopyError("its index and its tensors differ.")
    if values_start != position or values_stop != nbytes:
        raise CorruptCopyError(f"its tensors do not fill its {nbytes} bytes.")
    used = _integer(identity["values_bytes"])
    if not 0 <= used <= values_stop - values_start:
        raise CorruptCopyError("its values are longer than their room.")
    world_size = _integer(identity["world_size"])
    return ShardHeader(
        run_id=_text(identity["run_id"]),
        save=SaveId(_integer(identity["iteration"]), _integer(identity["generation"]), _text(identity["attempt"])),
        owner=_integer(identity["owner"]),
        world_size=world_size,
        group=tuple(_integer(rank) for rank in index["group"]),
        aliases={_text(key): _text(value) for key, value in index["aliases"].items()},
        pieces=pieces,
        values=(values_start, values_start + used),
    )


def _piece(entry: list[Any], tensor: dict[str, Any], data_start: int) -> SavedPiece:
    key, dtype, global_shape, offsets, shape, shared, rows = entry
    start, stop = (_integer(x) for x in tensor["data_offsets"])
    count = 1
    for length in shape:
        count *= _integer(length)
    axes = len(global_shape)
    if len(offsets) != axes or len(shape) != axes:
        raise CorruptCopyError(f"{key!r} has {axes} axes but offsets {offsets} and shape {shape}.")
    inside = all(
        _integer(o) >= 0 and n >= 0 and o + n <= _integer(g)
        for o, n, g in zip(offsets, shape, global_shape, strict=True)
    )
    if not inside or start < 0 or stop - start != count * ITEM_BYTES[dtype]:
        raise CorruptCopyError(
            f"{key!r} does not fit: {dtype} {shape} at {offsets} of {global_shape}, {stop - start} bytes."
        )
    if rows is not None:
        first, held = (_integer(x) for x in rows)
        if not 0 <= first <= offsets[0] or not offsets[0] + shape[0] <= first + held <= global_shape[0]:
            raise CorruptCopyError(f"{key!r} is a range of rows {rows}, and has {shape} at {offsets}.")
    return SavedPiece(
        _text(key), dtype, tuple(global_shape), tuple(offsets), tuple(shape), bool(shared),
        data_start + start, data_start + stop, None if rows is None else (rows[0], rows[1]),
    )  # fmt: skip


def _integer(value: object) -> int:
    if type(value) is not int:
        raise CorruptCopyError(f"{value!r} is no integer.")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise CorruptCopyError(f"{value!r} is no text.")
    return value
