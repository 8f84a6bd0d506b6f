"""The random states that Megatron Core keeps apart, by name: tensor-parallel ranks draw some numbers alike, others not.

Its tracker is found only where a program has loaded Megatron Core and seeded it; elsewhere there is nothing to keep.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["set_tracker_states", "tracker_states"]

_MODULE = "megatron.core.tensor_parallel.random"


def tracker_states() -> dict[str, torch.Tensor]:
    """A copy of each state by name; none without a tracker that was seeded."""
    tracker = _tracker()
    states = {} if tracker is None else tracker.get_states()
    return {name: _bytes_of(state) for name, state in sorted(states.items())}


def set_tracker_states(saved: Mapping[str, torch.Tensor]) -> None:
    """Put back what `tracker_states` read; nothing where there is no such tracker."""
    tracker = _tracker()
    if tracker is None:
        return
    live = tracker.get_states()
    for name, state in saved.items():
        if isinstance(live.get(name), torch.Generator):  # registered with CUDA graphs, and must stay the same object
            live[name].set_state(state.cpu())
        else:
            live[name] = state.cpu().clone()
    tracker.set_states(live)


def _tracker() -> Any:
    module = sys.modules.get(_MODULE)
    if module is None or not getattr(module, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", False):
        return None
    return module._CUDA_RNG_STATE_TRACKER


def _bytes_of(state: Any) -> torch.Tensor:
    return state.get_state().clone() if isinstance(state, torch.Generator) else state.cpu().clone()
