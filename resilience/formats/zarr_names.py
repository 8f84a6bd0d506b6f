"""Names of the files that a checkpoint of the format `zarr` has beside its arrays. Importing this needs no torch.

objects/shard_3_8.pt     what rank 3 of 8 has alone: `torch.save` of a list of one dictionary
.parts/rank_3.bin        while it is written: bytes of rank 3 that belong to chunks which others write
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

__all__ = ["OBJECTS", "SPILL", "object_file", "object_files"]

OBJECTS: Final = "objects"
SPILL: Final = ".parts"
_OBJECT = re.compile(r"shard_(\d{1,7})_(\d{1,7})\.pt")


def object_file(rank: int, world_size: int) -> str:
    """Relative to the checkpoint's folder."""
    return f"{OBJECTS}/shard_{rank}_{world_size}.pt"


def object_files(names: Iterable[str], world_size: int) -> dict[int, str]:
    """Rank → file, of the names in `objects/`, for a world of that size."""
    found = ((match, name) for name in names if (match := _OBJECT.fullmatch(name)))
    return {int(match[1]): f"{OBJECTS}/{name}" for match, name in found if int(match[2]) == world_size}
