"""Where a snapshot's bytes come from: the live tensor, or rows of one, behind each placed piece of a layout.

Cut once and kept while a layout holds: cutting thousands of views anew at every save costs more than copying them.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_not
from typing import NamedTuple

import torch

from resilience.snapshot.layout import Layout, Piece
from resilience.snapshot.memory_copy import is_block
from resilience.state.items import Item

__all__ = ["Cut", "Sources"]


class Cut(NamedTuple):
    """The source of each placed piece. `kind` is the same object for as long as they lie on the same devices in the
    same way: what is planned for some is good for others of that kind."""

    tensors: list[torch.Tensor]
    kind: object


class Sources:
    """The sources of one layout after the other."""

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._items: Sequence[Item] = ()
        self._places: dict[int, list[int]] = {}  # by item: which placed pieces are of it
        self._cut = Cut([], object())

    @torch.no_grad()
    def of(self, items: Sequence[Item], layout: Layout) -> Cut:
        """Cut again only where an item is another object: one whose tensor got other memory is."""
        if layout is not self._layout:
            self._places = {}
            for position, placed in enumerate(layout.placed):
                self._places.setdefault(placed.piece.item, []).append(position)
            self._cut = Cut([_cut(items[placed.piece.item].tensor, placed.piece) for placed in layout.placed], object())
        else:
            changed = map(is_not, items, self._items)
            self._replace([number for number, other in enumerate(changed) if other], items, layout)
        self._layout, self._items = layout, tuple(items)
        return self._cut

    def _replace(self, changed: Sequence[int], items: Sequence[Item], layout: Layout) -> None:
        old, kind = self._cut
        tensors = list(old)  # a copy that is under way keeps the list that it was given
        for number in changed:
            for position in self._places.get(number, ()):
                tensors[position] = _cut(items[number].tensor, layout.placed[position].piece)
                if _lies(tensors[position]) != _lies(old[position]):
                    kind = object()
        self._cut = Cut(tensors, kind)


def _lies(tensor: torch.Tensor) -> tuple[object, ...]:
    return tensor.device, is_block(tensor), tensor.is_contiguous()


def _cut(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor if piece.row_stop is None else tensor[piece.row_start : piece.row_stop]
