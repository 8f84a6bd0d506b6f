"""An optimizer's state under another layout: hyperparameters and state by the names of the parameters.

Which parameters are in which group is as it is here; what stands in a group was saved by every rank that held one of
its parameters. State of a parameter's own shape is cut as the parameter is; other state must be equal everywhere.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from resilience.state.recut import DIVISIONS, Taken
from resilience.state.saved_world import SavedRank, fingerprint, key_of, tensor_refs, tree_of
from resilience.state.tree import encode

if TYPE_CHECKING:
    from resilience.state.training_state import TrainingState

__all__ = ["recut_optimizers"]


def recut_optimizers(taken: Taken, state: TrainingState, live: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The trees of all optimizers; problems go into `taken`."""
    models = tree_of(encode(state.tree(("model",)))[0])["model"]
    placements = {key_of(ref): ref.get("placements") for ref in tensor_refs(models)}
    return [_Optimizer(taken, state, position, mine, placements).tree() for position, mine in enumerate(live)]


class _Optimizer:
    """One optimizer: what this rank has now (`live`), and what the saved ranks had in its position."""

    def __init__(
        self,
        taken: Taken,
        state: TrainingState,
        position: int,
        live: Mapping[str, Any],
        placements: Mapping[str, Any],
    ) -> None:
        self._taken = taken
        self._state = state
        self._where = f"optimizer/{position}"
        self._live = live
        self._placements = placements
        self._saved: list[tuple[SavedRank, Mapping[str, Any]]] = []
        for rank in taken.world.ranks:
            optimizers = rank.tree.get("optimizer")
            if isinstance(optimizers, list) and len(optimizers) > position:
                self._saved.append((rank, optimizers[position]))

    def tree(self) -> dict[str, Any]:
        if not self._saved:
            return {}  # the check of the load says that there were fewer
        if "param_groups" not in self._live or any("param_groups" not in saved for _, saved in self._saved):
            whole: dict[str, Any] = self._taken.one(self._where, self._saved) or {}
            return whole
        wanted = [name for group in self._live["param_groups"] for name in group["params"]]
        divided = {part: self._live[part] for part in DIVISIONS if part in self._live}
        for kept in divided.values():  # a rank has state of what it keeps elements of
            wanted = [name for name in wanted if name in kept]
        tree = {"state": self._states(wanted), "param_groups": self._groups(), **divided}
        for part in ("parameters", "shared"):  # what belongs to no parameter of a model
            found = [(rank, saved.get(part)) for rank, saved in self._saved]
            if any(written is not None for _, written in found) or part in self._live:
                self._add_nameless(tree, part, found)
        return tree

    def _add_nameless(self, tree: dict[str, Any], part: str, found: list[tuple[SavedRank, Any]]) -> None:
        """Parameters of no model are known by their position, which holds where the model is cut alike only."""
        counterparts = self._taken.counterparts
        if part == "parameters" and not counterparts:
            self._taken.problems.append(
                f"{self._where}: trains parameters of no model, which have no names that hold in another layout"
            )
            return
        written = self._taken.one(f"{self._where}/{part}", [each for each in found if each[0] in counterparts] or found)
        if written is not None:
            tree[part] = written

    # -- groups -------------------------------------------------------------------------------------------------------

    def _groups(self) -> list[dict[str, Any]]:
        return [self._group(number, group) for number, group in enumerate(self._live["param_groups"])]

    def _group(self, number: int, live: Mapping[str, Any]) -> dict[str, Any]:
        """The hyperparameters that all saved ranks had for the parameters that are in this group here."""
        where = f"{self._where}/param_groups/{number}"
        names = set(live["params"])
        found = [
            (rank, group)
            for rank, saved in self._saved
            for index, group in enumerate(saved["param_groups"])
            if names & set(group["params"]) or (not names and index == number)
        ]
        if not found:
            return {name: value for name, value in live.items() if not list(tensor_refs(value))}
        hyperparameters: dict[str, Any] = {}
        for name in found[0][1]:
            if name == "params":
                continue
            values = [(rank, self._materialised(rank, group.get(name))) for rank, group in found]
            if any(value != values[0][1] for _, value in values):
                ranks = sorted({rank.rank for rank, _ in values})
                self._taken.problems.append(
                    f"{where}: {name} was not the same for its parameters ({', '.join(sorted(names)[:3])}, …) on the "
                    f"saved ranks {ranks[:8]}"
                )
            hyperparameters[name] = self._tensors_of_its_own(found[0][0], found[0][1].get(name), f"{where}/{name}")
        return {**hyperparameters, "params": list(live["params"])}

    def _materialised(self, rank: SavedRank, written: Any) -> Any:
        """Comparable over ranks and groups: a tensor by its content."""
        refs = list(tensor_refs(written))
        if not refs:
            return written
        return [fingerprint(self._taken.world.tensor(rank, key_of(ref))) for ref in refs]

    def _tensors_of_its_own(self, rank: SavedRank, written: Any, where: str) -> Any:
        """A hyperparameter that is a tensor (a compiled step's learning rate) is given the name that it has here."""
        refs = list(tensor_refs(written))
        if not refs:
            return written
        if written is not refs[0]:
            self._taken.problems.append(f"{where}: a hyperparameter that holds tensors cannot be loaded here")
            return None
        self._taken.tensors[where] = self._taken.world.tensor(rank, key_of(written))
        return {**written, "$tensor": where}

    # -- state of parameters ------------------------------------------------------------------------------------------

    def _states(self, wanted: Collection[str]) -> dict[str, Any]:
        states: dict[str, Any] = {}
        for name in wanted:
            found = [(rank, saved["state"][name]) for rank, saved in self._saved if name in saved["state"]]
            if not found:
                continue
            state = self._taken.one(f"{self._where}/state/{name}", found)
            if state is None:
                continue
            for ref in tensor_refs(state):
                self._place(name, ref)
            states[name] = state
        return states

    def _place(self, name: str, ref: dict[str, Any]) -> None:
        """Cut as the parameter is, if it has the parameter's shape; else the same whole on every rank."""
        key, model_key = key_of(ref), self._state.model_key(name)
        stored, parameter = self._taken.world.index.get(key), self._taken.world.index.get(model_key)
        ref.pop("placements", None)
        if key in self._taken.tensors or stored is None or parameter is None:
            return
        placed = self._placements.get(model_key)
        if stored.global_shape == parameter.global_shape and placed is not None:
            ref["placements"] = placed
