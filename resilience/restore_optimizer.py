"""What another program's optimizer and scheduler leave behind, made into the state of those that are live here.

    by parameter   optimizer.state.exp_avg.<parameter>, in the parameter's shape        (Megatron's `fully_reshardable`)
    by bucket      optimizer.distributed.….bucket_idx_0.exp_avg, flat, of one place     (its `dp_reshardable`)

Moments go by the parameters' names, the step and the hyperparameters by group (`planning/foreign_groups.py`). A float32
parameter takes the value of its main parameter, not of the rounded weight. Whatever cannot be taken is said in words.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from resilience.errors import CorruptCopyError
from resilience.formats.keys import OPTIMIZER_PREFIX
from resilience.formats.optimizer_common import DP_RESHARDABLE, FULLY_RESHARDABLE, SHARDING_TYPE
from resilience.formats.optimizer_view import OptimizerView
from resilience.formats.protocol import StateReader
from resilience.planning.bucket_space import Flattened
from resilience.planning.foreign_groups import TakenGroup, as_step, saved_groups, saved_step, take_groups
from resilience.restore_buckets import Buckets
from resilience.state.distributed_state import MAIN, DistributedOptimizerState
from resilience.state.items import Item, blocks_of
from resilience.state.optimizer_state import AnyOptimizerState, OptimizerState, RedundancyFreeState
from resilience.state.recut import DIVISIONS
from resilience.state.saved_world import key_of, tensor_refs, tree_of
from resilience.state.tensors import dtype_name, local_part
from resilience.state.training_state import TrainingState
from resilience.state.tree import encode, path_component

__all__ = ["Adopted", "adopt"]

_BY_PARAMETER = (None, FULLY_RESHARDABLE)
_MAINS = (MAIN, "fp32_param")
_SHOWN = 5


@dataclass
class Adopted:
    """Parts of a tree as JSON, and what they refer to. `tensors` are this rank's own; all else is in `reader`.

    `dtypes`: keys of stored tensors that are to be converted. `notes` say what was not taken, in words.
    """

    reader: OptimizerView
    parts: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def adopt(state: TrainingState, reader: StateReader, parts: Collection[str]) -> Adopted:
    """What of optimizer and scheduler a checkpoint without ranks' states has for this rank. Nothing live changes.

    LayoutMismatchError if its optimizer state is of another tensor- or pipeline-parallel size, and bound to it.
    """
    adopted = Adopted(OptimizerView(reader, {}, {}))
    try:
        common = reader.common
    except CorruptCopyError as error:
        adopted.notes.append(f"neither optimizer nor scheduler are taken: {error}")
        return adopted
    if "optimizer" in parts and state.optimizers:
        _Optimizers(state, reader, common, adopted).take()
    # a scheduler goes on from the learning rates that its optimizer has
    if "optimizer" in adopted.parts and "scheduler" in parts and state.schedulers:
        _take_scheduler(state, common.get("opt_param_scheduler"), adopted)
    return adopted


def _take_scheduler(state: TrainingState, saved: object, adopted: Adopted) -> None:
    """Where the one live scheduler has exactly the entries that are stored (Megatron's own, that is)."""
    if saved is None:
        return
    live = state.schedulers[0].state_dict() if len(state.schedulers) == 1 else None
    if not isinstance(saved, Mapping) or not isinstance(live, Mapping) or set(saved) != set(live):
        kinds = ", ".join(type(each).__name__ for each in state.schedulers)
        adopted.notes.append(
            f"scheduler: {kinds} begins afresh; stored is the state of one with the entries {_few(saved)}"
        )
        return
    written, tensors = encode({"scheduler": [dict(saved)] if state.scheduler_is_list else dict(saved)})
    adopted.parts["scheduler"] = tree_of(written)["scheduler"]
    adopted.tensors |= dict(tensors)


@dataclass(frozen=True)
class _Keeps:
    """What a kind of optimizer has of each parameter, in Megatron's names. `step`: "state", "group", or "" for none."""

    moments: tuple[str, ...]
    step: str


class _Optimizers:
    """One look at all live optimizers, and at what is stored for their parameters."""

    def __init__(self, state: TrainingState, reader: StateReader, common: Mapping[str, Any], adopted: Adopted) -> None:
        self._state = state
        self._reader = reader
        self._common = common
        self._adopted = adopted
        content = common.get("content_metadata")
        self._kind = content.get(SHARDING_TYPE) if isinstance(content, Mapping) else None
        collected = state.collect(("model",))
        self._items: dict[str, Item] = {item.key: item for item in collected.items}
        models = tree_of(collected.values)["model"]
        self._placements = {key_of(ref): ref.get("placements") for ref in tensor_refs(models)}
        self._renamed: dict[str, str] = {}
        self._flattened: dict[str, Flattened] = {}
        self._stored: Mapping[str, Mapping[str, str | Flattened]] = {}
        self._without: list[str] = []
        self._notes: list[str] = []

    def take(self) -> None:
        """Into `adopted`; nothing at all if it cannot be taken for every optimizer."""
        problem = self._problem() or self._look()
        if problem:
            self._adopted.notes.append(f"optimizer: its state is fresh; {problem}")
            return
        trees = [self._tree(optimizer) for optimizer in self._state.optimizers]
        if not any(tree["state"] for tree in trees):
            self._adopted.notes.append("optimizer: its state is fresh; nothing is stored for its parameters by name")
            self._adopted.tensors.clear()
            return
        self._adopted.parts["optimizer"] = trees
        self._adopted.notes += self._notes
        self._adopted.reader = OptimizerView(self._reader, self._renamed, self._flattened)
        if self._without:
            self._adopted.notes.append(
                f"optimizer: nothing is stored for {len(self._without)} parameters, whose state is fresh: "
                f"{_few(self._without)}"
            )

    def _problem(self) -> str:
        for optimizer in self._state.optimizers:
            if not isinstance(optimizer, OptimizerState | DistributedOptimizerState):
                return f"a {type(optimizer.optimizer).__name__} has a state_dict of its own"
            if _keeps(optimizer) is None:
                return f"a {_class(optimizer).__name__} does not keep what is stored (exp_avg, exp_avg_sq)"
            if "parameters" in optimizer.collect():
                return "it trains parameters that belong to no model"
        if self._kind in _BY_PARAMETER or self._kind == DP_RESHARDABLE:
            return ""
        return f"the layout {str(self._kind)[:60]!r} is read for the model only"

    def _look(self) -> str:
        """Find out what is stored where; why nothing can be taken."""
        stored: object = self._common.get("optimizer")
        if self._kind == DP_RESHARDABLE:
            buckets = Buckets(self._state, self._reader)
            self._stored, problem = buckets.found()
            if problem:
                return problem
            stored = buckets.groups  # param groups too are stored once for each place
        else:
            self._stored = dict(self._by_parameter())
        self._groups, self._step = saved_groups(stored), saved_step(stored)
        return "" if self._groups else "no hyperparameters are stored with it"

    def _by_parameter(self) -> Iterator[tuple[str, dict[str, str | Flattened]]]:
        """Parameter's name as it stands in paths → moment → path, whichever optimizer they were stored for."""
        found: dict[str, dict[str, str | Flattened]] = {}
        for path in self._reader.index:
            parts = path.split("/")
            if len(parts) == 5 and path.startswith(OPTIMIZER_PREFIX) and parts[2] == "state":
                found.setdefault(parts[3], {})[parts[4]] = path
        return iter(found.items())

    def _tree(self, optimizer: AnyOptimizerState) -> dict[str, Any]:
        live = optimizer.collect()
        groups = [dict(group) for group in live["param_groups"]]
        taken = take_groups(groups, self._groups)
        keeps = _keeps(optimizer)
        assert keeps is not None, "else nothing would be taken"
        where = f"optimizer/{optimizer.position}"
        states: dict[str, Any] = {}
        for number, (group, its) in enumerate(zip(groups, taken, strict=True)):
            self._take_values(group, its, f"{where}/param_groups/{number}")
            step = its.step if its.step is not None else self._step
            if step is None and keeps.step:
                step = as_step(self._common.get("iteration")) or 0
                self._notes.append(
                    f"{where}/param_groups/{number}: no step is stored; it is taken for the iteration, {step}"
                )
            if keeps.step == "group":
                group["step"] = step
            for name in group["params"]:
                if any(name not in live[part] for part in DIVISIONS if part in live):
                    continue  # a rank has state of what it keeps elements of
                found = self._of_parameter(optimizer, name, keeps, group, step)
                if found:
                    states[name] = found
        written, tensors = encode({"optimizer": [{"param_groups": groups}]})
        self._adopted.tensors |= {key.replace("optimizer/0", where, 1): tensor for key, tensor in tensors}
        tree = {"state": states, "param_groups": tree_of(written)["optimizer"][0]["param_groups"]}
        for ref in tensor_refs(tree["param_groups"]):
            ref["$tensor"] = key_of(ref).replace("optimizer/0", where, 1)
        return tree | {part: live[part] for part in DIVISIONS if part in live}

    def _take_values(self, group: dict[str, Any], taken: TakenGroup, where: str) -> None:
        for name, value in taken.values.items():
            here = group[name]
            group[name] = torch.full_like(here, value) if isinstance(here, torch.Tensor) else value
        if not taken.alike:
            self._notes.append(f"{where}: its hyperparameters stay as they are here: no stored group is like it")
        if taken.disputed:
            self._notes.append(
                f"{where}: {', '.join(taken.disputed)} stay as they are here: the stored groups differ in them"
            )

    def _of_parameter(
        self, optimizer: AnyOptimizerState, name: str, keeps: _Keeps, group: Mapping[str, Any], step: int | None
    ) -> dict[str, Any]:
        """References to all that is stored of one parameter; empty if not all of its moments are."""
        model_key, escaped = self._state.model_key(name), path_component(name)
        blocks = blocks_of(model_key, self._items)
        stored = self._stored.get(self._stored_name(model_key), {})
        whole = blocks[0].global_shape if blocks else None
        if whole is None or any(self._shape_of(stored.get(moment)) != whole for moment in keeps.moments):
            self._without.append(name)
            return {}
        parameter = optimizer.parameters()[name]
        prefix = f"optimizer/{optimizer.position}/state/{escaped}"
        divided = isinstance(optimizer, DistributedOptimizerState)
        dtype = torch.float32 if divided else parameter.dtype
        refs = {
            moment: self._ref(f"{prefix}/{moment}", stored[moment], dtype, parameter, model_key)
            for moment in keeps.moments
        }
        main = next((stored[each] for each in _MAINS if self._shape_of(stored.get(each)) == whole), None)
        if divided and parameter.dtype != torch.float32:
            source = main if main is not None else model_key
            refs[MAIN] = self._ref(f"{prefix}/{MAIN}", source, torch.float32, parameter, model_key)
        elif main is not None and parameter.dtype == torch.float32:
            self._place(model_key, main)
        if keeps.step == "state":
            refs["step"] = self._own_step(f"{prefix}/step", int(step or 0), parameter, group)
        return refs

    def _own_step(self, key: str, step: int, parameter: torch.Tensor, group: Mapping[str, Any]) -> dict[str, Any]:
        self._adopted.tensors[key] = torch.tensor(float(step))
        ref = {"$tensor": key, "dtype": "float32"}
        on_device = group.get("capturable") or group.get("fused")
        device = local_part(parameter).device.type
        return ref | ({"device": device} if on_device and device != "cpu" else {})

    def _ref(
        self, key: str, source: str | Flattened, dtype: torch.dtype, parameter: torch.Tensor, model_key: str
    ) -> dict[str, Any]:
        self._place(key, source)
        self._adopted.dtypes[key] = dtype
        ref: dict[str, Any] = {"$tensor": key, "dtype": dtype_name(dtype)}
        device = local_part(parameter).device.type
        placements = self._placements.get(model_key)
        return (
            ref | ({"device": device} if device != "cpu" else {}) | ({"placements": placements} if placements else {})
        )

    def _place(self, key: str, source: str | Flattened) -> None:
        if isinstance(source, Flattened):
            self._flattened[key] = source
        elif source != key:
            self._renamed[key] = source

    def _shape_of(self, source: str | Flattened | None) -> tuple[int, ...] | None:
        if source is None:
            return None
        return source.global_shape if isinstance(source, Flattened) else self._reader.index[source].global_shape

    def _stored_name(self, model_key: str) -> str:
        """Under which name the state of a parameter is stored: the parameter's in the model, without its chunk."""
        return model_key.split("/", 2)[2]


def _class(optimizer: AnyOptimizerState) -> type:
    if isinstance(optimizer, DistributedOptimizerState):
        return type(optimizer.optimizer.inner)
    if isinstance(optimizer, RedundancyFreeState):
        return type(optimizer.inner)
    return type(optimizer.optimizer)


def _keeps(optimizer: AnyOptimizerState) -> _Keeps | None:
    """By class; None if what is stored says nothing to it."""
    kind, groups = _class(optimizer), optimizer.optimizer.param_groups
    if issubclass(kind, torch.optim.Adam) and not any(group.get("amsgrad") for group in groups):
        return _Keeps(("exp_avg", "exp_avg_sq"), "state")
    if any(each.__name__ == "FusedAdam" for each in kind.__mro__):
        return _Keeps(("exp_avg", "exp_avg_sq"), "group")
    if issubclass(kind, torch.optim.SGD):
        return _Keeps(("momentum_buffer",), "") if any(group.get("momentum") for group in groups) else _Keeps((), "")
    return None


def _few(names: object) -> str:
    listed: Sequence[str] = [str(each) for each in names] if isinstance(names, Mapping | Sequence) else [str(names)]
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more
