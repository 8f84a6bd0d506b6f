"""The whole of a rank's training state: collected into one tree at a save, put back from one at a restart.

    {"model": [{name: tensor}], "optimizer": [{"state": …, "param_groups": …}], "scheduler": …, "scaler": …,
     "dataloader": …, "extra": {name: …}, "train_state": {…}, "rng": {…}, "layout": {…}}

RNG comes last both ways: what another object's `state_dict` or `load_state_dict` draws must not be lost, nor count.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch

from resilience.errors import ConfigError
from resilience.runtime.garbage import no_garbage_collection
from resilience.state import rng
from resilience.state.dataloader import LoaderCursor
from resilience.state.distributed_state import DistributedOptimizerState
from resilience.state.flat_sharding import FlatSharding
from resilience.state.items import EXTRA_STATE, Collected, Place, SavedItem
from resilience.state.kept_sections import KeptSections
from resilience.state.load_plan import LoadPlan
from resilience.state.model_state import ModelState
from resilience.state.optimizer_state import optimizer_state
from resilience.state.parallel_layout import ParallelLayout
from resilience.state.sharding import Shardings, sharding_of
from resilience.state.stored_place import StoredPlaces
from resilience.state.tensors import is_expert
from resilience.state.train_state import TrainState
from resilience.state.tree import encode_around, path_component

#: Parts of the tree, in order; a save, or a load, may take some of them only.
PARTS = ("model", "optimizer", "scheduler", "scaler", "dataloader", "extra", "train_state", "rng")


class TrainingState:
    """All that a run needs to go on as if it had never stopped; takes the arguments of `ResilientTrainer`.

    `model`, `optimizer` and `scheduler` may be lists. `extra_state` maps names to objects with `state_dict` and
    `load_state_dict`. `tokenizer`, `run_config` and `healthy` are only kept here for those who save; `layout` goes
    into every save once it is resolved. Batches are drawn through `loader`, counters live in `train_state`.
    """

    def __init__(
        self,
        model: Any,
        optimizer: Any = None,
        *,
        scheduler: Any = None,
        dataloader: Any = None,
        extra_state: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        run_config: Mapping[str, Any] | None = None,
        layout: ParallelLayout | None = None,
        healthy: Callable[[], bool] | None = None,
        scaler: Any = None,
    ) -> None:
        self.models = tuple(ModelState(each, position) for position, each in enumerate(_listed(model)))
        if not self.models:
            raise ConfigError("model is empty.", advice="Give at least one torch.nn.Module.")
        self.optimizers = tuple(
            optimizer_state(each, position, self._names_by_id) for position, each in enumerate(_listed(optimizer))
        )
        self.schedulers = tuple(_with_state("scheduler", each) for each in _listed(scheduler))
        self.scheduler_is_list = isinstance(scheduler, (list, tuple))
        self.scaler = None if scaler is None else _with_state("scaler", scaler)
        self.loader = LoaderCursor(dataloader)
        self.extra = {name: _with_state(f"extra_state[{name!r}]", each) for name, each in (extra_state or {}).items()}
        if not all(type(name) is str for name in self.extra):
            raise ConfigError(f"extra_state has the names {list(self.extra)}; each has to be a str.")
        if healthy is not None and not callable(healthy):
            raise ConfigError(f"healthy is {healthy!r}; a callable without arguments is expected.")
        self.train_state = TrainState()
        self.tokenizer = tokenizer
        self.run_config = run_config
        self.layout = layout
        self.healthy = healthy
        self._places: dict[Hashable, Place] = {}
        self._kept = KeptSections()

    def collect(self, parts: Collection[str] = PARTS) -> Collected:
        """This rank's state as it is now: live tensors, nothing copied. Call it at a boundary, on every rank alike.

        `parts` says which of `PARTS` to take. Raises UnsupportedStateError for what cannot be stored.
        """
        with torch.no_grad(), no_garbage_collection():
            tree = self.tree(parts)
            for position, entries in enumerate(tree.get("model", ())):
                tree["model"][position] = self._kept.take(f"model/{position}", entries, 2)
            for position, optimizer in enumerate(tree.get("optimizer", ())):
                if "state" in optimizer:
                    optimizer["state"] = self._kept.take(f"optimizer/{position}/state", optimizer["state"], 3)
                self._keep_values(optimizer, f"optimizer/{position}/", "param_groups", 3)
            self._keep_values(tree.get("rng", {}), "rng/", "python", 2)
            self._keep_values(tree, "", "layout", 1)
            values, found = encode_around(tree)
            return Collected(self._kept.items(found, self._places, self.shardings), values)

    def plan_load(self, values: bytes, index: Mapping[str, SavedItem], parts: Collection[str] = PARTS) -> LoadPlan:
        """What has to be filled to load a save; `index` says what the save holds for this rank, by key.

        Touches no live tensor and no live object. Raises LayoutMismatchError, listing the differences, when the save is
        not of such a state as this, and CorruptCopyError when values and index make no sense.
        """
        with torch.no_grad():
            return LoadPlan(self, values, index, parts)

    def tree(self, parts: Collection[str] = PARTS) -> dict[str, Any]:
        """The state as one tree of live tensors and plain values, parts in the order of `PARTS`."""
        collectors: dict[str, Callable[[], Any]] = {
            "model": lambda: [model.collect() for model in self.models],
            "optimizer": lambda: [optimizer.collect() for optimizer in self.optimizers],
            "scheduler": self._scheduler_state,
            "scaler": lambda: None if self.scaler is None else self.scaler.state_dict(),
            "dataloader": self.loader.state_dict,
            "extra": lambda: {name: self.extra[name].state_dict() for name in sorted(self.extra)},
            "train_state": self.train_state.to_dict,
            "rng": lambda: rng.capture(self._accelerators()),
        }
        tree = {part: collectors[part]() for part in PARTS if part in parts}
        if self.layout is not None and self.layout.is_resolved:
            tree["layout"] = self.layout.to_dict()  # no part to load: whoever loads holds his own against it
        return tree

    def _keep_values(self, tree: dict[str, Any], start: str, name: str, depth: int) -> None:
        """Have what stands under `name`, and seldom changes, written as before."""
        if name in tree:
            tree[name] = self._kept.take_values(start + name, tree[name], depth)

    @property
    def devices(self) -> set[torch.device]:
        """The devices that the models' parameters lie on."""
        return {device for model in self.models for device in model.devices}

    def _accelerators(self) -> Collection[torch.device]:
        """The devices whose generators count: none while no accelerator is in use, which is quicker to ask."""
        return self.devices if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]

    def _scheduler_state(self) -> Any:
        states = [scheduler.state_dict() for scheduler in self.schedulers]
        return states if self.scheduler_is_list else states[0] if states else None

    def buffer_keys(self) -> set[str]:
        """The items' keys of the models' buffers."""
        return {f"model/{model.position}/{path_component(name)}" for model in self.models for name in model.buffers()}

    def frozen_keys(self) -> frozenset[str]:
        """The items' keys of the parameters that are not trained."""
        return frozenset(
            f"model/{model.position}/{path_component(name)}"
            for model in self.models
            for name, parameter in model.parameters()
            if not parameter.requires_grad
        )

    def model_key(self, parameter_name: str) -> str:
        """The item's key of a parameter, given its name in an optimizer's state."""
        if len(self.models) == 1:
            return f"model/0/{path_component(parameter_name)}"
        chunk, _, name = parameter_name.partition(".")
        return f"model/{chunk}/{path_component(name)}"

    def shardings(self) -> Shardings:
        """Which of the tensors that `collect` finds were said to be parts of a whole."""
        return Shardings.when_any(self._named_tensors, self.state_prefixes, self._slices())

    def stepped_keys(self) -> Iterator[str]:
        """What an optimizer's step changes, and the next forward and backward do not: the items' keys of the
        parameters, and what those of their optimizer state lie under."""
        for model in self.models:
            for name, _ in model.parameters():
                yield f"model/{model.position}/{path_component(name)}"
        for prefix, _ in self.state_prefixes():
            yield prefix

    def state_prefixes(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the keys of each parameter's optimizer state begin with, and the parameter."""
        for optimizer in self.optimizers:
            for name, parameter in optimizer.parameters().items():
                yield f"optimizer/{optimizer.position}/state/{path_component(name)}", parameter

    def stored_places(self) -> StoredPlaces:
        """Where checkpoints have what a model has a key of its own for (Megatron Core's)."""
        models = {}
        for model in self.models:
            for name, tensor in model.tensors() if model.places.tensors else ():
                said = sharding_of(tensor) if name in model.places.tensors else None
                if said is not None:
                    key = f"model/{model.position}/{path_component(name)}"
                    models[key] = (model.places.tensors[name], said.global_shape)
        if not models:
            return StoredPlaces({})
        names = ((each, name) for each in self.optimizers for name in each.parameters())
        return StoredPlaces(
            models,
            ((f"optimizer/{o.position}/state/{path_component(name)}", self.model_key(name)) for o, name in names),
        )

    def extra_state_keys(self) -> list[dict[str, str]]:
        """Of each model, the entries that this rank stores as objects of Megatron Core's, and their keys."""
        return [
            {name: place.key for name, place in model.places.objects.items() if place.writes} for model in self.models
        ]

    def expert_parameters(self) -> frozenset[str]:
        """Names, as optimizers have them, of the parameters that are marked as experts'."""
        named = (pair for each in self.optimizers for pair in each.parameters().items())
        return frozenset(name for name, parameter in named if is_expert(parameter))

    def bases(self) -> list[str]:
        """The paths of the models' tensors, and what those of each parameter's optimizer state begin with."""
        return [path for path, _ in (*self._named_tensors(), *self.state_prefixes())]

    def empty_extra_keys(self) -> set[str]:
        """The keys of extra state that is None: Megatron Core's layers have such entries, for Transformer Engine."""
        return {
            f"model/{model.position}/{path_component(name)}"
            for model in self.models
            for name, value in model.collect().items()
            if value is None and name.endswith(EXTRA_STATE)
        }

    def _slices(self) -> Iterator[tuple[str, FlatSharding]]:
        for optimizer in self.optimizers:
            if isinstance(optimizer, DistributedOptimizerState):
                for name, flat in optimizer.shardings():
                    yield f"optimizer/{optimizer.position}/state/{path_component(name)}", flat

    def _named_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        for model in self.models:
            for name, tensor in model.tensors():
                yield f"model/{model.position}/{path_component(name)}", tensor

    def _names_by_id(self) -> dict[int, str]:
        names: dict[int, str] = {}
        for model in self.models:
            prefix = f"{model.position}." if len(self.models) > 1 else ""  # chunks count their layers alike
            names.update((id(parameter), prefix + name) for name, parameter in model.parameters())
        return names


def _listed(given: Any) -> Sequence[Any]:
    if given is None:
        return ()
    return given if isinstance(given, (list, tuple)) else (given,)


def _with_state(name: str, given: Any) -> Any:
    if callable(getattr(given, "state_dict", None)) and callable(getattr(given, "load_state_dict", None)):
        return given
    raise ConfigError(
        f"{name} is a {type(given).__name__} without state_dict and load_state_dict.",
        advice="Give an object that has both methods.",
    )
