"""A save and a restore in memory: what arena, shard file and exchange do in between, without them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from resilience.state import Collected, SavedItem, TrainingState
from resilience.state.tensors import byte_view


@dataclass(frozen=True)
class Save:
    """What a save holds: values, index, and the bytes of each item that is no alias."""

    values: bytes
    index: dict[str, SavedItem]
    content: dict[str, bytes]


def save_of(collected: Collected) -> Save:
    """Copy a collected state out of its live tensors."""
    index = {item.key: SavedItem.of(item) for item in collected.items}
    content = {item.key: byte_view(item.tensor).numpy().tobytes() for item in collected.items if item.alias_of is None}
    return Save(collected.values, index, content)


def restore(state: TrainingState, save: Save) -> None:
    """Load a save into live objects, as the restart does."""
    plan = state.plan_load(save.values, save.index)
    for key, target in plan.targets:
        item = save.index[key]
        assert item.alias_of is None
        assert tuple(target.shape) == item.shape
        assert target.dtype == item.dtype
        if target.numel():
            filled = torch.frombuffer(bytearray(save.content[key]), dtype=torch.uint8).view(item.dtype)
            with torch.no_grad():
                target.copy_(filled.reshape(item.shape))
    plan.finish()
