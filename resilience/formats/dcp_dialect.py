"""What formats that are a folder of torch.distributed.checkpoint have of their own: names, and objects for others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from resilience.formats.folder_files import Backend
from resilience.formats.protocol import RankShare, SaveMeta

__all__ = ["Beside", "Dialect", "NestedPath", "nothing_beside"]

#: Where something stands in a nested dictionary; DCP's key for it is these joined by dots.
NestedPath = tuple[str | int, ...]
#: Tensors and objects for other programs.
Beside = Mapping[NestedPath, Any]


def nothing_beside(share: RankShare, meta: SaveMeta) -> Beside:
    """No objects but those that hold what a rank has alone."""
    return {}


@dataclass(frozen=True)
class Dialect:
    """How one format names what it stores.

    `stored_key`: the key of a tree path. `beside`: what rank 0 stores for other programs; called there alone.
    `nested_path`: the place of a tensor in the nested dictionary that plain DCP gives back; None: there are keys only.
    `keeps_objects`: each rank's `RankShare.objects` are stored under their keys.
    """

    backend: Backend
    stored_key: Callable[[str], str]
    beside: Callable[[RankShare, SaveMeta], Beside] = nothing_beside
    nested_path: Callable[[str], NestedPath] | None = None
    keeps_objects: bool = False
