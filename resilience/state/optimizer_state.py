"""What of an optimizer is state, under which names, and how it is put back to the bit.

Torch's own `load_state_dict` casts state to the parameter's dtype (a float32 momentum of a bfloat16 parameter comes
back rounded) and goes by position; so state is read from and written to `optimizer.state` and `param_groups` directly,
by the parameter's name in the model. Hooks on `Optimizer.state_dict` are not run. An optimizer that brings its own
`state_dict` or `load_state_dict` goes through those, torch's `ZeroRedundancyOptimizer` does not; a
`DistributedOptimizer` has a file of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from operator import is_
from typing import Any, TypeAlias

import torch

from resilience.errors import ConfigError, UnsupportedStateError
from resilience.state.distributed_optimizer import DistributedOptimizer
from resilience.state.distributed_state import DistributedOptimizerState
from resilience.state.optimizer_groups import NamesById, groups_by_name, groups_differ, load_groups


class OptimizerState:
    """One `torch.optim.Optimizer` as a part of the training state."""

    def __init__(self, optimizer: torch.optim.Optimizer, position: int, names_by_id: NamesById) -> None:
        self.optimizer = optimizer
        self.position = position
        self._names_by_id = names_by_id
        self._named: list[list[tuple[torch.Tensor, str]]] = []
        self._grouped: list[list[torch.Tensor]] = []  # the parameters that are named so
        self._outside: set[str] = set()  # names of parameters that belong to no model

    def collect(self) -> dict[str, Any]:
        """State by parameter name, in the order of the groups, whatever order it came into being."""
        live = self._state
        found = [(name, live.get(parameter)) for group in self._names() for parameter, name in group]
        state = {name: kept for name, kept in found if kept is not None}
        outside = {name: each for each, name in self._parameters() if name in self._outside} if self._outside else {}
        tree: dict[str, Any] = {"state": state, "param_groups": self._groups()}
        if outside:  # trained, but part of no model: nobody else would store it
            tree["parameters"] = outside
        shared = {}
        if len(live) != len(state):
            shared = {key: value for key, value in live.items() if not isinstance(key, torch.Tensor)}
        if shared:  # an optimizer may keep state that belongs to no parameter
            tree["shared"] = shared
        return tree

    @property
    def _state(self) -> dict[Any, Any]:
        """The live state, by parameter."""
        return self.optimizer.state

    def parameters(self) -> dict[str, torch.Tensor]:
        """All parameters of this optimizer by name."""
        return {name: parameter for parameter, name in self._parameters()}

    def differences(self, saved: Any) -> list[str]:
        """Why a saved state cannot be put back here, in words; empty when it can."""
        where = f"optimizer/{self.position}"
        if not isinstance(saved, dict) or not {"state", "param_groups"} <= saved.keys():
            return [f"{where}: saved from an object with its own state_dict, here it is a torch optimizer"]
        if "slices" in saved:
            return [f"{where}: saved from a DistributedOptimizer, of which each rank has a part"]
        if saved.get("kept") != self._kept():
            return [f"{where}: the parameters whose state each rank keeps are shared out otherwise"]
        found = groups_differ(where, saved["param_groups"], self._groups())
        known = self.parameters()
        found += [f"{where}/state/{name}: saved, but no parameter here" for name in saved["state"] if name not in known]
        if saved.get("parameters", {}).keys() != self._outside:
            found.append(f"{where}: the parameters that belong to no model are not those that were saved")
        return found

    def load(self, saved: dict[str, Any]) -> None:
        """Put back state and groups; what a saved tensor holds becomes the optimizer's own, not a copy."""
        parameters = self.parameters()
        self._state.clear()
        for name, state in saved["state"].items():
            self._state[parameters[name]] = state
        self._state.update(saved.get("shared", {}))
        load_groups(self.optimizer.param_groups, saved["param_groups"])

    def _kept(self) -> list[str] | None:
        """The parameters of which this rank alone keeps the state; None if every rank keeps all."""
        return None

    def _groups(self) -> list[dict[str, Any]]:
        return groups_by_name(self.optimizer.param_groups, [[name for _, name in named] for named in self._names()])

    def _parameters(self) -> Iterator[tuple[torch.Tensor, str]]:
        for group in self._names():
            yield from group

    def _names(self) -> list[list[tuple[torch.Tensor, str]]]:
        """Parameters and their names, group by group; worked out again when the groups changed."""
        groups = [group["params"] for group in self.optimizer.param_groups]
        same = list(map(len, groups)) == list(map(len, self._grouped))
        if not same or not all(all(map(is_, *both)) for both in zip(groups, self._grouped, strict=True)):
            known = self._names_by_id()
            self._grouped = [list(group) for group in groups]
            self._named = [
                [(each, known.get(id(each), f"param.{index}.{place}")) for place, each in enumerate(group)]
                for index, group in enumerate(groups)
            ]
            self._outside = {name for group in self._named for each, name in group if id(each) not in known}
        return self._named


class RedundancyFreeState(OptimizerState):
    """A `ZeroRedundancyOptimizer` of torch: each rank has the whole state of some of the parameters.

    Its `state_dict` is whole on one rank only, after all have sent it theirs; here each rank gives what it keeps, as
    `kept` says, by name. So nothing is gathered, and the state loads at any number of ranks.
    """

    def __init__(self, optimizer: Any, position: int, names_by_id: NamesById) -> None:
        if getattr(optimizer, "_overlap_with_ddp", False):
            raise UnsupportedStateError(
                f"optimizer/{position} is a ZeroRedundancyOptimizer with overlap_with_ddp, which shares the parameters "
                f"out anew in every process and takes no state from outside.",
                advice="Leave overlap_with_ddp out, or use resilience.DistributedOptimizer.",
            )
        super().__init__(optimizer, position, names_by_id)

    def collect(self) -> dict[str, Any]:
        """Also which parameters the state is of."""
        return {**super().collect(), "kept": self._kept()}

    @property
    def inner(self) -> torch.optim.Optimizer:
        """The optimizer of this rank's parameters. It takes hyperparameters from the outer one at each step."""
        return self.optimizer.optim  # type: ignore[attr-defined, no-any-return]

    @property
    def _state(self) -> dict[Any, Any]:
        return self.inner.state

    def _kept(self) -> list[str] | None:
        mine = {id(each) for group in self.inner.param_groups for each in group["params"]}
        return [name for parameter, name in self._parameters() if id(parameter) in mine]


class OpaqueOptimizerState:
    """An optimizer that brings its own `state_dict` and `load_state_dict`, which alone know what belongs to it."""

    def __init__(self, optimizer: Any, position: int) -> None:
        if not callable(getattr(optimizer, "state_dict", None)) or not callable(
            getattr(optimizer, "load_state_dict", None)
        ):
            raise ConfigError(
                f"optimizer is a {type(optimizer).__name__} without state_dict and load_state_dict.",
                advice="Give a torch.optim.Optimizer, or an object with these two methods.",
            )
        self.optimizer = optimizer
        self.position = position

    def collect(self) -> dict[str, Any]:
        """Whatever the object says its state is."""
        return {"state_dict": self.optimizer.state_dict()}

    def parameters(self) -> dict[str, torch.Tensor]:
        """None by name: the object's own state dict refers to them as it likes."""
        return {}

    def differences(self, saved: Any) -> list[str]:
        """Only whether it was saved from an object of this kind; the rest is the object's to judge."""
        if isinstance(saved, dict) and saved.keys() == {"state_dict"}:
            return []
        return [
            f"optimizer/{self.position}: saved from a torch optimizer, here it is an object with its own state_dict"
        ]

    def load(self, saved: dict[str, Any]) -> None:
        """Hand the state back to the object."""
        self.optimizer.load_state_dict(saved["state_dict"])


#: An optimizer as a part of the training state.
AnyOptimizerState: TypeAlias = OptimizerState | DistributedOptimizerState | OpaqueOptimizerState


def optimizer_state(optimizer: Any, position: int, names_by_id: NamesById) -> AnyOptimizerState:
    """The way in which this optimizer's state is read and written."""
    if isinstance(optimizer, DistributedOptimizer):
        return DistributedOptimizerState(optimizer, position, names_by_id)
    if any(kind.__name__ == "ZeroRedundancyOptimizer" for kind in type(optimizer).__mro__):
        return RedundancyFreeState(optimizer, position, names_by_id)
    ours, base = type(optimizer), torch.optim.Optimizer
    if isinstance(optimizer, base) and (ours.state_dict, ours.load_state_dict) == (
        base.state_dict,
        base.load_state_dict,
    ):
        return OptimizerState(optimizer, position, names_by_id)
    return OpaqueOptimizerState(optimizer, position)
