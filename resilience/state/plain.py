"""How values of a training state are given to other programs: as what `torch.load(weights_only=True)` admits.

What it refuses goes as its closest neighbour: numpy arrays and scalars as tensors and numbers, sets as lists, a
defaultdict as a dict.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
import torch

from resilience.state.tensors import TensorRef
from resilience.state.tree_decoder import decode_with

__all__ = ["plain_parts"]


def plain_parts(values: bytes, parts: Collection[str], tensor_of: Callable[[str], torch.Tensor | None]) -> Any:
    """Some parts of a tree; `tensor_of` gives an item's tensor by key, None for one that is not here.

    A numpy array comes as the tensor of its elements, or of its bytes if torch has no such dtype.
    """
    tree = json.loads(values)
    wanted = {part: tree[part] for part in parts if part in tree}

    def leaf(ref: TensorRef) -> torch.Tensor | None:
        return tensor_of(ref.key)

    return _plain(decode_with(json.dumps(wanted).encode("ascii"), leaf))


def _plain(value: Any) -> Any:
    if isinstance(value, OrderedDict):
        return OrderedDict((_key(key), _plain(entry)) for key, entry in value.items())
    if isinstance(value, dict):
        return {_key(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | set | frozenset):
        return [_plain(entry) for entry in value]
    if type(value) is tuple:
        return tuple(_plain(entry) for entry in value)
    if isinstance(value, np.generic):
        return value.item()
    return value


def _key(key: Any) -> Any:
    """A key stays hashable: a frozenset becomes a tuple."""
    return tuple(_key(part) for part in key) if isinstance(key, frozenset | tuple) else key
