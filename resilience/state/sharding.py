"""Which part of a whole a plain tensor is, as said by whoever cut it.

A DTensor knows its place. A plain tensor of a model that is cut by hand (tensor parallelism, experts) does not: `shard`
and `shard_at` say it, once, where the parameter is made. What is said stays with the tensor object, also when its
`.data` is exchanged, and holds for optimizer state of the same shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from resilience.errors import ConfigError, UnsupportedStateError
from resilience.state.tensors import is_dtensor

if TYPE_CHECKING:
    from resilience.state.flat_sharding import FlatSharding

__all__ = [
    "Block",
    "Sharding",
    "Shardings",
    "block_key",
    "say",
    "sayings",
    "shard",
    "shard_at",
    "sharding_of",
    "without_block",
]

_SEPARATOR = "/~["  # no path has it: `~` is escaped as `~0` in every name

#: By the identity of the tensor, without keeping it alive, and without a mark that `torch.save` would pickle.
_said: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_sayings = 0  # so often something was said

TensorT = TypeVar("TensorT", bound=torch.Tensor)


@dataclass(frozen=True)
class Block:
    """Rows `start` to `start + length` (along the sharding's `dim`) of the local tensor; `offsets` in the whole."""

    start: int
    length: int
    offsets: tuple[int, ...]


@dataclass(frozen=True)
class Sharding:
    """Where a tensor of shape `shape` lies in one of shape `global_shape`, in one or more blocks along `dim`."""

    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    dim: int
    blocks: tuple[Block, ...]

    def parts(self, key: str, local: torch.Tensor) -> list[tuple[str, torch.Tensor, tuple[int, ...]]]:
        """`(key, view, offsets)` of each block of `local`; a single block keeps the tensor's own key."""
        if len(self.blocks) == 1:
            return [(key, local, self.blocks[0].offsets)]
        return [
            (block_key(key, number), local.narrow(self.dim, block.start, block.length), block.offsets)
            for number, block in enumerate(self.blocks)
        ]


def shard(tensor: TensorT, dim: int, index: int, count: int, *, stacked: int | Sequence[int] = 1) -> TensorT:
    """Say that `tensor` is part `index` of `count` equal parts of a whole, cut along `dim`. Returns the tensor.

    `stacked`: the tensor holds several such parts one after the other along `dim` (a fused [gate; up] or [q; k; v]
    projection), each cut from its own section of the whole: their number, or their lengths in `tensor` where these
    differ. The whole then has all of the first section, all of the second, …, as the tensor has where `count` is 1.

    Call it on the parameter or buffer itself, on every rank that holds a part; what all ranks hold whole needs nothing.
    Saying it again replaces what was said. Raises ConfigError for what cannot be.
    """
    shape = _shape_of(tensor)
    if not -len(shape) <= dim < len(shape):
        raise ConfigError(f"dim is {dim}; a tensor of shape {list(shape)} has none of that number.")
    dim %= len(shape)
    if type(index) is not int or type(count) is not int or not 0 <= index < count:
        raise ConfigError(f"part {index!r} of {count!r} is none: index counts from 0 and lies below count.")
    lengths = _section_lengths(shape[dim], stacked)
    blocks, start = [], 0
    for length in lengths:
        offset = start * count + length * index
        blocks.append(Block(start, length, tuple(offset if axis == dim else 0 for axis in range(len(shape)))))
        start += length
    whole = tuple(length * count if axis == dim else length for axis, length in enumerate(shape))
    if count == 1:
        blocks = [Block(0, shape[dim], (0,) * len(shape))]
    say(tensor, Sharding(shape, whole, dim, tuple(blocks)))
    return tensor


def shard_at(tensor: TensorT, *, global_shape: Sequence[int], offsets: Sequence[int]) -> TensorT:
    """Say that `tensor` begins at `offsets` in a whole of shape `global_shape`. Returns the tensor.

    For parts that are not equal, or cut along several dimensions; otherwise as `shard`.
    """
    shape, whole, place = _shape_of(tensor), tuple(map(int, global_shape)), tuple(map(int, offsets))
    fits = len(shape) == len(whole) == len(place) and all(
        start >= 0 and start + length <= total for start, length, total in zip(place, shape, whole, strict=False)
    )
    if not fits:
        raise ConfigError(f"a tensor of shape {list(shape)} does not lie at {list(place)} of {list(whole)}.")
    say(tensor, Sharding(shape, whole, 0, (Block(0, shape[0] if shape else 1, place),)))
    return tensor


def say(tensor: torch.Tensor, sharding: Sharding) -> None:
    """Say it of a tensor whose place is known already: a model's own description of it."""
    global _sayings
    _sayings += 1
    _said[tensor] = sharding


def sayings() -> int:
    """How often something was said in this process; as long as it stays, nothing else is said of any tensor."""
    return _sayings


def sharding_of(tensor: torch.Tensor) -> Sharding | None:
    """What was said of this very tensor object; None if nothing was. UnsupportedStateError if its shape changed."""
    said: Sharding | None = _said.get(tensor)  # type: ignore[no-untyped-call]
    if said is not None and tuple(tensor.shape) != said.shape:
        raise UnsupportedStateError(
            f"A tensor was said to be a part of shape {list(said.shape)}, and has now shape {list(tensor.shape)}.",
            advice="Call resilience.shard again where its shape changes.",
        )
    return said


class Shardings:
    """What was said, by the keys of a training state: a state dict lists other objects than those it was said of.

    The slices of distributed optimizers say it of themselves, by what the keys of a parameter's state begin with.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, torch.Tensor]],
        prefixes: Iterable[tuple[str, torch.Tensor]],
        slices: Iterable[tuple[str, FlatSharding]] = (),
    ) -> None:
        """`named`: key → live parameter or buffer; `prefixes`: what the keys of a parameter's state begin with."""
        self._by_key = dict(_found(named))
        self._by_prefix = dict(_found(prefixes))
        self._slices = dict(slices)

    @classmethod
    def when_any(
        cls,
        named: Callable[[], Iterable[tuple[str, torch.Tensor]]],
        prefixes: Callable[[], Iterable[tuple[str, torch.Tensor]]],
        slices: Iterable[tuple[str, FlatSharding]],
    ) -> Shardings:
        """The same; walks over no tensors in a process where nothing was said."""
        return cls(named(), prefixes(), slices) if _said else cls((), (), slices)

    def of(self, key: str, tensor: torch.Tensor) -> Sharding | FlatSharding | None:
        """The sharding of what stands under `key`. Of models and optimizers only: all else is a rank's own."""
        if not (_said or self._slices) or not may_be_cut(key):
            return None
        return sharding_of(tensor) or self._by_key.get(key) or self.of_state(key, tuple(tensor.shape))

    def of_state(self, key: str, shape: tuple[int, ...]) -> Sharding | FlatSharding | None:
        """That of the parameter whose optimizer state stands under `key`, if it has this shape."""
        prefix = state_prefix(key)
        found = self._slices.get(prefix) or self._by_prefix.get(prefix)
        return found if found is not None and found.shape == shape else None

    def of_slices(self, key: str, global_shape: tuple[int, ...]) -> FlatSharding | None:
        """Where this rank's slice of a stored tensor of optimizer state lies; None if it is not kept in slices here."""
        found = self._slices.get(state_prefix(key))
        return found if found is not None and found.global_shape == global_shape else None


def may_be_cut(key: str) -> bool:
    """Whether a plain tensor under this key can be a part of a whole; outside models and optimizers none is."""
    return key.startswith(("model/", "optimizer/"))


def state_prefix(key: str) -> str:
    """`optimizer/0/state/<parameter>` for the key of a tensor of optimizer state, else nothing."""
    parts = key.split("/", 4)
    return "/".join(parts[:4]) if len(parts) == 5 and (parts[0], parts[2]) == ("optimizer", "state") else ""


def block_key(key: str, number: int) -> str:
    """The key of one of several blocks of a tensor."""
    return f"{key}{_SEPARATOR}{number}]"


def without_block(key: str) -> str:
    """The key of the tensor that a block belongs to; of any other key itself."""
    return key.partition(_SEPARATOR)[0]


def _found(tensors: Iterable[tuple[str, torch.Tensor]]) -> Iterable[tuple[str, Sharding]]:
    for key, tensor in tensors:
        said = sharding_of(tensor)
        if said is not None:
            yield key, said


def _shape_of(tensor: object) -> tuple[int, ...]:
    if not isinstance(tensor, torch.Tensor):
        raise ConfigError(f"a {type(tensor).__name__} cannot be a part of a tensor.")
    if is_dtensor(tensor):
        raise ConfigError("a DTensor knows its own place.", advice="Annotate plain tensors only.")
    return tuple(tensor.shape)


def _section_lengths(length: int, stacked: int | Sequence[int]) -> tuple[int, ...]:
    if type(stacked) is int:
        if stacked < 1 or length % stacked:
            raise ConfigError(f"stacked is {stacked}; {length} rows cannot be that many equal sections.")
        return (length // stacked,) * stacked
    lengths = tuple(stacked)  # type: ignore[arg-type]
    if not lengths or not all(type(each) is int and each >= 0 for each in lengths) or math.fsum(lengths) != length:
        raise ConfigError(f"stacked is {list(lengths)}; the sections' lengths have to add up to {length}.")
    return lengths
