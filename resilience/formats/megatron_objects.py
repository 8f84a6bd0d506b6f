"""What Megatron stores beside tensors, in its own names and forms: random state, and modules' extra state.

    rng_state/shard_<pp>.<tp>_<PP>.<TP>        one per place of the model, from its first data-parallel rank; with
                                               expert parallelism one per rank: shard_<pp>.<tp>.<dp>_<PP>.<TP>.<DP>
    <name>._extra_state/shard_<layer>_<layers> of what Transformer Engine's modules keep; None where they keep nothing

An object's grid cannot be cut anew: a reader has to ask for the very key.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from resilience.errors import CorruptCopyError
from resilience.state.parallel_layout import ParallelLayout
from resilience.state.plain import plain_parts

__all__ = [
    "RNG",
    "extra_state_key",
    "extra_states",
    "megatron_rng",
    "rng_from_megatron",
    "rng_grids",
    "rng_key",
    "writes_rng",
]

RNG = "rng_state"
_AXES = ("pp", "tp", "dp × cp")
_RNG_KEY = re.compile(rf"{RNG}/shard_([\d.]+)_([\d.]+)")
_LAYER = re.compile(r"(.*\.)?layers\.(\d{1,6})\.(.+)", re.DOTALL)


def rng_key(place: ParallelLayout) -> str:
    """Under which key the random state of this place stands; `place` is resolved."""
    at, of = [place.pp_rank, place.tp_rank], [place.pp, place.tp]
    if place.ep > 1:
        at, of = [*at, _data_rank(place)], [*of, (place.dp or 1) * place.cp]
    return f"{RNG}/shard_{'.'.join(map(str, at))}_{'.'.join(map(str, of))}"


def writes_rng(place: ParallelLayout) -> bool:
    """Whether this rank's is the one that is stored for its place."""
    return place.ep > 1 or _data_rank(place) == 0


def rng_grids(keys: Collection[str]) -> list[str]:
    """For which sizes a checkpoint has random state, in words: `pp=1, tp=2`."""
    found = {tuple(match[2].split(".")) for key in keys if (match := _RNG_KEY.fullmatch(key))}
    return [", ".join(f"{name}={size}" for name, size in zip(_AXES, grid, strict=False)) for grid in sorted(found)]


def _data_rank(place: ParallelLayout) -> int:
    return (place.dp_rank or 0) * place.cp + (place.cp_rank or 0)


def megatron_rng(values: bytes, tensor_of: Callable[[str], torch.Tensor | None]) -> dict[str, Any]:
    """The random state of a save in Megatron's names and forms; nothing where the save left it out.

    Without a GPU there is no `cuda_rng_state`, and without Megatron's tracker there are no `rng_tracker_states`.
    """
    rng = plain_parts(values, ("rng",), tensor_of).get("rng") if values else None
    if not rng:
        return {}
    numpy = rng["numpy"]
    if numpy["bit_generator"] == "MT19937":
        state = numpy["state"]
        numpy = ("MT19937", state["key"].numpy(), state["pos"], numpy["has_gauss"], numpy["gauss"])
    found = {"random_rng_state": rng["python"], "np_rng_state": numpy, "torch_rng_state": rng["torch"]}
    found |= {"cuda_rng_state": rng["cuda"][0]} if rng["cuda"] else {}
    return found | ({"rng_tracker_states": dict(rng["megatron"])} if "megatron" in rng else {})


def rng_from_megatron(stored: Any, data_rank: int, what: str) -> dict[str, Any]:
    """What `state.rng.capture` would have given; CorruptCopyError if it is no random state.

    `stored`: a list of one, or of one for each data-parallel rank (`data_parallel_random_init`).
    """
    try:
        state = stored[data_rank if len(stored) > 1 else 0]
        name, key, pos, has_gauss, gauss = state["np_rng_state"]
        numpy = {"bit_generator": name, "state": {"key": key, "pos": pos}, "has_gauss": has_gauss, "gauss": gauss}
        cuda, trackers = state.get("cuda_rng_state"), dict(state.get("rng_tracker_states") or {})
        # at an address of its own: torch takes any for aligned, and dies where it is not
        rng = {"python": state["random_rng_state"], "numpy": numpy, "torch": state["torch_rng_state"].clone()}
        # Tried on generators of nobody: once the load is under way it is too late to refuse.
        random.Random().setstate(rng["python"])
        np.random.RandomState().set_state(numpy)
        torch.Generator().set_state(rng["torch"])
        tensors = [*trackers.values(), *([] if cuda is None else [cuda])]
        if not all(isinstance(each, torch.Tensor) and each.dtype == torch.uint8 for each in tensors):
            raise TypeError("a state is no tensor of bytes")
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise CorruptCopyError(f"{what} is no random state ({type(error).__name__}: {str(error)[:200]}).") from error
    rng["cuda"] = [] if cuda is None else [cuda]
    return rng | ({"megatron": trackers} if trackers else {})


def extra_states(
    values: bytes, tensor_of: Callable[[str], torch.Tensor | None], keys: Sequence[Mapping[str, str]]
) -> dict[str, Any]:
    """Of the models' entries in a save, those that `keys` (one for each model: entry → key) names, by key."""
    if not any(keys):
        return {}
    models = plain_parts(values, ("model",), tensor_of).get("model", [])
    found: dict[str, Any] = {}
    for entries, wanted in zip(models, keys, strict=False):
        found |= {key: entries[name] for name, key in wanted.items() if name in entries}
    return found


def extra_state_key(name: str, said: str | None, stored: Collection[str]) -> str | None:
    """The key of an entry's extra state in a checkpoint that has it; `said`: the key that the model names."""
    candidates = [said, f"{name}/shard_0_1"]
    if match := _LAYER.fullmatch(name):
        start = f"{match[1] or ''}layers.{match[3]}/shard_{match[2]}_"
        candidates += [key for key in stored if key.startswith(start)]
    return next((key for key in candidates if key is not None and key in stored), None)
