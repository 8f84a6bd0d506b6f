"""Where each item lies in a shard: a safetensors file that is planned once and filled many times.

The file is `8-byte header length, JSON header, tensors`. Tensors lie by falling element size without gaps (the format
allows none), so that each is aligned; the header is padded to a fixed size, so that every save of one layout has the
same length and a recycled arena fits. Two entries of `__metadata__` are ours: `resilience` (which save, whose) and
`index` (what each tensor is in the training state: dtype, global shape, offsets; enough to assemble it at another world
size). The plain values of the state are one more tensor of bytes, `resilience.values`: JSON padded with spaces.

Format: https://huggingface.co/docs/safetensors (a header of at most 100 MB, `data_offsets` relative to its end).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from resilience.errors import UnsupportedStateError
from resilience.stores.shard_file import ITEM_BYTES, layout_id

__all__ = ["VALUES_KEY", "Layout", "Piece", "PlacedPiece", "ShardIdentity", "plan_layout", "values_capacity"]

VALUES_KEY: Final = "resilience.values"
_PAGE = 4096
_IDENTITY_BYTES = 1024  # room for the identity's JSON, whatever its numbers become
_VALUES_STEP = 1 << 16

#: Dtypes that safetensors names; all others are stored as bytes and named in our index.
_NAMES: Final[dict[torch.dtype, str]] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.uint64: "U64",
}


@dataclass(frozen=True)
class Piece:
    """What one shard stores of one item: all of the rank's local tensor, or a range of its rows.

    `offsets` and `shape` place the piece in the item's global tensor. `shared` pieces are parts of a value that is
    equal on all ranks of the data-parallel group; the others belong to this rank alone. `rows` says of which rows of
    the global tensor it is a range: those of the item, (first, count).
    """

    key: str
    dtype: torch.dtype
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    shared: bool
    item: int  # position in the collected items
    row_start: int = 0
    row_stop: int | None = None  # None: all rows
    rows: tuple[int, int] | None = None  # None: the piece is the item

    @property
    def nbytes(self) -> int:
        count = 1
        for length in self.shape:
            count *= length
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class PlacedPiece:
    piece: Piece
    start: int  # byte offset in the file


@dataclass(frozen=True)
class ShardIdentity:
    """Which save a shard belongs to and whose it is; the part of the header that changes from save to save."""

    run_id: str
    attempt: str
    generation: int
    iteration: int
    owner: int
    world_size: int
    values_bytes: int

    def to_json(self) -> str:
        return json.dumps(self.__dict__, sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True)
class Layout:
    """A planned shard file. `nbytes` is its length, the same at every save."""

    placed: tuple[PlacedPiece, ...]
    values_start: int
    values_capacity: int
    data_start: int
    nbytes: int
    static_header: str  # everything behind the identity
    layout_id: int  # equal where shards are laid out alike

    def header(self, identity: ShardIdentity) -> bytes:
        """The file's first `data_start` bytes."""
        text = _head(identity.to_json()) + self.static_header
        body = text.encode()
        room = self.data_start - 8
        if len(body) > room:
            raise ValueError(f"shard header of {len(body)} bytes exceeds the planned {room}")
        return room.to_bytes(8, "little") + body.ljust(room, b" ")


def plan_layout(pieces: Sequence[Piece], aliases: Mapping[str, str], values_bytes: int, group: Sequence[int]) -> Layout:
    """Place `pieces`; `group` are the ranks over which shared items are split (written into the index).

    UnsupportedStateError for a dtype that no reader knows (of a newer torch): the save could never be loaded.
    """
    for piece in pieces:
        if _dtype_name(piece.dtype) not in ITEM_BYTES:
            raise UnsupportedStateError(f"{piece.key} is a tensor of {piece.dtype}, which cannot be stored yet.")
    ordered = sorted(pieces, key=lambda piece: (-piece.dtype.itemsize, piece.item, piece.row_start))
    capacity = values_capacity(values_bytes)
    entries: dict[str, Any] = {}
    starts: list[int] = []
    position = 0
    for piece in ordered:
        stop = position + piece.nbytes
        name = _NAMES.get(piece.dtype)
        shape = list(piece.shape) if name else [piece.nbytes]
        entries[piece.key] = {"dtype": name or "U8", "shape": shape, "data_offsets": [position, stop]}
        starts.append(position)
        position = stop
    entries[VALUES_KEY] = {"dtype": "U8", "shape": [capacity], "data_offsets": [position, position + capacity]}
    index = json.dumps(
        {"group": list(group), "aliases": dict(aliases), "items": [_describe(piece) for piece in ordered]},
        separators=(",", ":"),
    )
    # `_head` leaves the metadata object open: the static part closes it with the index
    static = f',"index":{json.dumps(index)}}},' + json.dumps(entries, separators=(",", ":"))[1:]
    longest = len(static.encode()) + _IDENTITY_BYTES
    data_start = -(-(8 + longest) // _PAGE) * _PAGE
    placed = tuple(PlacedPiece(piece, data_start + start) for piece, start in zip(ordered, starts, strict=True))
    nbytes = data_start + position + capacity
    return Layout(
        placed, data_start + position, capacity, data_start, nbytes, static, layout_id(index, data_start, nbytes)
    )  # fmt: skip


def values_capacity(values_bytes: int) -> int:
    """Room for the plain values, which change length with every save (counters grow): for twice as much."""
    return -(-max(2 * values_bytes, 1) // _VALUES_STEP) * _VALUES_STEP


def _head(identity: str) -> str:
    return '{"__metadata__":{"format":"pt","resilience":' + json.dumps(identity)


def _describe(piece: Piece) -> list[Any]:
    return [
        piece.key,
        _dtype_name(piece.dtype),
        list(piece.global_shape),
        list(piece.offsets),
        list(piece.shape),
        int(piece.shared),
        list(piece.rows) if piece.rows else None,
    ]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
