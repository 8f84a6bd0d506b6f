"""What other ways take to put the whole state back into a new process's tensors, which are there and were touched.

Each saves its state in one process and loads it in a later one, by its quickest way on a CPU: from making its own
objects to the last byte in place. What it proves of the bytes is its own affair.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint import load, save

from benchmarks.rank import Bench, Place, timed
from benchmarks.state import OTHER, SAVED, Weights

__all__ = ["PuttingBack", "State", "Way", "fill", "make"]


State = dict[str, torch.Tensor]


class Way(Protocol):
    """Collective, both of them."""

    def save(self, state: State) -> None:
        """Leave it behind for a later process."""
        ...

    def load(self, state: State) -> None:
        """Fill these tensors with what an earlier process left."""
        ...


class PuttingBack:
    """Bench of several ways, each of which is made when it is measured: that is part of a restore."""

    def __init__(self, place: Place, ways: Mapping[str, Callable[[Place], Way]]) -> None:
        self._place = place
        self._ways = ways
        place.node_directory.mkdir(exist_ok=True)

    def measures(self) -> dict[str, Callable[..., dict[str, Any]]]:
        loads = {f"load_{name}": partial(self._load, make_way) for name, make_way in self._ways.items()}
        saves = {f"save_{name}": partial(self._save, make_way) for name, make_way in self._ways.items()}
        return loads | saves

    def _save(self, make_way: Callable[[Place], Way]) -> dict[str, Any]:
        make_way(self._place).save(self._state(SAVED))
        return {}

    def _load(self, make_way: Callable[[Place], Way]) -> dict[str, Any]:
        state = self._state(OTHER)
        seconds = timed(lambda: make_way(self._place).load(state))
        for name, tensor in self._state(SAVED).items():
            if not torch.equal(state[name], tensor):
                raise RuntimeError(f"{name} is not what was saved")
        return {"seconds": seconds}

    def _state(self, value: float) -> State:
        model = Weights(self._place.settings, value=value, whole=True)
        return {f"layers.{position}": layer.detach() for position, layer in enumerate(model.layers)}

    def close(self) -> None:
        """Nothing stays open."""


def fill(state: State, loaded: Mapping[str, torch.Tensor]) -> None:
    """Copy what was loaded into memory of its own to where it belongs."""
    torch._foreach_copy_(list(state.values()), [loaded[name] for name in state])


class _TorchFile:
    """One file per rank, mapped."""

    def __init__(self, place: Place) -> None:
        self._path = place.node_directory / "torch.pt"

    def save(self, state: State) -> None:
        torch.save(state, self._path)

    def load(self, state: State) -> None:
        fill(state, torch.load(self._path, mmap=True, weights_only=True))


class _Dcp:
    """One folder for both ranks."""

    def __init__(self, place: Place) -> None:
        self._folder = place.directory / "dcp"

    def save(self, state: State) -> None:
        save(state, checkpoint_id=self._folder)

    def load(self, state: State) -> None:
        load(state, checkpoint_id=self._folder)


def make(place: Place) -> Bench:
    return PuttingBack(place, {"torch": _TorchFile, "dcp": _Dcp})
