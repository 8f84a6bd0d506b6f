"""What an item is: one live tensor of the training state, with its name and its place in the global tensor.

Everything downstream (arena, shard file, exchange) sees items and the values' bytes, never the tree they came from.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from resilience.errors import UnsupportedStateError
from resilience.state.flat_sharding import FlatSharding
from resilience.state.sharding import Shardings, block_key, may_be_cut
from resilience.state.tensors import is_dtensor, local_part, placement_names

EXTRA_STATE = "_extra_state"
_ORIGIN = (0,) * 64  # no tensor of torch's has more dimensions
_UNSAID = Shardings((), ())

ItemT = TypeVar("ItemT")


@dataclass(frozen=True)
class Item:
    """One tensor of this rank's state. `tensor` is live (no copy): it changes with the next optimizer step.

    `replicated` marks a candidate: what another rank has under the same key at the same place may be a copy of it
    (parameters, buffers, optimizer state that is not divided over these ranks); everything else belongs to
    this rank alone. `alias_of` names an earlier item with the same storage, shape and stride, whose bytes are this
    one's too. A tensor of several blocks (see `sharding.py`) is several items.
    """

    key: str
    tensor: torch.Tensor
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    replicated: bool
    alias_of: str | None = None


@dataclass(frozen=True)
class Collected:
    """A rank's whole training state at a boundary: live tensors, and the tree as JSON that refers to them."""

    items: tuple[Item, ...]
    values: bytes


@dataclass(frozen=True)
class SavedItem:
    """What a save holds under one key for this rank; the counterpart of `Item` when loading."""

    key: str
    dtype: torch.dtype
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    alias_of: str | None = None

    @classmethod
    def of(cls, item: Item) -> SavedItem:
        """What a save of this item will hold."""
        tensor = item.tensor
        return cls(item.key, tensor.dtype, item.global_shape, item.offsets, tuple(tensor.shape), item.alias_of)


@dataclass(frozen=True)
class Place:
    """Where this rank's part of a tensor lies in the whole; `shape` is the part's own."""

    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    sharded: bool


def items_of(
    tensors: Iterable[tuple[str, torch.Tensor]],
    places: dict[Hashable, Place] | None = None,
    shardings: Shardings = _UNSAID,
    first_with: dict[Hashable, str] | None = None,
) -> tuple[Item, ...]:
    """Turn named tensors into items, in their order. `places` keeps what is costly to work out between two calls.

    `shardings` says which plain tensors are parts of a whole. `first_with`: which key came first with some memory, if
    other items come before these; what these come first with is added. Raises UnsupportedStateError for a DTensor
    whose local part has no place in the global tensor.
    """
    places = {} if places is None else places
    first_with = {} if first_with is None else first_with
    items: list[Item] = []
    for key, tensor in tensors:
        local = local_part(tensor)
        if type(tensor) is not torch.Tensor and is_dtensor(tensor):
            place = place_of(key, tensor, places)
            parts, whole, sharded = [(key, local, place.offsets)], place.global_shape, place.sharded
        elif (said := shardings.of(key, tensor)) is not None:
            parts, whole, sharded = said.parts(key, local), said.global_shape, isinstance(said, FlatSharding)
        else:
            whole = tuple(local.shape)
            parts, sharded = [(key, local, _ORIGIN[: len(whole)])], False
        # a module's extra state is told by each rank for itself, and looked for by others as one whole
        replicated = not sharded and may_be_cut(key) and not key.endswith(EXTRA_STATE)
        for name, part, offsets in parts:
            first = _first_with(first_with, name, part, whole, offsets)
            items.append(Item(name, part, whole, offsets, replicated, None if first is name else first))
    return tuple(items)


def _first_with(
    known: dict[Hashable, str], key: str, part: torch.Tensor, whole: tuple[int, ...], offsets: tuple[int, ...]
) -> str:
    """The first key that came with this memory at this place; tensors without bytes are nobody's alias."""
    shape = tuple(part.shape)
    if 0 in shape:  # they may all claim address 0
        return key
    memory = (part.data_ptr(), part.get_device(), part.dtype, shape, part.stride(), whole, offsets)
    return known.setdefault(memory, key)


def blocks_of(key: str, index: Mapping[str, ItemT]) -> tuple[ItemT, ...]:
    """The items of the tensor under `key`: one, or one for each of its blocks; nothing if it is not there."""
    if key in index:
        return (index[key],)
    found: list[ItemT] = []
    while (block := index.get(block_key(key, len(found)))) is not None:
        found.append(block)
    return tuple(found)


def place_of(key: str, dtensor: Any, places: dict[Hashable, Place]) -> Place:
    """Where the local part of a DTensor lies. Uneven and empty parts are fine."""
    known = (dtensor.device_mesh, dtensor.placements, dtensor.shape)
    if known not in places:
        names = placement_names(key, dtensor)
        places[known] = place_on_mesh(key, tuple(dtensor.shape), dtensor.device_mesh, dtensor.placements, names)
    return places[known]


def place_on_mesh(
    key: str, shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...], names: tuple[str, ...]
) -> Place:
    """Where this rank's part of a tensor of global `shape` lies on `mesh`; `names` are those of the placements.

    FSDP2 over tensor parallelism cuts one dimension twice, from right to left; torch calls that a strided shard. The
    local part is still one block of rows as long as FSDP cuts what tensor parallelism left, and its place is told
    exactly. A placement that leaves a rank rows from several places is refused, since one offset cannot say so.
    """
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if mesh.get_coordinate() is None:
        raise UnsupportedStateError(
            f"{key} is a DTensor on a device mesh that this rank is not part of.",
            advice="Give each rank only the parameters that it holds a part of.",
        )
    sharded = any(name != "replicate" and mesh.size(axis) > 1 for axis, name in enumerate(names))
    if any(name.startswith("strided") for name in names):
        # torch tells where the first row of a strided shard lies, and not whether the others follow it.
        rows = [_rows(key, dim, length, mesh, names) for dim, length in enumerate(shape)]
        return Place(shape, tuple(part.start for part in rows), tuple(len(part) for part in rows), sharded)
    local_shape, offsets = compute_local_shape_and_global_offset(shape, mesh, placements)
    return Place(shape, tuple(map(int, offsets)), tuple(map(int, local_shape)), sharded)


def _rows(key: str, dim: int, length: int, mesh: Any, names: tuple[str, ...]) -> range:
    """Global indices along `dim` of this rank's part, following the placements from left to right."""
    coordinate = mesh.get_coordinate()
    mine = list(range(length))
    for axis, name in enumerate(names):
        kind, *numbers = name.split(":")
        if kind == "replicate" or int(numbers[0]) != dim:
            continue
        pieces = _chunks(mine, int(numbers[1]) if kind == "strided" else 1)
        mine = [index for piece in pieces for index in _chunks(piece, mesh.size(axis))[coordinate[axis]]]
    if not mine:
        return range(length, length)
    if mine[-1] - mine[0] + 1 != len(mine):
        raise UnsupportedStateError(
            f"{key} is a DTensor whose part on this rank comes from several places of dimension {dim} "
            f"({', '.join(names)} on a mesh of {tuple(mesh.shape)}), which cannot be stored.",
            advice="Shard with fully_shard (FSDP2) over parallelize_module, or along different dimensions.",
        )
    return range(mine[0], mine[-1] + 1)


def _chunks(indices: list[int], count: int) -> list[list[int]]:
    """Cut as torch.chunk does (every piece of the same length but the last ones), padded with empty pieces."""
    size = max(1, -(-len(indices) // count))
    return [indices[start * size : (start + 1) * size] for start in range(count)]
