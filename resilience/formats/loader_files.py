"""Where a data loader's state lies in a checkpoint that another program or another layout wrote, one file per rank.

    <save>/iter_0000007/dataloader_state/train_dataloader_dprank003.pt    as documented, and as it is written here
    <save>/iter_0000007/train_dataloader_dprank003.pt                     Megatron Bridge 0.3, if saved to `save`
    <save>/dataloader_state/iter_0000007/train_dataloader_dprank003.pt    later versions of it

Each holds `{"dataloader_state_dict": …}` and belongs to one data-parallel rank. At another data-parallel size nobody
knows who had seen what, so that none is taken.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from resilience.errors import CorruptCopyError
from resilience.formats.torch_archive import read_archive, saved_bytes
from resilience.stores.filesystem import FileSystem

__all__ = ["LOADER_FOLDER", "encode_loader", "loader_file", "loader_states", "read_loader"]

LOADER_FOLDER = "dataloader_state"
_NAME = re.compile(r"train_dataloader_dprank(\d{3,})\.pt")
_KEY = "dataloader_state_dict"
_LIMIT = 1 << 30


def loader_file(dp_rank: int) -> str:
    """The file's name, relative to the checkpoint's folder."""
    return f"{LOADER_FOLDER}/train_dataloader_dprank{dp_rank:03d}.pt"


def encode_loader(state: Any) -> bytes:
    return saved_bytes({_KEY: state})


def read_loader(folder: Path, fs: FileSystem, dp_rank: int, dp_size: int) -> tuple[Any, str]:
    """The loader's state of a data-parallel rank, or None and why there is none for it.

    CorruptCopyError if the file is there and holds anything but tensors and plain values in the known form.
    """
    there = loader_states(folder, fs)
    if not there:
        return None, "the checkpoint has none"
    if sorted(there) != list(range(dp_size)):
        return None, f"it was saved for {len(there)} data-parallel ranks, and this start has {dp_size}"
    path = there[dp_rank]
    stored = read_archive(memoryview(fs.read(path, _LIMIT)), str(path))
    if not isinstance(stored, dict) or _KEY not in stored:
        raise CorruptCopyError(f"{path} holds no {_KEY}.")
    return stored[_KEY], ""


def loader_states(folder: Path, fs: FileSystem) -> dict[int, Path]:
    """The files by data-parallel rank, from the first place that has any."""
    for place in (folder / LOADER_FOLDER, folder, folder.parent / LOADER_FOLDER / folder.name):
        found = fs.stat(place)
        if found is None or not found.is_dir:  # nothing, or a link that leads elsewhere
            continue
        there = {int(match[1]): place / name for name in fs.list_dir(place) if (match := _NAME.fullmatch(name))}
        if there:
            return there
    return {}
