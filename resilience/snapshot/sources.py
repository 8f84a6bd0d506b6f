"""Where a snapshot's bytes come from: the live tensor, or rows of one, behind each placed piece of a layout.

Cut once and kept while a layout holds: cutting thousands of views anew at every save costs more than copying them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resilience.snapshot.layout import Layout, Piece
from resilience.state.items import Item

__all__ = ["Sources"]


class Sources:
    """The sources of one layout after the other."""

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._tensors: list[torch.Tensor] = []
        self._places: list[int] = []  # where each tensor's memory was: `tensor.data = other` keeps the object
        self._sources: list[torch.Tensor] = []

    @torch.no_grad()
    def of(self, items: Sequence[Item], layout: Layout) -> list[torch.Tensor]:
        """The source of each placed piece; row ranges are cut again only where a live tensor was replaced."""
        live = [items[placed.piece.item].tensor for placed in layout.placed]
        places = [tensor.data_ptr() for tensor in live]
        if layout is not self._layout:
            self._sources = [_cut(t, p.piece) for t, p in zip(live, layout.placed, strict=True)]
        else:
            changed = [
                position
                for position, tensor in enumerate(live)
                if tensor is not self._tensors[position] or places[position] != self._places[position]
            ]
            if changed:  # a copy that is under way keeps the list it was given
                self._sources = list(self._sources)
            for position in changed:
                self._sources[position] = _cut(live[position], layout.placed[position].piece)
        self._layout, self._tensors, self._places = layout, live, places
        return self._sources


def _cut(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor if piece.row_stop is None else tensor[piece.row_start : piece.row_stop]
