"""Which live tensor stands behind a saved key, and where the bytes of that key are to go.

Parameters and buffers are filled in place. Optimizer state need not exist in a fresh process, so it gets tensors of its
own, made after its parameter: same device, same strides, same device mesh. All else is staged.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from resilience.state.items import Item, SavedItem, items_of, place_on_mesh
from resilience.state.model_state import storage_of
from resilience.state.tensors import TensorRef, is_dtensor, local_part, placements_of
from resilience.state.tree import encode, path_component

if TYPE_CHECKING:
    from resilience.state.training_state import TrainingState


class LiveTensors:
    """The live tensors of models and optimizers by key, as far as a load needs to know them. Changes none.

    `refs` is what the values of the save say about each tensor, by key.
    """

    def __init__(self, state: TrainingState, parts: Collection[str], refs: Mapping[str, TensorRef]) -> None:
        self._refs = refs
        _, tensors = encode(state.tree({"model", "optimizer"} & set(parts)))
        self._tensors = dict(tensors)
        self.items: dict[str, Item] = {item.key: item for item in items_of(tensors)}
        storages = {f"model/{model.position}": model.storages() for model in state.models}
        self._backed = {key for key in self._tensors if self._is_backed(key, storages)}
        self._parameters: dict[str, torch.Tensor] = {}
        self._model_keys: dict[str, str] = {}
        for optimizer in state.optimizers:
            for name, parameter in optimizer.parameters().items():
                prefix = f"optimizer/{optimizer.position}/state/{path_component(name)}"
                self._parameters[prefix] = parameter
                self._model_keys[prefix] = state.model_key(name)

    def backed(self, key: str) -> bool:
        """Whether the key is a live parameter or buffer itself, and not something that a hook made of one."""
        return key in self._backed

    def target(self, ref: TensorRef, saved: SavedItem) -> torch.Tensor:
        """The tensor to fill with this rank's bytes of `ref`: the live one where it can be written, else a new one."""
        if self.backed(ref.key) and not _overlaps(self.items[ref.key].tensor):
            return self.items[ref.key].tensor
        like = self._like(ref.key)
        if like is None:
            return torch.empty(saved.shape, dtype=ref.dtype, device=_device_like(ref.device))
        local = local_part(like)
        device = torch.device("cpu") if self._stays_on_host(ref, saved) else local.device
        if tuple(local.shape) == saved.shape:
            # Fused optimizers walk parameter and state side by side in memory: their strides have to agree.
            return torch.empty_like(local, dtype=ref.dtype, device=device)
        return torch.empty(saved.shape, dtype=ref.dtype, device=device)

    def unlike_on_mesh(self, ref: TensorRef, saved: SavedItem) -> str:
        """Why a saved DTensor cannot be one here, in words; empty when it can, or when it is no DTensor."""
        if ref.placements is None or self.backed(ref.key):
            return ""
        mesh = self._mesh(ref)
        if mesh is None:
            return f"{ref.key}: saved as a DTensor on {len(ref.placements)} mesh dimensions, here no tensor is one"
        place = place_on_mesh(ref.key, saved.global_shape, mesh, placements_of(ref.placements), ref.placements)
        if (place.offsets, place.shape) != (saved.offsets, saved.shape):
            return (
                f"{ref.key}: saved as the shard {list(saved.shape)} at {list(saved.offsets)}, here it would be "
                f"{list(place.shape)} at {list(place.offsets)} of {list(saved.global_shape)}"
            )
        return ""

    def whole(self, ref: TensorRef, saved: SavedItem, local: torch.Tensor) -> torch.Tensor:
        """What stands in the tree for a filled target: a DTensor around it, if that is what was saved."""
        if ref.placements is None:
            return local
        from torch.distributed.tensor import DTensor

        like, shape = self._like(ref.key), torch.Size(saved.global_shape)
        stride = like.stride() if like is not None and like.shape == shape else _strides(shape)
        placements = placements_of(ref.placements)
        return DTensor.from_local(local, self._mesh(ref), placements, run_check=False, shape=shape, stride=stride)

    def write_through(self, key: str, filled: torch.Tensor) -> None:
        """Bring a live tensor to what was filled in its stead, because an expanded one cannot be written as it is."""
        live = self.items[key].tensor
        if filled is live:
            return
        for dim, stride in enumerate(live.stride()):
            if stride == 0 and live.shape[dim] > 1:
                live, filled = live.narrow(dim, 0, 1), filled.narrow(dim, 0, 1)
        live.copy_(filled)

    def _is_backed(self, key: str, storages: Mapping[str, Collection[Hashable]]) -> bool:
        part, position, rest = key.split("/", 2)
        if part == "optimizer":
            return rest.startswith("parameters/")
        return storage_of(self._tensors[key]) in storages[f"{part}/{position}"]

    def _like(self, key: str) -> torch.Tensor | None:
        """The live tensor that the saved one is made after: the same one, or the parameter whose state it is."""
        prefix = _state_prefix(key)
        return self._parameters.get(prefix) if prefix else self._tensors.get(key)

    def _stays_on_host(self, ref: TensorRef, saved: SavedItem) -> bool:
        """Whether optimizer state was kept on the host on purpose: Adam's step, or state offloaded from a device."""
        prefix = _state_prefix(ref.key)
        if not prefix or ref.device != "cpu":
            return False
        parameter = self._refs.get(self._model_keys.get(prefix, ""))
        return saved.shape == () or (parameter is not None and parameter.device != "cpu")

    def _mesh(self, ref: TensorRef) -> Any:
        """The mesh for a saved DTensor: its live counterpart's, else the only one here with as many dimensions."""
        assert ref.placements is not None
        like: Any = self._like(ref.key)
        if is_dtensor(like):
            return like.device_mesh if like.device_mesh.ndim == len(ref.placements) else None
        sharded: list[Any] = [tensor for tensor in self._tensors.values() if is_dtensor(tensor)]
        meshes = {tensor.device_mesh for tensor in sharded if tensor.device_mesh.ndim == len(ref.placements)}
        return meshes.pop() if len(meshes) == 1 else None


def _state_prefix(key: str) -> str:
    """`optimizer/0/state/<parameter>` for the key of a tensor of optimizer state, else nothing."""
    parts = key.split("/", 4)
    return "/".join(parts[:4]) if len(parts) == 5 and (parts[0], parts[2]) == ("optimizer", "state") else ""


def _overlaps(tensor: torch.Tensor) -> bool:
    return any(stride == 0 and length > 1 for stride, length in zip(tensor.stride(), tensor.shape, strict=True))


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _device_like(kind: str) -> torch.device:
    """A device of the kind that a tensor was saved from, if this process has one; else the CPU."""
    here = torch.accelerator.current_accelerator() if kind != "cpu" else None
    return torch.device(kind) if here is not None and here.type == kind else torch.device("cpu")
