"""Which tensors can be stored, and what has to be written down about one so that it comes back as it was.

A tensor's bytes travel as an item; its dtype, kind of device and (for a DTensor) placements stand in the values. What
has no plain bytes (sparse, quantized, nested, meta, foreign subclasses) is refused here, by name.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from resilience.errors import CorruptCopyError, UnsupportedStateError

# The sub-byte integers and the quantized dtypes can be named but not copied: torch has no kernel for them.
_UNCOPYABLE = {f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)}
_UNCOPYABLE |= {"qint8", "quint8", "qint32", "quint4x2", "quint2x4"}

#: Every dtype that can be stored, by its name in torch ("bfloat16", "float8_e4m3fn", "bool", …).
DTYPES: dict[str, torch.dtype] = {
    str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, torch.dtype)
}
for _name in _UNCOPYABLE:
    DTYPES.pop(_name, None)
_NAMES: dict[torch.dtype, str] = {dtype: name for name, dtype in DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """The name under which a storable dtype is written down: `torch.bfloat16` → `"bfloat16"`."""
    return _NAMES[dtype]


def is_dtensor(tensor: object) -> bool:
    """Whether this is a DTensor, without importing torch.distributed.tensor (0.6 s) in a process that uses none."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def is_expert(parameter: torch.Tensor) -> bool:
    """Whether it is marked, as Megatron Core marks experts, as one that not all data-parallel ranks have alike."""
    return getattr(parameter, "allreduce", True) is False


@dataclass(frozen=True)
class TensorRef:
    """What the values say about one tensor; `key` names the item that holds its bytes.

    `device` is the kind only ("cpu", "cuda"): which one it was means nothing in another process. `placements` is set
    for a DTensor; its mesh is the live parameter's. `numpy_dtype` and `numpy_shape` are set for a numpy array.
    """

    key: str
    dtype: torch.dtype
    device: str = "cpu"
    placements: tuple[str, ...] | None = None
    parameter: bool = False
    requires_grad: bool = False
    numpy_dtype: str | None = None
    numpy_shape: tuple[int, ...] = ()


def check_storable(path: str, tensor: torch.Tensor) -> None:
    """Refuse a tensor that is not plain bytes with a shape: UnsupportedStateError names the item and the way out."""
    kind = type(tensor)
    if kind is not torch.Tensor and kind is not torch.nn.Parameter:
        if not is_dtensor(tensor):
            _refuse(path, f"a tensor of class {kind.__module__}.{kind.__qualname__}", "Store a plain tensor instead")
        check_storable(path, tensor._local_tensor)  # type: ignore[attr-defined]
    # A nested tensor claims the strided layout, so that it has to be asked about on its own.
    elif tensor.layout is not torch.strided or tensor.is_nested:
        kind_name = "nested" if tensor.is_nested else str(tensor.layout).removeprefix("torch.")
        _refuse(path, f"a {kind_name} tensor", "Store its parts (values, indices, offsets) as plain tensors")
    elif tensor.dtype not in _NAMES:
        if tensor.is_quantized:
            _refuse(path, f"a quantized tensor ({tensor.dtype})", "Store int_repr(), scale and zero point instead")
        _refuse(path, f"a tensor of {tensor.dtype}, which torch cannot copy", "Store it as uint8")
    elif tensor.is_meta:
        _refuse(path, "a tensor on the meta device, which has no bytes", "Materialise the model before training")


def _refuse(path: str, what: str, advice: str) -> None:
    raise UnsupportedStateError(f"{path} is {what}, which cannot be stored.", advice=f"{advice}, or leave it out.")


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with nothing lazy about them: detached, conjugation and negation carried out.

    Shares the storage of `tensor` except where a conjugate or negative view had to be written out.
    """
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.is_conj():
        tensor = tensor.resolve_conj()
    return tensor.resolve_neg() if tensor.is_neg() else tensor


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's plain tensor behind `tensor`: a DTensor's local shard, anything else itself (live, not copied)."""
    if type(tensor) is not torch.Tensor and is_dtensor(tensor):
        tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return plain(tensor)


def placement_names(path: str, tensor: Any) -> tuple[str, ...]:
    """A DTensor's placements in words: `shard:0`, `replicate`, `strided:0:2`; a pending sum has no state to store."""
    return tuple(_placement_name(path, placement) for placement in tensor.placements)


def _placement_name(path: str, placement: Any) -> str:
    # The class names decide, because a strided shard counts as a Shard in some releases of torch and not in others.
    kind = type(placement).__name__
    if kind == "_StridedShard":
        return f"strided:{placement.dim}:{placement.split_factor}"
    if kind == "Shard":
        return f"shard:{placement.dim}"
    if kind == "Replicate":
        return "replicate"
    raise UnsupportedStateError(
        f"{path} is a DTensor placed as {placement}: its value is a sum over ranks that was not carried out.",
        advice="Redistribute it to Shard or Replicate before the save.",
    )


def placements_of(names: tuple[str, ...]) -> tuple[Any, ...]:
    """The placements that `placement_names` wrote down; raises CorruptCopyError for anything else."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    placements: list[Any] = []
    for name in names:
        kind, *numbers = name.split(":")
        if not all(number.isdecimal() and len(number) < 10 for number in numbers):
            raise CorruptCopyError(f"No placement is called {name!r}.")
        match kind, [int(number) for number in numbers]:
            case "replicate", []:
                placements.append(Replicate())
            case "shard", [dim]:
                placements.append(Shard(dim))
            case "strided", [dim, factor]:
                placements.append(_StridedShard(dim, split_factor=factor))
            case _:
                raise CorruptCopyError(f"No placement is called {name!r}.")
    return tuple(placements)


def byte_view(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of a plain tensor as a one-dimensional uint8 tensor on the CPU, in C order; copies only if it must."""
    return plain(tensor).cpu().contiguous().reshape(-1).view(torch.uint8)


def memory_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of `byte_view`, to be read.

    Not by `Tensor.numpy`, after which torch refuses for good to resize the tensor's storage: training may want to.
    """
    return np.from_dlpack(byte_view(tensor)).data
