"""Where a rank goes on in its random numbers and in the data, when other ranks than before share the work.

Random numbers go on exactly where it is known whose they are; else new ones are derived, and that is said. Data goes on
exactly or not at all: a place that cannot be handed over without leaving out or repeating samples is refused.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import xxhash

from resilience.state import rng
from resilience.state.dataloader import LoaderCursor
from resilience.state.recut import Taken
from resilience.state.saved_world import SavedRank, fingerprint, key_of, tensor_refs, tree_of
from resilience.state.tree import encode

if TYPE_CHECKING:
    from resilience.state.training_state import TrainingState

__all__ = ["recut_loader", "recut_rng"]

Found = Sequence[tuple[SavedRank, Any]]


def recut_rng(taken: Taken, state: TrainingState, found: Found, iteration: int) -> Any:
    """The state of each generator of the rank that stood here; where it is not known which, a derived one.

    Exact where all saved ranks had the same, or all those at this place of tensor and pipeline parallelism (sizes
    unchanged), or where at most the experts are shared out otherwise. Derived states differ exactly between those ranks
    whose generators differ now, before the load: what a program seeds alike (over tensor parallelism) stays alike.
    """
    derived = _derived(taken, state, found[0], iteration)
    exact = {name: _known(taken, [(rank, its.get(name)) for rank, its in found]) for name in derived}
    exact |= _apart(taken, found)
    new = [name for name, its in exact.items() if its is None]
    if new:
        taken.notes.append(
            f"random numbers ({', '.join(new)}): not those of an undisturbed run; each rank's generators were set from "
            f"the saved state of rank {found[0][0].rank}, iteration {iteration} and what they were seeded with here"
        )
    return {name: derived.get(name) if its is None else taken.take(*its) for name, its in exact.items()}


def _apart(taken: Taken, found: Found) -> dict[str, tuple[SavedRank, Any]]:
    """What Megatron Core keeps apart, where it is known whose it is; else it stays as it is here, and that is said."""
    kept = [(rank, its["megatron"]) for rank, its in found if its.get("megatron")]
    known = _known(taken, kept) if kept else None
    if kept and known is None:
        taken.notes.append("random numbers that Megatron Core keeps apart: as they were seeded here, not the save's")
    return {} if known is None else {"megatron": known}


def _known(taken: Taken, found: Found) -> tuple[SavedRank, Any] | None:
    """The rank whose generator's state is the one to go on with here; None if that is not known."""
    before, now = taken.world.layout, taken.place
    here: Found = []
    if before.same_sizes(now, "tp", "pp"):
        here = [each for each in found if each[0].place.shard_coordinate == now.shard_coordinate]
        if before.same_sizes(now, "dp", "cp"):
            mine = (now.dp_rank, now.cp_rank)
            return next((each for each in here if (each[0].place.dp_rank, each[0].place.cp_rank) == mine), None)
    for candidates in (found, here):
        kinds = [rank.canonical(its) for rank, its in candidates]
        if kinds and all(kind == kinds[0] for kind in kinds):
            return candidates[0]
    return None


def _derived(taken: Taken, state: TrainingState, saved: tuple[SavedRank, Any], iteration: int) -> dict[str, Any]:
    """The generators' states by name; their tensors go into `taken`."""
    rank, theirs = saved
    written, tensors = encode({"rng": rng.capture(state.devices)})
    mine, of_mine = tree_of(written)["rng"], {key: fingerprint(tensor) for key, tensor in tensors}
    seeds = {
        name: _seed(name, iteration, rank.canonical(theirs.get(name)), _contents(mine[name], of_mine)) for name in mine
    }
    derived = {
        "python": random.Random(seeds["python"]).getstate(),
        "numpy": np.random.RandomState(np.random.MT19937(seeds["numpy"])).get_state(legacy=False),
        "torch": torch.Generator().manual_seed(seeds["torch"]).get_state(),
        "cuda": [
            torch.Generator(torch.device("cuda", index)).manual_seed(seeds["cuda"] ^ number).get_state()
            for number, index in enumerate(rng.cuda_indices(state.devices))
        ],
    }
    values, made = encode({"rng": derived})
    taken.tensors.update(made)
    states: dict[str, Any] = tree_of(values)["rng"]
    return states


def _contents(written: Any, digests: Mapping[str, str]) -> Any:
    return [written, [digests[key_of(ref)] for ref in tensor_refs(written)]]


def _seed(*parts: Any) -> int:
    return xxhash.xxh3_64_intdigest(repr(parts).encode()) >> 1  # torch takes 63 bits


def recut_loader(taken: Taken, loader: LoaderCursor, found: Found) -> Any:
    """The place of the saved rank that drew this rank's share of the data, or the same place in other shares."""
    if loader.loader is None:
        return None
    drawing = [(rank, place) for rank, place in found if place is not None]
    if not drawing:
        taken.problems.append("dataloader: saved without a data loader, here one is given")
        return None
    before, now = taken.world.layout, taken.place
    if before.dp == now.dp:
        same_share = [each for each in drawing if each[0].place.dp_rank == now.dp_rank] or drawing
        nearest = [each for each in same_share if each[0].place.shard_coordinate == now.shard_coordinate]
        chosen = (nearest or same_share)[0]
        if _draws(chosen[1]) != {draws for _, place in same_share for draws in _draws(place)}:
            taken.problems.append(f"dataloader: the saved ranks of data-parallel place {now.dp_rank} differ in theirs")
        return taken.take(*chosen)
    if len({draws for _, place in drawing for draws in _draws(place)}) != 1:
        taken.problems.append("dataloader: the data-parallel ranks of the save had not drawn equally many batches")
        return None
    moved = loader.moved(drawing[0][1])
    if isinstance(moved, str):
        taken.problems.append(
            f"dataloader: its place was shared by {before.dp} data-parallel ranks, here by {now.dp}: {moved}"
        )
        return None
    skipped = moved["sharing"]["skipped"]
    where = f"{skipped} samples" if skipped else f"{moved['drawn_in_epoch']} batches"
    taken.notes.append(f"data: goes on behind the same samples, {where} into their epoch")
    return {**taken.take(*drawing[0]), **moved}


def _draws(place: Mapping[str, Any]) -> set[tuple[Any, Any]]:
    return {(place.get("epoch"), place.get("drawn_in_epoch"))}
