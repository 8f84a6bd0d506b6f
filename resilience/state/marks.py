"""Marks of plain values: equal exactly where the values are written alike, and found quicker than they are written.

`==` will not do: `1 == True == 1.0` and `0.0 == -0.0`, and each of them is written in another way. So a mark has the
type of every value in it, and a float's bits.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable
from typing import Any, Final

__all__ = ["SCALARS", "NotPlainError", "mark_of"]

SCALARS: Final = frozenset((type(None), bool, int, float, str))
_FLOAT: Final = struct.Struct("<d").pack
_SEQUENCES: Final = frozenset((list, tuple))
_UNIFORM: Final = (frozenset((int,)), frozenset((str,)))
_DEPTH: Final = 20


class NotPlainError(Exception):
    """A value has no mark."""


def mark_of(value: Any, depth: int = _DEPTH) -> Hashable:
    """The mark of None, a bool, an int, a float, a str, and of lists, tuples and dicts (with str keys) of them.

    NotPlainError for all else: tensors, NumPy's scalars, subclasses, and what is nested deeply or in itself.
    """
    kind = type(value)
    if kind in SCALARS:
        return kind, _FLOAT(value) if kind is float else value
    if depth == 0:
        raise NotPlainError
    if kind in _SEQUENCES:
        if frozenset(map(type, value)) in _UNIFORM:  # at once: random state is hundreds of numbers
            return kind, type(value[0]), tuple(value)
        return kind, tuple([mark_of(part, depth - 1) for part in value])
    if kind is dict and all(type(key) is str for key in value):
        return kind, tuple(value), tuple([mark_of(part, depth - 1) for part in value.values()])
    raise NotPlainError
