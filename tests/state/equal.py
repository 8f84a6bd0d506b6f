"""Exact equality of trees: types, bits of floats, order of dicts, bytes of tensors and arrays."""

from __future__ import annotations

import struct
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import torch

from resilience.state.tensors import byte_view


def same(left: Any, right: Any) -> bool:
    """Whether two trees are equal to the bit, types included."""
    if type(left) is not type(right):
        return False
    if isinstance(left, torch.Tensor):
        return (
            left.dtype == right.dtype
            and left.shape == right.shape
            and left.requires_grad == right.requires_grad
            and torch.equal(byte_view(left), byte_view(right))
        )
    if isinstance(left, np.ndarray):
        return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()
    if isinstance(left, np.generic):
        return left.dtype == right.dtype and left.tobytes() == right.tobytes()
    if isinstance(left, float):
        return struct.pack(">d", left) == struct.pack(">d", right)
    if isinstance(left, complex):
        return same(left.real, right.real) and same(left.imag, right.imag)
    if isinstance(left, dict):
        if isinstance(left, defaultdict) and left.default_factory is not right.default_factory:
            return False
        if isinstance(left, OrderedDict) and not same(vars(left), vars(right)):
            return False
        return same(list(left.items()), list(right.items()))
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, (set, frozenset)):
        return _in_order(left) == _in_order(right)
    return bool(left == right)


def _in_order(value: Any) -> str:
    """Text of a hashable value that does not depend on the order in which sets happen to list their members."""
    if isinstance(value, (set, frozenset)):
        return f"{type(value).__name__}{sorted(map(_in_order, value))}"
    return f"({','.join(map(_in_order, value))})" if isinstance(value, tuple) else repr(value)
