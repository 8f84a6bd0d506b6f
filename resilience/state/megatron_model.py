"""Where a Megatron Core model says that its tensors lie, under which keys: what its `sharded_state_dict()` tells.

Names inside such a module mean something on one rank only (every pipeline stage counts its layers from 0, tied weights
are called otherwise on the last stage). So the entries get names that are good for the whole model, made from the key
and the number of the layer (and expert): `decoder.layers.7.mlp.linear_fc2.weight`. Megatron Core is not imported: its
classes are known by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from resilience.errors import ConfigError
from resilience.state.sharding import Block, Sharding, say
from resilience.state.stored_place import StackPlace

__all__ = ["MegatronPlaces", "ObjectPlace", "megatron_places", "unique_name"]

_MEGATRON = "megatron.core."
_MAPPING = f"{_MEGATRON}dist_checkpointing.mapping"


@dataclass(frozen=True)
class ObjectPlace:
    """Something else than a tensor: its key with the place in its grid; `writes`: this rank has the main replica."""

    key: str
    writes: bool


@dataclass(frozen=True)
class MegatronPlaces:
    """`names`: an entry's name in the module → its name in the whole model; `tensors` and `objects` by the latter."""

    names: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, StackPlace] = field(default_factory=dict)
    objects: Mapping[str, ObjectPlace] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()  # entries whose place cannot be told as ranges of rows


def megatron_places(module: torch.nn.Module, where: str) -> MegatronPlaces:
    """What a Megatron Core model says of its entries; nothing for any other module.

    Says of each tensor which part of a whole it is, as `resilience.shard` does. Not collective, but Megatron's
    model-parallel groups must have been made. ConfigError if the model cannot answer.
    """
    describe = getattr(module, "sharded_state_dict", None)
    if not callable(describe) or not _is_megatron(type(module)):
        return MegatronPlaces()
    try:
        described = describe()
    except Exception as error:  # whatever Megatron's code raises here: the checkpoint would not be one of Megatron's
        raise ConfigError(
            f"{where} is a Megatron Core model whose sharded_state_dict() failed: {type(error).__name__}: {error}",
            advice="Call megatron.core.parallel_state.initialize_model_parallel before the trainer is made.",
        ) from error
    return _Places(module, described).found()


def unique_name(key: str, index: Sequence[int]) -> str:
    """The name of one of the alike that are stored as one: the layer's number behind `layers`, the expert's behind the
    last `experts`, any other at the end."""
    parts = key.split(".")
    left = list(index)
    if left and "layers" in parts:
        parts.insert(parts.index("layers") + 1, str(left.pop(0)))
    if left and "experts" in parts:
        parts.insert(len(parts) - parts[::-1].index("experts"), str(left.pop(0)))
    return ".".join([*parts, *map(str, left)])


def _is_megatron(kind: type) -> bool:
    return any(each.__module__.startswith(_MEGATRON) for each in kind.__mro__)


def _kind(described: object) -> str:
    kind = type(described)
    return kind.__name__ if kind.__module__ == _MAPPING else ""


class _Places:
    """One walk over what one module said."""

    def __init__(self, module: torch.nn.Module, described: Mapping[str, Any]) -> None:
        self._described = described
        self._tensors: dict[str, torch.Tensor] = dict(module.named_buffers(remove_duplicate=False))
        self._tensors.update(module.named_parameters(remove_duplicate=False))

    def found(self) -> MegatronPlaces:
        names: dict[str, str] = {}
        tensors: dict[str, StackPlace] = {}
        objects: dict[str, ObjectPlace] = {}
        left_out: list[str] = []
        for raw, said in self._described.items():
            if _kind(said) == "ShardedObject":
                name = unique_name(said.key, said.global_offset)
                names[raw], objects[name] = name, ObjectPlace(said.unique_key, _is_main(said.replica_id))
            elif raw in self._tensors and _kind(said) in ("ShardedTensor", "ShardedTensorFactory"):
                placed = _place(self._tensors[raw], list(_parts(said)))
                if placed is None:
                    left_out.append(raw)
                    continue
                sharding, place = placed
                name = unique_name(place.key, place.index)
                if name in tensors:  # a second entry of the same tensor: memory that it shares is found as such
                    continue
                say(self._tensors[raw], sharding)
                names[raw], tensors[name] = name, place
        return MegatronPlaces(names, tensors, objects, tuple(left_out))


def _is_main(replica_id: Any) -> bool:
    return all(each == 0 for each in replica_id) if isinstance(replica_id, tuple) else replica_id == 0


def _parts(said: Any) -> Iterator[Any]:
    """The parts that one tensor is stored as: itself, or what its factory makes of it (a gated projection's two)."""
    if _kind(said) == "ShardedTensor":
        yield said
        return
    pending: list[Any] = [said.build()]
    while pending:
        each = pending.pop(0)
        if _kind(each) == "ShardedTensor":
            yield each
        elif isinstance(each, Mapping):
            pending += each.values()
        elif isinstance(each, list | tuple):
            pending += each


def _place(tensor: torch.Tensor, parts: Sequence[Any]) -> tuple[Sharding, StackPlace] | None:
    """Where the tensor lies, if its parts are ranges of its rows (along any one axis) in the order of its memory."""
    if not parts or any(part.key != parts[0].key or part.flattened_range is not None for part in parts):
        return None
    axes = parts[0].prepend_axis_num
    place = StackPlace(
        parts[0].key, *(tuple(map(int, of[:axes])) for of in (parts[0].global_offset, parts[0].global_shape))
    )
    whole = tuple(map(int, parts[0].global_shape[axes:]))
    starts = [_start(tensor, part) for part in parts]
    dim = 0 if len(parts) == 1 else _axis(tensor, parts, starts)
    if dim is None or len(whole) != tensor.dim():
        return None
    blocks = []
    for part, start in zip(parts, starts, strict=True):
        if start is None or tuple(part.global_offset[:axes]) != place.index:
            return None
        length = part.local_shape[dim] if tensor.dim() else 1
        blocks.append(Block(start[dim] if tensor.dim() else 0, length, tuple(map(int, part.global_offset[axes:]))))
    return Sharding(tuple(tensor.shape), whole, dim, tuple(_joined(blocks, dim))), place


def _start(tensor: torch.Tensor, part: Any) -> tuple[int, ...] | None:
    """Where in `tensor` the part begins, along each axis; None if it is no box of it."""
    view = part.data
    same = isinstance(view, torch.Tensor) and view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    if not same or view.dim() != tensor.dim() or view.stride() != tensor.stride():
        return None
    distance = view.storage_offset() - tensor.storage_offset()
    start = []
    for stride in tensor.stride():
        at, distance = divmod(distance, stride) if stride else (0, distance)
        start.append(at)
    inside = all(at + length <= whole for at, length, whole in zip(start, view.shape, tensor.shape, strict=True))
    return tuple(start) if distance == 0 and inside and tuple(view.shape) == tuple(part.local_shape) else None


def _axis(tensor: torch.Tensor, parts: Sequence[Any], starts: Sequence[tuple[int, ...] | None]) -> int | None:
    """Along which axis the parts follow each other and together are the tensor."""
    for dim in range(tensor.dim()):
        at = 0
        for part, start in zip(parts, starts, strict=True):
            others = [axis for axis in range(tensor.dim()) if axis != dim]
            whole_else = start is not None and all(part.local_shape[axis] == tensor.shape[axis] for axis in others)
            if start is None or not whole_else or start[dim] != at:
                break
            at += part.local_shape[dim]
        else:
            if at == tensor.shape[dim]:
                return dim
    return None


def _joined(blocks: Sequence[Block], dim: int) -> Iterator[Block]:
    """Blocks that follow each other in the whole too are one (both halves of a gated projection that nobody cut)."""
    held: Block | None = None
    for block in blocks:
        if held is not None and block.offsets[dim] == held.offsets[dim] + held.length:
            held = Block(held.start, held.length + block.length, held.offsets)
            continue
        if held is not None:
            yield held
        held = block
    if held is not None:
        yield held
