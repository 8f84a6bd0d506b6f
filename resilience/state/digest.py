"""One digest of a whole training state, to tell whether two runs ended alike to the bit.

It covers every tensor and every plain value: parameters, buffers, optimizer, scheduler, RNG, loader, counters. Nothing
of it is volatile (no time, no address, no device index), so that a resumed and an undisturbed run agree. It does not
see what is no state: strides, which tensors share memory, in which order a dict with str keys was filled.
"""

from __future__ import annotations

import json
from typing import Any

import xxhash

from resilience.state.items import Collected
from resilience.state.tensors import dtype_name, memory_of


def state_digest(collected: Collected) -> str:
    """`xxh3-128:<32 hex digits>` over the keys, dtypes, places and bytes of all items, and over the values."""
    digest = xxhash.xxh3_128()
    for item in sorted(collected.items, key=lambda item: item.key):
        shape = tuple(item.tensor.shape)
        head = [item.key, dtype_name(item.tensor.dtype), item.global_shape, item.offsets, shape]
        digest.update(json.dumps(head).encode())
        digest.update(memory_of(item.tensor))
    digest.update(_ordered(json.loads(collected.values)))
    return f"xxh3-128:{digest.hexdigest()}"


def _ordered(tree: Any) -> bytes:
    return json.dumps(tree, sort_keys=True, separators=(",", ":")).encode()
