"""What formats that are a folder of torch.distributed.checkpoint have of their own: names, and objects for others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from resilience.formats.folder_files import Backend
from resilience.formats.protocol import RankShare, SaveMeta

__all__ = ["Dialect", "nothing_beside"]


def nothing_beside(share: RankShare, meta: SaveMeta) -> Mapping[str, Any]:
    """No objects but those that hold what a rank has alone."""
    return {}


@dataclass(frozen=True)
class Dialect:
    """How one format names what it stores.

    `stored_key`: the key of a tree path. `beside`: what rank 0 stores for other programs, tensors and objects by key.
    `nested_path`: the place of a key in the nested dictionary that plain DCP gives back; None: there are keys only.
    """

    backend: Backend
    stored_key: Callable[[str], str]
    beside: Callable[[RankShare, SaveMeta], Mapping[str, Any]] = nothing_beside
    nested_path: Callable[[str], tuple[str | int, ...]] | None = None
