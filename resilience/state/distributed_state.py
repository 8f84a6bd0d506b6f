"""What of a `DistributedOptimizer` is state: the slices that this rank keeps, by the parameters' names.

    {"state": {name: {"param": slice, "exp_avg": slice, "step": …}}, "param_groups": […],
     "slices": {name: [start, stop]}, "buckets": {"ranks": 4, "dtypes": […], "of": {name: [buffer, bucket, start]}}}

`param` is the main parameter, where the model's is not float32 itself. A slice is one-dimensional; `shardings` says
where it lies in the whole, so that a checkpoint has the tensors of an undivided optimizer. `param_groups` name the
parameters of all ranks. `slices` tells a state of one division from that of another. `buckets` says where the whole of
each parameter of this place lies: who finds the state in buckets (`formats/in_buckets.py`) goes by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

import torch

from resilience.errors import UnsupportedStateError
from resilience.state.distributed_optimizer import DistributedOptimizer, Slice
from resilience.state.flat_sharding import FlatSharding, flat_sharding
from resilience.state.optimizer_groups import NamesById, groups_by_name, groups_differ, load_groups
from resilience.state.sharding import sharding_of

__all__ = ["MAIN", "DistributedOptimizerState"]

MAIN = "param"  # Megatron Core's name for it


class DistributedOptimizerState:
    """One `DistributedOptimizer` as a part of the training state."""

    def __init__(self, optimizer: DistributedOptimizer, position: int, names_by_id: NamesById) -> None:
        self.optimizer = optimizer
        self.position = position
        self._names_by_id = names_by_id
        self._known: dict[torch.nn.Parameter, str] = {}

    def collect(self) -> dict[str, Any]:
        """State by parameter name, of the parameters that this rank keeps something of."""
        state: dict[str, Any] = {}
        for name, part in self._kept():
            main = {MAIN: part.main.detach()} if part.parameter.dtype != torch.float32 else {}
            if found := {**main, **self.optimizer.state_of(part)}:
                state[name] = found
        return {
            "state": state,
            "param_groups": self._groups(),
            "slices": self._slices(),
            "buckets": self._buckets,
        }

    @cached_property
    def _buckets(self) -> dict[str, Any]:
        """How the parameters lie in the buckets, of which there is one row (a buffer) for each dtype."""
        names = [self._names()[each] for each in self.optimizer.laid_out]
        dtypes: dict[str, int] = {}
        of: dict[str, list[int]] = {}
        for bucket in self.optimizer.buckets:
            number = dtypes.setdefault(bucket.dtype, 0)
            buffer = list(dtypes).index(bucket.dtype)
            of |= {names[placed.index]: [buffer, number, placed.start] for placed in bucket.placed}
            dtypes[bucket.dtype] += 1
        return {"ranks": self.optimizer.size, "dtypes": list(dtypes), "of": of}

    def parameters(self) -> dict[str, torch.Tensor]:
        """All parameters by name, also those of which other ranks alone keep something."""
        return {name: parameter for parameter, name in self._names().items()}

    def shardings(self) -> Iterator[tuple[str, FlatSharding]]:
        """Where the slices lie, by the parameter's name. Of a parameter without dimensions nothing is divided."""
        for name, part in self._kept():
            if part.parameter.dim():
                shape = tuple(part.parameter.shape)
                yield name, flat_sharding(shape, part.start, part.stop, sharding_of(part.parameter))

    def differences(self, saved: Any) -> list[str]:
        """Why a saved state cannot be put back here, in words; empty when it can."""
        where = f"optimizer/{self.position}"
        if not isinstance(saved, dict) or not {"state", "param_groups", "slices"} <= saved.keys():
            return [f"{where}: saved from another kind of optimizer, here it is a DistributedOptimizer"]
        found = groups_differ(where, saved["param_groups"], self._groups())
        here, there = self._slices(), saved["slices"]
        for name in dict.fromkeys((*here, *there)):
            if here.get(name) != there.get(name):
                found.append(
                    f"{where}/state/{name}: elements {there.get(name)} were saved, here they are {here.get(name)}"
                )
        found += [
            f"{where}/state/{name}: saved, but nothing of it is kept here"
            for name in saved["state"]
            if name not in here
        ]
        return found

    @torch.no_grad()
    def load(self, saved: dict[str, Any]) -> None:
        """Put back slices and groups; what a saved tensor holds becomes the optimizer's own, not a copy.

        The parameters are the model's to fill: nothing is gathered.
        """
        inner = self.optimizer.inner
        inner.state.clear()
        for name, part in self._kept():
            state = dict(saved["state"].get(name, {}))
            main = state.pop(MAIN, None)
            if main is not None:
                part.main.copy_(main)
            if state:
                inner.state[part.main] = state
        load_groups(self.optimizer.param_groups, saved["param_groups"])

    def _kept(self) -> Iterator[tuple[str, Slice]]:
        names = self._names()
        return ((names[part.parameter], part) for part in self.optimizer.slices())

    def _slices(self) -> dict[str, list[int]]:
        return {name: [part.start, part.stop] for name, part in self._kept()}

    def _groups(self) -> list[dict[str, Any]]:
        """With what the optimizer inside has by default: an undivided one reads these groups too."""
        names = self._names()
        merged = [
            {**inner, **outer}
            for inner, outer in zip(self.optimizer.inner.param_groups, self.optimizer.param_groups, strict=True)
        ]
        return groups_by_name(merged, [[names[each] for each in group["params"]] for group in merged])

    def _names(self) -> Mapping[torch.nn.Parameter, str]:
        if not self._known:
            known = self._names_by_id()
            trained = [each for group in self.optimizer.param_groups for each in group["params"]]
            nameless = [number for number, each in enumerate(trained) if id(each) not in known]
            if nameless:
                raise UnsupportedStateError(
                    f"optimizer/{self.position} is a DistributedOptimizer that trains {len(nameless)} parameters of no "
                    f"model (number {nameless[0]}, …): its slices are stored by the parameters' names.",
                    advice="Give the trainer every module whose parameters are trained.",
                )
            self._known = {each: known[id(each)] for each in trained}
        return self._known
