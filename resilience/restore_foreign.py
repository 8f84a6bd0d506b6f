"""What of another program's checkpoint is taken beside tensors and counters: modules' extra state, and random numbers.

What is there for this very place is taken; whatever else there is stays as it is here, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from resilience.errors import CorruptCopyError
from resilience.formats.megatron_objects import extra_state_key, rng_from_megatron, rng_grids, rng_key
from resilience.formats.protocol import StateReader
from resilience.state import rng
from resilience.state.items import EXTRA_STATE
from resilience.state.training_state import TrainingState

__all__ = ["foreign_extra_state", "foreign_rng"]

Tell = Callable[..., None]


def foreign_extra_state(reader: StateReader, state: TrainingState, tell: Tell) -> list[dict[str, Any]]:
    """Of each model, the entries of extra state that the checkpoint has an object for."""
    taken: list[dict[str, Any]] = []
    refused: list[str] = []
    for model in state.models:
        said = model.places.objects
        entries: dict[str, Any] = {}
        for name in model.collect() if reader.objects else ():
            key = extra_state_key(name, said[name].key if name in said else None, reader.objects)
            if key is None or not name.endswith(EXTRA_STATE):
                continue
            try:
                entries[name] = reader.read_object(key)
            except CorruptCopyError:
                refused.append(key)
        taken.append(entries)
    if refused:
        what = f"{len(refused)} objects of extra state in {reader.folder} stay unread ({', '.join(refused[:5])}, …)"
        tell("warning", what=what, advice="They hold more than tensors and plain values: what is here stays as it is.")
    return taken


def foreign_rng(reader: StateReader, state: TrainingState, tell: Tell) -> dict[str, Any]:
    """The random state that stands for this rank's place; nothing, with a word, if there is none or it does not fit."""
    grids = rng_grids(reader.objects)
    layout = state.layout
    if not grids or layout is None or not layout.is_resolved:
        return {}
    key = rng_key(layout)
    if key not in reader.objects:
        what = (
            f"{reader.folder} has random state for {' and '.join(grids)}, and none for {layout.in_words()}: random "
            f"numbers go on as they are here"
        )
        tell("warning", what=what, advice="Resume under the same tensor and pipeline parallelism to have them.")
        return {}
    data_rank = (layout.dp_rank or 0) * layout.cp + (layout.cp_rank or 0)
    found = rng_from_megatron(reader.read_object(key), data_rank, f"{key} in {reader.folder}")
    unlike = rng.differences(found, state.devices)
    if unlike:
        tell("warning", what=f"{key} in {reader.folder} does not fit: {'; '.join(unlike)}", advice="")
        return {}
    return found
