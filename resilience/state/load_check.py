"""Whether a save is of such a state as is live here, and if not, in what they differ.

Pure comparison: names, dtypes, shapes, sharding, and which parts are there. Nothing live is changed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from resilience.errors import CorruptCopyError, LayoutMismatchError
from resilience.state import rng
from resilience.state.items import Item, SavedItem, blocks_of
from resilience.state.model_state import ModelState
from resilience.state.sharding import may_be_cut
from resilience.state.tensors import TensorRef, dtype_name
from resilience.state.train_state import TrainState
from resilience.state.tree import path_component
from resilience.state.tree_decoder import finished

if TYPE_CHECKING:
    from resilience.state.training_state import TrainingState

_SHOWN = 20


def check_index(refs: Mapping[str, TensorRef], index: Mapping[str, SavedItem]) -> None:
    """Raise CorruptCopyError unless every tensor that the values refer to is in the index, and as they say it is."""
    for key, ref in refs.items():
        blocks = blocks_of(key, index)
        if not blocks:
            raise CorruptCopyError(f"The values refer to {key}, which the save does not hold.")
        for item in blocks:
            if item.dtype != ref.dtype:
                raise CorruptCopyError(f"{key} is {ref.dtype} in the values and {item.dtype} in the index.")
            if ref.placements is None and item.shape != item.global_shape and not may_be_cut(key):
                raise CorruptCopyError(f"{key} is whole in the values and a shard in the index.")
            root = item if item.alias_of is None else index.get(item.alias_of)
            if root is None or root.alias_of is not None or (root.dtype, root.shape) != (item.dtype, item.shape):
                raise CorruptCopyError(f"{key} shares its bytes with {item.alias_of}, which is not there or unlike it.")
        if ref.numpy_dtype is not None:
            finished(ref, torch.empty(blocks[0].shape, dtype=ref.dtype))  # refuses elements that cannot be


def raise_if_unlike(differences: list[str]) -> None:
    """Raise LayoutMismatchError with the first of the differences, if there are any."""
    if not differences:
        return
    more = f"\n  … and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
    listed = "".join(f"\n  {difference}" for difference in differences[:_SHOWN])
    raise LayoutMismatchError(
        f"The save does not fit what is to be loaded ({len(differences)} differences):{listed}{more}\n",
        advice="Build the same model, optimizer, scheduler and loader as in the run that saved, or start a new run.",
    )


def differences(
    state: TrainingState,
    tree: dict[str, Any],
    index: Mapping[str, SavedItem],
    live: Mapping[str, Item],
    parts: Collection[str],
) -> list[str]:
    """What of the saved `tree` (with a TensorRef for each tensor) does not fit the live `state`, in words."""
    found = [f"{part}: not in the save" for part in parts if part not in tree]
    saved = {part: tree[part] for part in parts if part in tree}
    if "model" in saved:
        found += _count("model", saved["model"], state.models)
        for model, entries in zip(state.models, saved["model"], strict=False):
            found += _model(model, entries, index, live)
    if "optimizer" in saved:
        found += _count("optimizer", saved["optimizer"], state.optimizers)
        for optimizer, old in zip(state.optimizers, saved["optimizer"], strict=False):
            found += optimizer.differences(old)
    if "scheduler" in saved:
        here = list(state.schedulers) if state.scheduler_is_list else next(iter(state.schedulers), None)
        found += _scheduler(saved["scheduler"], here)
    if "scaler" in saved:
        found += _scaler(saved["scaler"], state.scaler)
    if "dataloader" in saved:
        found += state.loader.differences(saved["dataloader"])
    if "extra" in saved:
        found += _names("extra", saved["extra"], state.extra, "extra_state")
    if "train_state" in saved:
        TrainState.from_dict(saved["train_state"])
    if "rng" in saved:
        found += rng.differences(saved["rng"], state.devices)
    return found


def _model(
    model: ModelState, saved: dict[str, Any], index: Mapping[str, SavedItem], live: Mapping[str, Item]
) -> list[str]:
    where = f"model/{model.position}"
    entries = model.collect()
    found = _names(where, saved, entries, "the model")
    for name in saved.keys() & entries.keys():
        if name.endswith("_extra_state"):
            continue  # what a module makes of its extra state may grow with the run, and is its own to judge
        key = f"{where}/{path_component(name)}"
        is_tensor = isinstance(entries[name], torch.Tensor)
        if is_tensor != isinstance(saved[name], TensorRef):
            found.append(
                f"{key}: {'no ' if is_tensor else ''}tensor in the save, {'one' if is_tensor else 'none'} here"
            )
        elif is_tensor:
            found += _unlike_blocks(key, blocks_of(key, index), [SavedItem.of(item) for item in blocks_of(key, live)])
    return sorted(found)


def _unlike_blocks(key: str, saved: Sequence[SavedItem], live: Sequence[SavedItem]) -> list[str]:
    if len(saved) != len(live):
        return [f"{key}: saved as {len(saved)} blocks of rows, here it has {len(live)}"]
    pairs = zip(saved, live, strict=True)
    return [f"{key}: {unlike}" for unlike in (_unlike(before, now) for before, now in pairs) if unlike][:1]


def _unlike(saved: SavedItem, live: SavedItem) -> str:
    if (saved.dtype, saved.global_shape) != (live.dtype, live.global_shape):
        return f"saved {_shown(saved)}, here {_shown(live)}"
    if (saved.offsets, saved.shape) != (live.offsets, live.shape):
        return (
            f"saved as the shard {list(saved.shape)} at {list(saved.offsets)}, here it is {list(live.shape)} at "
            f"{list(live.offsets)} of {list(live.global_shape)}"
        )
    if saved.alias_of != live.alias_of:
        shares = [f"the same memory as {each.alias_of}" if each.alias_of else "alone" for each in (saved, live)]
        return f"saved {shares[0]}, here {shares[1]} (tied weights)"
    return ""


def _shown(item: SavedItem) -> str:
    return f"{dtype_name(item.dtype)} {list(item.global_shape)}"


def _count(part: str, saved: Any, here: Collection[Any]) -> list[str]:
    return [] if len(saved) == len(here) else [f"{part}: saved {len(saved)}, here {len(here)}"]


def _names(where: str, saved: Collection[str], here: Collection[str], what: str) -> list[str]:
    missing = [f"{where}/{name}: in the save, not in {what} here" for name in saved if name not in here]
    return missing + [f"{where}/{name}: in {what} here, not in the save" for name in here if name not in saved]


def _scheduler(saved: Any, live: Any) -> list[str]:
    def shape(given: Any) -> str:
        if given is None:
            return "none"
        return f"a list of {len(given)}" if isinstance(given, (list, tuple)) else "one"

    return [] if shape(saved) == shape(live) else [f"scheduler: saved {shape(saved)}, here {shape(live)}"]


def _scaler(saved: Any, live: Any) -> list[str]:
    def kind(given: Any) -> str:
        return "none" if given is None else "an enabled one" if given else "a disabled one"

    before, now = kind(saved), kind(None if live is None else live.state_dict())
    return [] if before == now else [f"scaler: saved {before}, here {now}"]
