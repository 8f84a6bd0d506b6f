"""A state as a shard: its tensors one after the other, and all else of it as a pickle in the place of plain values.

The file is laid out as every shard of this package (`snapshot/layout.py`), so that `safetensors` opens it, it can be
sent in segments, and its digest is taken in the same way. The same state gives the same bytes.
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from typing import Any

import torch

from resilience.errors import CorruptCopyError, UnsupportedStateError
from resilience.integrations.nvrx.trust import Trust
from resilience.snapshot.arena import Arena, typed_view
from resilience.snapshot.layout import Layout, Piece, ShardIdentity, plan_layout, values_capacity
from resilience.snapshot.memory_copy import copy_tensors
from resilience.stores.shard_file import ShardHeader, read_header

__all__ = ["Packed", "Packer", "unpack"]

_PROTOCOL = 5


@dataclass(frozen=True)
class Packed:
    """A state that is ready to be copied. The tensors are those of the state, in the order of the layout's items."""

    layout: Layout
    tensors: tuple[torch.Tensor, ...]
    rest: bytes

    def fill(self, arena: Arena, iteration: int, owner: int, world_size: int) -> None:
        """Copy all of it into `arena`, which has the layout's length; afterwards that is a whole shard."""
        arena.use(self.layout)
        copy_tensors(arena.views, [self.tensors[placed.piece.item].detach() for placed in self.layout.placed])
        arena.write_values(self.rest)
        arena.seal(ShardIdentity("local", "", 0, iteration, owner, world_size, len(self.rest)))


class Packer:
    """Of one rank's states, which are mostly alike: the plan of the last one is used again."""

    def __init__(self, trust: Trust) -> None:
        self._trust = trust
        self._planned: tuple[tuple[Piece, ...], int, Layout] | None = None

    def pack(self, state: Any) -> Packed:
        """UnsupportedStateError if it holds what could not be loaded again, or cannot be pickled."""
        content = io.BytesIO()
        pickler = _Pickler(content)
        try:
            pickler.dump(state)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise UnsupportedStateError(f"the state cannot be pickled: {error}") from error
        rest = content.getvalue()
        self._trust.check(rest)
        pieces = tuple(_piece(index, tensor) for index, tensor in enumerate(pickler.tensors))
        return Packed(self._layout(pieces, len(rest)), tuple(pickler.tensors), rest)

    def _layout(self, pieces: tuple[Piece, ...], rest_bytes: int) -> Layout:
        capacity = values_capacity(rest_bytes)
        if self._planned is None or self._planned[:2] != (pieces, capacity):
            self._planned = (pieces, capacity, plan_layout(pieces, {}, rest_bytes, ()))
        return self._planned[2]


def unpack(content: torch.Tensor, view: memoryview, trust: Trust, what: str) -> tuple[ShardHeader, Any]:
    """The state in a shard whose bytes are proved, with tensors of its own; CorruptCopyError, UnsupportedStateError.

    `content` and `view` are both those bytes.
    """
    header = read_header(view, what)

    def tensor(pid: Any) -> torch.Tensor:
        key, needs_grad, device = pid
        try:
            piece = header.pieces[key]
            dtype = getattr(torch, piece.dtype)
        except (KeyError, AttributeError, TypeError) as error:
            raise CorruptCopyError(f"{what}: the state has a tensor {key!r}, and the shard has none.") from error
        loaded = typed_view(content, piece.start, dtype, piece.shape).to(device, copy=True)
        return loaded.requires_grad_() if needs_grad else loaded

    start, stop = header.values
    try:
        return header, trust.load(bytes(view[start:stop]), tensor)
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, LookupError) as error:
        if isinstance(error, CorruptCopyError | UnsupportedStateError):
            raise
        raise CorruptCopyError(f"{what}: the state cannot be read: {type(error).__name__}: {error}") from error


class _Pickler(pickle.Pickler):
    """Leaves tensors out, each once, however often the state has it."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, _PROTOCOL)
        self.tensors: list[torch.Tensor] = []
        self._keys: dict[int, str] = {}

    def persistent_id(self, value: Any) -> Any:
        if type(value) is not torch.Tensor:
            if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
                raise UnsupportedStateError(
                    f"the state has a {type(value).__module__}.{type(value).__qualname__}, which cannot be stored yet.",
                    advice="Put plain tensors (its local part) into the state.",
                )
            return None
        if value.layout is not torch.strided or value.device.type == "meta" or value.is_quantized:
            raise UnsupportedStateError(f"the state has a {value.layout} tensor on {value.device}, which has no bytes.")
        key = self._keys.get(id(value))
        if key is None:
            key = self._keys[id(value)] = f"tensor.{len(self.tensors)}"
            self.tensors.append(value)  # which also keeps its id from being given to another
        return key, value.requires_grad and value.is_leaf, str(value.device)


def _piece(index: int, tensor: torch.Tensor) -> Piece:
    shape = tuple(tensor.shape)
    return Piece(f"tensor.{index}", tensor.dtype, shape, (0,) * len(shape), shape, False, index)
