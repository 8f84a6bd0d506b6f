"""Which random number generators belong to a rank's state, how they are read and how they are put back.

Python's `random`, NumPy's global generator, torch's CPU generator and those of the CUDA devices this process works on;
and the states that Megatron Core keeps apart, where a program uses them.
Generators that a program makes for itself (`torch.Generator()`, `np.random.default_rng()`) are its own: give them as
`extra_state`; a data loader's are kept with the loader.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from resilience.state.megatron_rng import set_tracker_states, tracker_states

HostState = dict[str, Any]


def capture_host() -> HostState:
    """State of the generators of the host: plain values, one numpy array and one tensor, all copies."""
    return {
        "python": random.getstate(),
        # Not the legacy tuple: that only knows MT19937, while a program may have set another bit generator.
        "numpy": np.random.get_state(legacy=False),
        "torch": torch.get_rng_state(),
    }


def restore_host(state: HostState) -> None:
    """Put back what `capture_host` read."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"].cpu())


def capture(devices: Iterable[torch.device] = ()) -> dict[str, Any]:
    """State of all generators of this rank. `cuda` lists one state per device, by rising device index.

    Only devices that this process works on: asking for the others would create a context, and take memory, on each.
    """
    state = {**capture_host(), "cuda": [torch.cuda.get_rng_state(index) for index in cuda_indices(devices)]}
    apart = tracker_states()
    return {**state, "megatron": apart} if apart else state


def restore(state: dict[str, Any], devices: Iterable[torch.device] = ()) -> None:
    """Put back what `capture` read, the n-th device's state on the n-th device."""
    restore_host(state)
    for index, saved in zip(cuda_indices(devices), state["cuda"], strict=True):
        torch.cuda.set_rng_state(saved.cpu(), index)
    set_tracker_states(state.get("megatron", {}))


def cuda_indices(devices: Iterable[torch.device]) -> list[int]:
    """Indices of the CUDA devices among `devices`, and the current one once CUDA is in use."""
    found = {device.index for device in devices if device.type == "cuda" and device.index is not None}
    if found or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found.add(torch.cuda.current_device())
    return sorted(found)


def differences(saved: object, devices: Iterable[torch.device] = ()) -> list[str]:
    """Why a saved state cannot be put back here, in words; empty when it can."""
    if not isinstance(saved, dict) or not {"python", "numpy", "torch", "cuda"} <= saved.keys():
        return ["rng: the save holds no state of the random number generators"]
    here = len(cuda_indices(devices))
    there = len(saved["cuda"]) if isinstance(saved["cuda"], list) else 0
    if here != there:
        return [f"rng/cuda: saved with {there} CUDA devices per rank, this process works on {here}"]
    return []
