"""Which part of each item a rank's shard stores: its rows of what the group shares, all of what is its own.

`fully_parallel` cuts the items that are equal on all ranks of the data-parallel group evenly over the group, by bytes,
at row boundaries; `atomic` stores everything on every rank.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from resilience.planning.split import split_rows
from resilience.snapshot.layout import Piece
from resilience.state.items import Item

__all__ = ["pieces_of"]


def pieces_of(items: Sequence[Item], shared: Collection[str], *, part: int, parts: int, split: bool) -> list[Piece]:
    """The pieces of member `part` of `parts`; `shared` are the keys that were shown to be equal in the group."""
    stored = [position for position, item in enumerate(items) if item.alias_of is None]
    pieces = [_whole(items[p], p, items[p].key in shared) for p in stored if not (split and items[p].key in shared)]
    if not split:
        return pieces
    common = [position for position in stored if items[position].key in shared]
    rows = [_rows(items[position]) for position in common]
    for index, start, stop in split_rows(rows, parts)[part]:
        pieces.append(_slice(items[common[index]], common[index], start, stop))
    return pieces


def _rows(item: Item) -> tuple[int, int]:
    shape = item.tensor.shape
    if not shape:
        return 1, item.tensor.element_size()
    return shape[0], math.prod(shape[1:]) * item.tensor.element_size()


def _whole(item: Item, position: int, shared: bool) -> Piece:
    tensor = item.tensor
    return Piece(
        item.key, tensor.dtype, item.global_shape, item.offsets, tuple(tensor.shape), shared, position
    )  # fmt: skip


def _slice(item: Item, position: int, start: int, stop: int) -> Piece:
    shape = tuple(item.tensor.shape)
    if not shape or (start, stop) == (0, shape[0]):
        return _whole(item, position, True)
    offsets = (item.offsets[0] + start, *item.offsets[1:])
    rows = (item.offsets[0], shape[0])
    return Piece(
        item.key, item.tensor.dtype, item.global_shape, offsets, (stop - start, *shape[1:]), True, position, start,
        stop, rows,
    )  # fmt: skip
