"""How a model in this process takes its tensors from an open checkpoint, under the names that it has for them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from resilience.errors import UnsupportedStateError
from resilience.formats.by_layer import LayeredReader
from resilience.formats.keys import MODEL_PREFIX, stored_key
from resilience.formats.protocol import CheckpointReader, Target
from resilience.formats.strictness import KeyDifference, judge_keys
from resilience.state.megatron_model import megatron_places
from resilience.state.model_state import unwrapped
from resilience.state.sharding import sharding_of
from resilience.state.stored_place import StoredPlaces
from resilience.state.tree import path_component

__all__ = ["load_into"]


def load_into(
    reader: CheckpointReader, model: torch.nn.Module | None, strictness: str
) -> tuple[Mapping[str, torch.Tensor], KeyDifference]:
    """The model's tensors, filled, by name (without a model new ones, all that there are), and what was let pass."""
    wanted = _all_of(reader) if model is None else _of_model(reader, model)
    missing = {path for path in wanted.reader.paths_of(wanted.unasked) if path.startswith(MODEL_PREFIX)}
    absent = {path for path in wanted.paths.values() if path not in wanted.reader.index}
    difference = judge_keys(set(map(stored_key, absent)), set(map(stored_key, missing)), strictness)
    reader.verify(reader.files(wanted.reader.as_stored(wanted.targets)))
    with torch.no_grad():
        wanted.reader.read(wanted.targets)
    return wanted.tensors, difference


@dataclass
class _Wanted:
    """`tensors` by the name that the caller gets them under, and the tree path of each; `targets` of those that are
    there."""

    reader: LayeredReader
    tensors: Mapping[str, torch.Tensor]
    paths: Mapping[str, str]
    targets: list[Target] = field(default_factory=list)

    @property
    def unasked(self) -> set[str]:
        return set(self.reader.units()) - self.reader.units_asked(self.paths.values())


def _all_of(reader: CheckpointReader) -> _Wanted:
    paths = {stored_key(path): path for path in reader.index if path.startswith(MODEL_PREFIX)}
    tensors = {
        name: torch.empty(reader.index[path].global_shape, dtype=reader.index[path].dtype)
        for name, path in paths.items()
    }
    wanted = _Wanted(LayeredReader(reader, {}, ()), tensors, paths)
    wanted.targets += (Target(paths[name], tensor, (0,) * tensor.dim()) for name, tensor in tensors.items())
    return wanted


def _of_model(reader: CheckpointReader, model: torch.nn.Module) -> _Wanted:
    """Of a model that is cut, this process's parts: as Megatron Core's says, or as `resilience.shard` was told."""
    tensors = _tensors_of(model)
    inner = unwrapped(model)
    said = megatron_places(inner, "the model")
    stored, own = {stored_key(path) for path in reader.index}, inner.state_dict().keys()
    bare = {name: _without_wrapper(_without_wrapper(name, stored), stored | own) for name in tensors}
    paths = {name: f"{MODEL_PREFIX}0/{path_component(said.names.get(bare[name], bare[name]))}" for name in tensors}
    places = StoredPlaces({f"{MODEL_PREFIX}0/{path_component(name)}": (at, ()) for name, at in said.tensors.items()})
    wanted = _Wanted(LayeredReader(reader, places.bases, paths.values()), tensors, paths)
    live = {**dict(model.named_buffers(remove_duplicate=False)), **dict(model.named_parameters(remove_duplicate=False))}
    for name, tensor in tensors.items():
        if paths[name] not in wanted.reader.index:
            continue
        sharding = sharding_of(live[name]) if name in live else None
        parts = [("", tensor, (0,) * tensor.dim())] if sharding is None else sharding.parts("", tensor)
        whole = tuple(tensor.shape) if sharding is None else sharding.global_shape
        wanted.targets += (Target(paths[name], part, offsets, whole) for _, part, offsets in parts)
    return wanted


def _tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        if type(value) not in (torch.Tensor, torch.nn.Parameter) and isinstance(value, torch.Tensor):
            raise UnsupportedStateError(
                f"{name} is a {type(value).__name__}; only a model of plain tensors is loaded without a process group.",
                advice="Load before sharding the model, or use ResilientTrainer.",
            )
        if isinstance(value, torch.Tensor):
            tensors[name] = value
    return tensors


def _without_wrapper(name: str, known: Collection[str]) -> str:
    """DistributedDataParallel puts `module.` before every name; checkpoints have it without."""
    bare = name.removeprefix("module.")
    return bare if name not in known and bare in known else name
