"""What a rank of one layout would have saved, worked out from what the ranks of another layout did save.

    the save's ranks (trees, tensors of their own) + what is stored of whole tensors + the live tree of this rank
      → a tree and tensors of this rank's own, to be loaded like any others

The model and the optimizer's state go by name: the live tree says what is wanted, `LoadPlan` cuts this rank's part out
of the whole. Everything that has no place in a whole must be equal on all ranks that could be meant, else it is
refused: nothing is taken from one rank at random. `recut_optimizer.py` and `recut_place.py` hold the harder parts.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from resilience.errors import LayoutMismatchError
from resilience.state.parallel_layout import ParallelLayout
from resilience.state.saved_world import SavedRank, SavedWorld, key_of, tensor_refs, tree_of
from resilience.state.tensors import dtype_name
from resilience.state.tree import encode, path_component

if TYPE_CHECKING:
    from resilience.state.training_state import TrainingState

__all__ = ["DIVISIONS", "Recut", "Taken", "is_cut_alike", "recut"]

_SHOWN = 20
_MODEL_PARALLEL = ("tp", "pp", "ep")
#: What says how an optimizer's state is shared out: elements of parameters, or whole parameters.
DIVISIONS = ("slices", "kept")


@dataclass(frozen=True)
class Recut:
    """What this rank would have saved. `notes`: what is not as in a run that was never moved, in words."""

    values: bytes
    tensors: Mapping[str, torch.Tensor]
    notes: tuple[str, ...]


@dataclass
class Taken:
    """What is being put together, and what stands in the way."""

    world: SavedWorld
    place: ParallelLayout
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def counterparts(self) -> list[SavedRank]:
        """The saved ranks that held the same parts of the model: none if these are cut otherwise now."""
        if not self.world.layout.same_sizes(self.place, *_MODEL_PARALLEL):
            return []
        mine = (self.place.tp_rank, self.place.pp_rank, self.place.ep_rank)
        return [r for r in self.world.ranks if (r.place.tp_rank, r.place.pp_rank, r.place.ep_rank) == mine]

    def one(self, where: str, found: Sequence[tuple[SavedRank, Any]]) -> Any:
        """The piece of the tree that all these ranks mean, or all counterparts among them; else a problem and None."""
        counterparts = self.counterparts
        narrowed = [(rank, written) for rank, written in found if rank in counterparts]
        for candidates in (found, narrowed):
            kinds = [rank.canonical(written) for rank, written in candidates]
            if kinds and all(kind == kinds[0] for kind in kinds):
                return self.take(*candidates[0])
        kinds = [rank.canonical(written) for rank, written in found]
        other = next(number for number, kind in enumerate(kinds) if kind != kinds[0])
        self.problems.append(f"{where}: differs between the saved ranks {found[0][0].rank} and {found[other][0].rank}")
        return None

    def take(self, rank: SavedRank, written: Any) -> Any:
        """A piece of a rank's tree with its own tensors."""
        for ref in tensor_refs(written):
            key = key_of(ref)
            if key in rank.digests:
                self.tensors[key] = self.world.tensor(rank, key)
        return copy.deepcopy(written)


def is_cut_alike(state: TrainingState, saved_values: bytes, saved_layout: ParallelLayout | None) -> bool:
    """Whether what this very rank saved fits it as it is: the same layout, DTensor placements and optimizer slices."""
    if saved_layout is not None and saved_layout != state.layout:
        return False
    saved, live = tree_of(saved_values), tree_of(encode(state.tree(("model", "optimizer")))[0])
    if "optimizer" in saved and _divisions(saved["optimizer"]) != _divisions(live["optimizer"]):
        return False
    before, now = _placements(saved.get("model")), _placements(live.get("model"))
    return all(now[key] == placed for key, placed in before.items() if key in now)


def recut(state: TrainingState, world: SavedWorld, parts: Collection[str], iteration: int) -> Recut:
    """What this rank would have saved at `iteration`. `state.layout` is resolved. Changes nothing live.

    LayoutMismatchError lists what the saved ranks do not agree about, or cannot hand over to other ranks.
    """
    from resilience.state.recut_optimizer import recut_optimizers
    from resilience.state.recut_place import recut_loader, recut_rng

    assert state.layout is not None, "resolved at the start"
    taken = Taken(world, state.layout)
    taken.notes.append(
        f"saved by {len(world.ranks)} ranks ({world.layout.in_words()}), resumed by {state.layout.world_size} "
        f"({state.layout.in_words()})"
    )
    live = tree_of(encode(state.tree({"model", "optimizer"} & set(parts)))[0])
    tree: dict[str, Any] = {}
    if "model" in parts:
        tree["model"] = [_model(taken, position, entries) for position, entries in enumerate(live["model"])]
    if "optimizer" in parts and _found(world, "optimizer"):
        tree["optimizer"] = recut_optimizers(taken, state, live["optimizer"])
    for part in ("scheduler", "scaler", "train_state"):
        if part in parts and (found := _found(world, part)):
            tree[part] = taken.one(part, found)
    if "extra" in parts and (found := _found(world, "extra")):
        names = dict.fromkeys(name for _, entries in found for name in entries)
        tree["extra"] = {name: taken.one(f"extra/{name}", _inside(found, name)) for name in names}
        _place_extra(tree["extra"], state)
    if "dataloader" in parts and (found := _found(world, "dataloader")):
        tree["dataloader"] = recut_loader(taken, state.loader, found)
    if "rng" in parts and (found := _found(world, "rng")):
        tree["rng"] = recut_rng(taken, state, found, iteration)
    _raise_if_any(taken.problems)
    tree["layout"] = state.layout.to_dict()
    values = json.dumps(tree, allow_nan=False, separators=(",", ":")).encode("ascii")
    return Recut(values, taken.tensors, tuple(taken.notes))


def _model(taken: Taken, position: int, live: Mapping[str, Any]) -> dict[str, Any]:
    """The entries that are wanted here and that the save has; which are lacking is judged by whoever loads."""
    world, entries = taken.world, dict[str, Any]()
    said: list[str] = []
    for name, mine in live.items():
        key = f"model/{position}/{path_component(name)}"
        held = [(rank, found[name]) for rank, found in _models(world, position) if name in found]
        if not _is_tensor(mine):
            if held:
                entries[name] = taken.one(key, held)
        elif world.alone(key):
            chosen = _of_a_counterpart(taken, key)
            if chosen is not None:
                taken.tensors[key] = world.tensor(chosen, key)
                entries[name] = {**mine, "dtype": dtype_name(taken.tensors[key].dtype)}
                said.append(name)
        elif key in world.index:
            entries[name] = {**mine, "dtype": dtype_name(world.index[key].dtype)}
    if said:
        taken.notes.append(f"differed from rank to rank, and are those of the lowest that held them: {_few(said)}")
    return entries


def _place_extra(extra: Mapping[str, Any], state: TrainingState) -> None:
    """A DTensor is one here if its live namesake is, and as that is; without a namesake, if any tensor is one here."""
    live = tree_of(encode(state.tree(("model", "extra")))[0])
    namesakes = {key_of(ref): ref.get("placements") for ref in tensor_refs(live.get("extra"))}
    any_here = any(ref.get("placements") for ref in tensor_refs(live))
    for ref in tensor_refs(extra):
        if key_of(ref) in namesakes:
            placed = namesakes[key_of(ref)]
        else:
            placed = ref.get("placements") if any_here else None
        ref.pop("placements", None)
        if placed is not None:
            ref["placements"] = placed


def _of_a_counterpart(taken: Taken, key: str) -> SavedRank | None:
    """The lowest rank that held the same part of the model and a tensor of its own under this key."""
    alone = taken.world.alone(key)
    counterparts = taken.counterparts
    if chosen := next((rank for rank in alone if rank in counterparts), None):
        return chosen
    ranks = ", ".join(str(rank.rank) for rank in alone[:4])
    taken.problems.append(
        f"{key}: differs between the saved ranks ({ranks}, …), and nothing says which part of a whole each one's is"
    )
    return None


def _models(world: SavedWorld, position: int) -> list[tuple[SavedRank, Mapping[str, Any]]]:
    found = []
    for rank, models in _found(world, "model"):
        if isinstance(models, list) and len(models) > position and isinstance(models[position], dict):
            found.append((rank, models[position]))
    return found


def _found(world: SavedWorld, part: str) -> list[tuple[SavedRank, Any]]:
    return [(rank, rank.tree[part]) for rank in world.ranks if part in rank.tree]


def _inside(found: Sequence[tuple[SavedRank, Any]], name: str) -> list[tuple[SavedRank, Any]]:
    return [(rank, entries.get(name)) for rank, entries in found]


def _is_tensor(written: Any) -> bool:
    return isinstance(written, dict) and "$tensor" in written


def _placements(models: Any) -> dict[str, Any]:
    return {str(ref.get("$tensor")): ref.get("placements") for ref in tensor_refs(models)}


def _divisions(optimizers: Any) -> list[Any]:
    """How each optimizer was divided over the ranks: nothing where it was not."""
    return [{part: each.get(part) for part in DIVISIONS if isinstance(each, dict)} for each in optimizers]


def _raise_if_any(problems: Sequence[str]) -> None:
    if not problems:
        return
    listed = "".join(f"\n  {problem}" for problem in problems[:_SHOWN])
    more = f"\n  … and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    raise LayoutMismatchError(
        f"The save was made under another layout, and cannot be loaded under this one:{listed}{more}\n",
        advice="Resume under the layout of the save, or see docs/resharding.md.",
    )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
