"""Which stored tensor, or part of one, belongs to which key of the live state, and a place to read each into.

A tensor that is whole in the checkpoint is cut as its live counterpart is on this rank; optimizer state is cut as its
parameter, or as a distributed optimizer keeps it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch

from resilience.formats.protocol import RankState, StoredTensor, Target
from resilience.state.items import Item, SavedItem, blocks_of
from resilience.state.load_plan import LoadPlan
from resilience.state.sharding import block_key, without_block
from resilience.state.training_state import TrainingState

__all__ = ["converted", "index_of", "staging", "stored_like"]


def index_of(
    stored_tensors: Mapping[str, StoredTensor],
    own: RankState,
    live: Mapping[str, Item],
    state: TrainingState,
    from_live: Collection[str],
) -> dict[str, SavedItem]:
    """What a checkpoint holds for this rank, by key, under the dtype that the tree says it has.

    `from_live`: the keys whose description in the tree is the live one's.
    """
    index: dict[str, SavedItem] = {}
    shardings = state.shardings()
    for key, stored in stored_tensors.items():
        flat = shardings.of_slices(key, stored.global_shape)
        if key in own.tensors:
            continue
        if flat is not None:
            blocks = [(block.offsets, block.shape) for block in flat.blocks]
            index |= _blocks(key, stored.dtype, stored.global_shape, blocks)
        else:
            index |= stored_like(key, stored.dtype, stored.global_shape, _live_like(key, live, state))
    for key, tensor in own.tensors.items():
        index |= stored_like(key, tensor.dtype, tuple(tensor.shape), ())
    for key, item in live.items():
        if key in index and without_block(key) in from_live:
            index[key] = replace(index[key], dtype=item.tensor.dtype)
        root = item.alias_of
        if root is not None and key in index and root in index:
            index[key] = replace(index[key], alias_of=root)  # tied weights are stored once
    return index


def converted(index: Mapping[str, SavedItem], dtypes: Mapping[str, torch.dtype]) -> dict[str, SavedItem]:
    """`index` with other dtypes for some tensors, as which they are read."""
    return {
        key: replace(item, dtype=dtypes[without_block(key)]) if without_block(key) in dtypes else item
        for key, item in index.items()
    }


def staging(
    plan: LoadPlan,
    index: Mapping[str, SavedItem],
    own: RankState,
    live: Mapping[str, Item],
    from_base: Collection[str],
    initial: Collection[str],
    *,
    direct: bool = False,
) -> tuple[list[torch.Tensor], list[Target], list[Target]]:
    """A tensor for each of the plan's targets, and which of them are to be filled from where.

    `direct`: what is read from the save is read into the plan's targets themselves, which then stand for their tensors.
    """
    staged: list[torch.Tensor] = []
    targets: list[Target] = []
    base_targets: list[Target] = []
    for key, tensor in plan.targets:
        whole = without_block(key)
        if whole in initial or key in own.tensors:
            staged.append(live[key].tensor if whole in initial else _cut(own.tensors[key], index[key]))
            continue
        out = tensor if direct else torch.empty(tensor.shape, dtype=tensor.dtype)
        staged.append(out)
        chosen = base_targets if whole in from_base else targets
        chosen.append(Target(whole, out, index[key].offsets, index[key].global_shape))
    return staged, targets, base_targets


def _cut(tensor: torch.Tensor, wanted: SavedItem) -> torch.Tensor:
    for axis, (start, length) in enumerate(zip(wanted.offsets, wanted.shape, strict=True)):
        tensor = tensor.narrow(axis, start, length)
    return tensor


def stored_like(key: str, dtype: torch.dtype, shape: tuple[int, ...], live: Sequence[Item]) -> dict[str, SavedItem]:
    """A whole tensor, or the parts of it that the live one has on this rank."""
    if not live or live[0].global_shape != shape:
        return {key: SavedItem(key, dtype, shape, (0,) * len(shape), shape)}
    return _blocks(key, dtype, shape, [(item.offsets, tuple(item.tensor.shape)) for item in live])


def _blocks(
    key: str, dtype: torch.dtype, whole: tuple[int, ...], blocks: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]
) -> dict[str, SavedItem]:
    names = [key] if len(blocks) == 1 else [block_key(key, number) for number in range(len(blocks))]
    return {
        name: SavedItem(name, dtype, whole, offsets, shape)
        for name, (offsets, shape) in zip(names, blocks, strict=True)
    }


def _live_like(key: str, items: Mapping[str, Item], state: TrainingState) -> Sequence[Item]:
    """The live tensor itself, or the parameter whose optimizer state this is (it is cut alike), block by block."""
    parts = key.split("/")
    if parts[0] == "optimizer" and len(parts) >= 4 and parts[2] == "state":
        return blocks_of(state.model_key(parts[3]), items)
    return blocks_of(key, items)
