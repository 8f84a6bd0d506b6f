"""Where a flat slice of a parameter lies in the parameter's whole shape, block by block.

A distributed optimizer keeps elements `start` to `stop` (in C order) of what this rank has of a parameter. These are a
few boxes (`planning/flat.py`); where the parameter itself is a part of a whole, they are moved to its place there. So
every rank names what it has, and nothing is gathered.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from resilience.planning.bucket_space import LocalBlock
from resilience.planning.flat import Box, boxes_of_range
from resilience.state.sharding import Sharding, block_key, sharding_of

__all__ = ["FlatBlock", "FlatSharding", "flat_sharding", "local_blocks"]


@dataclass(frozen=True)
class FlatBlock:
    """Rows `first` to `first + rows` along `dim` of the box that elements `start` to `stop` of the slice make up."""

    start: int
    stop: int
    box: tuple[int, ...]
    dim: int
    first: int
    rows: int
    offsets: tuple[int, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.box[: self.dim], self.rows, *self.box[self.dim + 1 :])

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The block as a view of the slice."""
        return flat[self.start : self.stop].view(self.box).narrow(self.dim, self.first, self.rows)


@dataclass(frozen=True)
class FlatSharding:
    """Where one-dimensional tensors of shape `shape` lie in one of shape `global_shape`; the like of `Sharding`."""

    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    blocks: tuple[FlatBlock, ...]

    def parts(self, key: str, local: torch.Tensor) -> list[tuple[str, torch.Tensor, tuple[int, ...]]]:
        """`(key, view, offsets)` of each block of `local`; a single block keeps the tensor's own key."""
        names = [key] if len(self.blocks) == 1 else [block_key(key, number) for number in range(len(self.blocks))]
        return [(name, block.of(local), block.offsets) for name, block in zip(names, self.blocks, strict=True)]


def flat_sharding(shape: tuple[int, ...], start: int, stop: int, said: Sharding | None) -> FlatSharding:
    """Of elements `start` to `stop` of a parameter that has `shape` here; `said`: its own place in a whole.

    A parameter without dimensions has none to lie in: its one element is not asked for here.
    """
    assert shape, "a slice of a parameter without dimensions is the whole of it"
    boxes = boxes_of_range(shape, start, stop)
    if said is None:
        return FlatSharding((stop - start,), shape, tuple(_whole(box) for box in boxes))
    blocks = tuple(block for box in boxes for block in _placed(box, said))
    return FlatSharding((stop - start,), said.global_shape, blocks)


def _whole(box: Box) -> FlatBlock:
    return FlatBlock(box.start, box.start + box.length, box.shape, 0, 0, box.shape[0], box.offsets)


def _placed(box: Box, said: Sharding) -> Iterator[FlatBlock]:
    """What a box has of each of the parameter's blocks."""
    dim = said.dim
    begin, end = box.offsets[dim], box.offsets[dim] + box.shape[dim]
    for block in said.blocks:
        first, last = max(begin, block.start), min(end, block.start + block.length)
        if first >= last:
            continue
        inside = [first - block.start if axis == dim else start for axis, start in enumerate(box.offsets)]
        offsets = tuple(place + start for place, start in zip(block.offsets, inside, strict=True))
        yield FlatBlock(box.start, box.start + box.length, box.shape, dim, first - begin, last - first, offsets)


def local_blocks(parameter: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...], tuple[LocalBlock, ...]]:
    """Shape of a plain parameter here, shape of the whole that it is a part of, and where the one lies in the other."""
    shape, said = tuple(parameter.shape), sharding_of(parameter)
    if said is None:
        return shape, shape, (LocalBlock((0,) * len(shape), shape, (0,) * len(shape)),)
    blocks = []
    for block in said.blocks:
        start = tuple(block.start if axis == said.dim else 0 for axis in range(len(shape)))
        sizes = tuple(block.length if axis == said.dim else length for axis, length in enumerate(shape))
        blocks.append(LocalBlock(start, sizes, block.offsets))
    return shape, said.global_shape, tuple(blocks)
