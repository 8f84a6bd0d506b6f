"""What lies in a node's directory of a run, and how it is called.

    <base>/<run_id>/<node_id>/iter_0000035/g0002-3f9ac01b/rank_00003-of-00008.safetensors   a shard
                                                          rank_00003-of-00008.json          its record, written last
                                                          parity_00000_02.safetensors       parity: clique, member
                                                          complete.json                     the save's certificate
                              attempts/g0002-3f9ac01b.json
                              .arenas/                                                      free and filling buffers
                              lock

A node's id may change from one start to the next: then a base has several such directories of one run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from resilience.planning.inventory import Kept, ParityName, SaveId
from resilience.stores.filesystem import FileSystem

__all__ = [
    "ARENAS",
    "ATTEMPTS",
    "CERTIFICATE",
    "file_name",
    "folder_names",
    "is_iteration",
    "kept_named",
    "save_folder",
    "save_folders",
]

CERTIFICATE: Final = "complete.json"
ATTEMPTS: Final = "attempts"
ARENAS: Final = ".arenas"
_ITERATION = re.compile(r"iter_(\d{7,16})")
_GENERATION = re.compile(r"g\d{4,}-[0-9a-f]{8}")
_RECORD = re.compile(r"rank_(\d{5,7})-of-(\d{5,7})\.json|parity_(\d{5,7})_(\d{2,3})\.json")


def file_name(kept: Kept, world_size: int) -> str:
    """File name of a shard or of parity, without its ending."""
    if isinstance(kept, ParityName):
        return f"parity_{kept.clique:05d}_{kept.index:02d}"
    return f"rank_{kept:05d}-of-{world_size:05d}"


def kept_named(name: str) -> Kept | None:
    """What the file `name` is the record of; None if it is called like no record."""
    found = _RECORD.fullmatch(name)
    if found is None:
        return None
    return int(found[1]) if found[1] else ParityName(int(found[3]), int(found[4]))


def is_iteration(name: str) -> bool:
    """Whether a folder is called like one of an iteration's saves."""
    return _ITERATION.fullmatch(name) is not None


def folder_names(save: SaveId) -> tuple[str, str]:
    """The folder of the iteration, and in it that of the save."""
    return f"iter_{save.iteration:07d}", save.folder


def save_folder(root: Path, save: SaveId) -> Path:
    """Where the node's directory `root` keeps its copies of `save`."""
    return root.joinpath(*folder_names(save))


def save_folders(root: Path, fs: FileSystem) -> Iterator[Path]:
    """The folders of all saves in the node's directory `root`, whatever is in them."""
    for iteration in fs.list_dir(root):
        if is_iteration(iteration):
            for generation in fs.list_dir(root / iteration):
                if _GENERATION.fullmatch(generation):
                    yield root / iteration / generation
