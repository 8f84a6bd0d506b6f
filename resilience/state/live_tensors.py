"""Which live tensor stands behind a saved key, and where the bytes of that key are to go.

Parameters and buffers are filled in place. Optimizer state need not exist in a fresh process, so it gets tensors of its
own, made after its parameter: same device, same strides, same device mesh. All else is staged.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from resilience.state.flat_sharding import FlatSharding
from resilience.state.items import Item, SavedItem, items_of, place_on_mesh
from resilience.state.model_state import storage_of
from resilience.state.sharding import Sharding, state_prefix
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
        self._shardings = state.shardings()
        self.items: dict[str, Item] = {item.key: item for item in items_of(tensors, None, self._shardings)}
        storages = {f"model/{model.position}": model.storages() for model in state.models}
        self._locals: dict[str, torch.Tensor] = {}
        self._backed = {key for key in self._tensors if self._is_backed(key, storages)}
        self._parameters = dict(state.state_prefixes())
        self._model_keys: dict[str, str] = {}
        for optimizer in state.optimizers:
            for name in optimizer.parameters():
                prefix = f"optimizer/{optimizer.position}/state/{path_component(name)}"
                self._model_keys[prefix] = state.model_key(name)

    def backed(self, key: str) -> bool:
        """Whether the key is a live parameter or buffer itself, and not something that a hook made of one."""
        return key in self._backed

    def target(self, ref: TensorRef, saved: Sequence[SavedItem]) -> torch.Tensor:
        """The tensor to fill with this rank's bytes of `ref`: the live one where it can be written, else a new one.

        `saved` are its blocks, nearly always one; `parts` finds them in the tensor.
        """
        if self.backed(ref.key) and not _overlaps(self._local(ref.key)):
            return self._local(ref.key)
        like, shape = self._like(ref.key), self._shape(ref.key, saved)
        if like is None:
            return torch.empty(shape, dtype=ref.dtype, device=_device_like(ref.device))
        local = local_part(like)
        device = torch.device("cpu") if self._stays_on_host(ref, shape) else local.device
        if tuple(local.shape) == shape:
            # Fused optimizers walk parameter and state side by side in memory: their strides have to agree.
            return torch.empty_like(local, dtype=ref.dtype, device=device)
        return torch.empty(shape, dtype=ref.dtype, device=device)

    def parts(self, ref: TensorRef, saved: Sequence[SavedItem], target: torch.Tensor) -> list[torch.Tensor]:
        """Where in `target` the bytes of each block of `ref` belong."""
        flat = self._shardings.of_slices(ref.key, saved[0].global_shape)
        if flat is not None:
            return [part for _, part, _ in flat.parts(ref.key, target)]
        if len(saved) == 1:
            return [target]
        sharding = self._sharding(ref.key, tuple(target.shape))
        assert sharding is not None, "blocks were found to be those of the live tensor"
        return [part for _, part, _ in sharding.parts(ref.key, target)]

    def unlike_cut(self, ref: TensorRef, saved: Sequence[SavedItem]) -> str:
        """Why a part of a whole that is no DTensor cannot be one here, in words; empty when it can, or is whole."""
        whole = len(saved) == 1 and saved[0].shape == saved[0].global_shape
        if ref.placements is not None or ref.key.startswith("model/"):  # the model's are compared with live items
            return ""
        there = [(item.global_shape, item.offsets, item.shape) for item in saved]
        here = self._cut(ref.key, self._shape(ref.key, saved))
        if there == here or (whole and not here):
            return ""
        told = " and ".join(f"{list(shape)} at {list(offsets)} of {list(of)}" for of, offsets, shape in there)
        live = " and ".join(f"{list(shape)} at {list(offsets)} of {list(of)}" for of, offsets, shape in here)
        return f"{ref.key}: saved as {told}, here it would be {live or 'whole'}"

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
        live = self._local(key)
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
        prefix = state_prefix(key)
        return self._parameters.get(prefix) if prefix else self._tensors.get(key)

    def _local(self, key: str) -> torch.Tensor:
        """This rank's plain tensor of a live key, all of its blocks: always the same object."""
        if key not in self._locals:
            self._locals[key] = local_part(self._tensors[key])
        return self._locals[key]

    def _sharding(self, key: str, shape: tuple[int, ...]) -> Sharding | FlatSharding | None:
        """What was said of the live tensor, or of the parameter whose state of this shape it is."""
        live = self._tensors.get(key)
        if live is not None and not is_dtensor(live):
            return self._shardings.of(key, live)
        return self._shardings.of_state(key, shape)

    def _shape(self, key: str, saved: Sequence[SavedItem]) -> tuple[int, ...]:
        """The shape of all blocks together, on this rank."""
        first = saved[0].shape
        flat = self._shardings.of_slices(key, saved[0].global_shape)
        if flat is not None:
            return flat.shape
        parameter = self._parameters.get(state_prefix(key))
        if len(saved) == 1:
            return first
        sharding = self._sharding(key, () if parameter is None else tuple(local_part(parameter).shape))
        if not isinstance(sharding, Sharding):
            return first
        rows = sum(item.shape[sharding.dim] for item in saved)
        return (*first[: sharding.dim], rows, *first[sharding.dim + 1 :])

    def _cut(self, key: str, shape: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
        """Where a tensor of this shape would lie here, block by block: whole, offsets, shape. Empty if it is whole."""
        sharding = self._sharding(key, shape)
        if sharding is None:
            return []
        blank = torch.empty(sharding.shape, device="meta")
        return [(sharding.global_shape, at, tuple(part.shape)) for _, part, at in sharding.parts(key, blank)]

    def _stays_on_host(self, ref: TensorRef, shape: tuple[int, ...]) -> bool:
        """Whether optimizer state was kept on the host on purpose: Adam's step, or state offloaded from a device."""
        prefix = state_prefix(ref.key)
        if not prefix or ref.device != "cpu":
            return False
        parameter = self._refs.get(self._model_keys.get(prefix, ""))
        return shape == () or (parameter is not None and parameter.device != "cpu")

    def _mesh(self, ref: TensorRef) -> Any:
        """The mesh for a saved DTensor: its live counterpart's, else the only one here with as many dimensions."""
        assert ref.placements is not None
        like: Any = self._like(ref.key)
        if is_dtensor(like):
            return like.device_mesh if like.device_mesh.ndim == len(ref.placements) else None
        sharded: list[Any] = [tensor for tensor in self._tensors.values() if is_dtensor(tensor)]
        meshes = {tensor.device_mesh for tensor in sharded if tensor.device_mesh.ndim == len(ref.placements)}
        return meshes.pop() if len(meshes) == 1 else None


def cut_as_placed(state: TrainingState, values: bytes, index: Mapping[str, SavedItem]) -> dict[str, SavedItem]:
    """`index` with this rank's part of what is stored whole and is a DTensor of no model (a running average).

    Those of models and optimizers are found by their live counterparts, and are here already.
    """
    index = dict(index)
    others = {part: tree for part, tree in json.loads(values).items() if part not in ("model", "optimizer")}
    placed = [(key, names) for key, names in _placements_in(others) if key in index]
    if not placed:
        return index
    meshes = {t.device_mesh for _, t in encode(state.tree(("model", "optimizer")))[1] if is_dtensor(t)}  # type: ignore[attr-defined]
    for key, names in placed:
        fitting = [mesh for mesh in meshes if mesh.ndim == len(names)]
        if len(fitting) == 1 and index[key].shape == index[key].global_shape:
            place = place_on_mesh(key, index[key].global_shape, fitting[0], placements_of(names), names)
            index[key] = replace(index[key], offsets=place.offsets, shape=place.shape)
    return index


def _placements_in(written: Any) -> Iterator[tuple[str, tuple[str, ...]]]:
    for part in written.values() if isinstance(written, dict) else written if isinstance(written, list) else ():
        if isinstance(part, dict) and isinstance(part.get("placements"), list):
            yield str(part.get("$tensor")), tuple(map(str, part["placements"]))
        else:
            yield from _placements_in(part)


def _overlaps(tensor: torch.Tensor) -> bool:
    return any(stride == 0 and length > 1 for stride, length in zip(tensor.stride(), tensor.shape, strict=True))


def _strides(shape: torch.Size) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _device_like(kind: str) -> torch.device:
    """A device of the kind that a tensor was saved from, if this process has one; else the CPU."""
    here = torch.accelerator.current_accelerator() if kind != "cpu" else None
    return torch.device(kind) if here is not None and here.type == kind else torch.device("cpu")
