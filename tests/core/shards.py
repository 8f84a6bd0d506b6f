"""Shards made in the test's own process: items of every dtype, an arena of them, the record of a copy."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from resilience.planning.inventory import SaveId
from resilience.snapshot.arena import Arena
from resilience.snapshot.copying import Copying, Part
from resilience.snapshot.layout import Layout, ShardIdentity, plan_layout
from resilience.snapshot.pieces import pieces_of
from resilience.snapshot.sources import Sources
from resilience.state.items import Item
from resilience.stores.digest import digest_of
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.records import ShardRecord

FS = PosixFileSystem()
ATTEMPT = "3f9ac01b" + "0" * 24
SAVE = SaveId(7, 2, ATTEMPT)


def item(key: str, tensor: torch.Tensor, *, replicated: bool = True, alias_of: str | None = None) -> Item:
    shape = tuple(tensor.shape)
    return Item(key, tensor, shape, (0,) * len(shape), replicated, alias_of)


def random_bytes(dtype: torch.dtype, shape: Sequence[int], seed: int = 0) -> torch.Tensor:
    """Any bits at all: NaNs with payloads too."""
    count = 1
    for length in shape:
        count *= length
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randint(0, 256, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    if dtype is torch.bool:
        raw %= 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "ComplexHalf support is experimental")
        return raw.view(dtype).view(tuple(shape)) if count else torch.empty(tuple(shape), dtype=dtype)


def layout_of(items: Sequence[Item], values: bytes = b"{}", *, part: int = 0, parts: int = 1) -> Layout:
    shared = {each.key for each in items if each.replicated}
    pieces = pieces_of(items, shared, part=part, parts=parts, split=parts > 1)
    return plan_layout(pieces, {}, len(values), range(parts))


def identity(owner: int = 0, world_size: int = 1, values: bytes = b"{}") -> ShardIdentity:
    return ShardIdentity("run", ATTEMPT, SAVE.generation, SAVE.iteration, owner, world_size, len(values))


def sealed(path: Path, items: Sequence[Item], layout: Layout, values: bytes = b"{}", **whose: Any) -> Arena:
    """An arena at `path` that holds `items`."""
    arena = Arena(FS.create_mapping(path, layout.nbytes))
    arena.use(layout)
    arena.write_values(values)
    copied(items, arena, lambda: arena.seal(identity(values=values, **whose)))
    return arena


def copied(items: Sequence[Item], arena: Arena, seal: Callable[[], None] = lambda: None) -> None:
    """An eager snapshot of `items` in an arena that has its layout."""
    assert arena.layout is not None
    Copying().start([Part(arena, arena.layout, Sources().of(items, arena.layout))], (), seal)


def record_of(content: bytes | memoryview, owner: int = 0, world_size: int = 1, **fields: Any) -> ShardRecord:
    given: dict[str, Any] = {
        "run_id": "run",
        "save": SAVE,
        "owner": owner,
        "world_size": world_size,
        "role": "primary",
        "tier": "local",
        "node_id": "a",
        "nbytes": len(content),
        "digest": digest_of(content),
        "created": 1.5,
    }
    return ShardRecord(**given | fields)
