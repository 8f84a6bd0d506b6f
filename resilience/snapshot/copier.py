"""The copy: live tensors into an arena, in one call that gives up the interpreter lock once.

One `torch._foreach_copy_` over cached views takes mixed dtypes and strides; a Python loop over thousands of tensors
costs up to a fifth more and, against a busy interpreter, orders of magnitude.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from resilience.snapshot.arena import Arena
from resilience.snapshot.layout import Layout, Piece
from resilience.state.items import Item

__all__ = ["EagerCopier"]


class EagerCopier:
    """Copies at the boundary, before training goes on."""

    def __init__(self) -> None:
        self._layout: Layout | None = None
        self._tensors: list[torch.Tensor] = []
        self._places: list[int] = []  # where each tensor's memory was: `tensor.data = other` keeps the object
        self._sources: list[torch.Tensor] = []

    @torch.no_grad()
    def copy(self, items: Sequence[Item], arena: Arena) -> None:
        """Fill `arena` (whose layout was planned from `items` of the same structure)."""
        layout = arena.layout
        if layout is None:
            raise ValueError("the arena has no layout yet")
        sources = self._views(items, layout)
        if not sources:
            return
        on_device = [tensor for tensor in sources if tensor.is_cuda]
        torch._foreach_copy_(arena.views, sources, non_blocking=bool(on_device))
        for device in {tensor.device for tensor in on_device}:
            torch.cuda.current_stream(device).synchronize()

    def _views(self, items: Sequence[Item], layout: Layout) -> list[torch.Tensor]:
        """The source of each placed piece; row ranges are cut again only where a live tensor was replaced."""
        live = [items[placed.piece.item].tensor for placed in layout.placed]
        places = [tensor.data_ptr() for tensor in live]
        if layout is not self._layout:
            self._sources = [_cut(t, p.piece) for t, p in zip(live, layout.placed, strict=True)]
        else:
            for position, tensor in enumerate(live):
                if tensor is not self._tensors[position] or places[position] != self._places[position]:
                    self._sources[position] = _cut(tensor, layout.placed[position].piece)
        self._layout, self._tensors, self._places = layout, live, places
        return self._sources


def _cut(tensor: torch.Tensor, piece: Piece) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor if piece.row_stop is None else tensor[piece.row_start : piece.row_stop]
