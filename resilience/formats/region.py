"""Regions of tensors, and in which steps one is copied out of a mapped file so that little of it is mapped at a time.

What was read from a mapped file counts as this process's memory until the mapping is let go of.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Final

import torch

__all__ = ["MAPPED_BYTES", "narrow", "row_steps", "rows"]

MAPPED_BYTES: Final = 4 << 20  # of files, before they are let go of


def narrow(tensor: torch.Tensor, starts: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    """The region of `tensor` that begins at `starts`; a view."""
    for axis, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        tensor = tensor.narrow(axis, start, length)
    return tensor


def row_steps(lengths: Sequence[int], itemsize: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows of a region, each of about `MAPPED_BYTES` at most; one row may have more."""
    count = lengths[0] if lengths else 1
    step = max(1, MAPPED_BYTES * count // max(1, math.prod(lengths) * itemsize))
    return ((start, min(start + step, count)) for start in range(0, count, step))


def rows(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """These rows of a region; a tensor without axes is one row."""
    return tensor[start:stop] if tensor.dim() else tensor
