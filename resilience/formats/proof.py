"""Whether a persistent checkpoint is whole and (deep) every byte of it as its digests say, without torch.

The same questions that a load asks before it believes a folder: `registry.open_checkpoint`, then `verify`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from resilience.errors import CorruptCopyError, UnsafePathError
from resilience.formats.directory import INTEGRITY, damaged_files, read_digests
from resilience.formats.registry import data_files, foreign_problem
from resilience.stores.filesystem import FileSystem
from resilience.stores.shared_inventory import read_folder

__all__ = ["folder_damage"]


def folder_damage(folder: Path, fs: FileSystem, *, deep: bool) -> Iterator[tuple[Path, str]]:
    """`(path, reason)` of what is wrong with a checkpoint folder; nothing if it can be loaded. StoreError on I/O.

    A folder of another program without digests cannot be damaged in a way that could be seen here.
    """
    try:
        problem = foreign_problem(folder, fs)
        if problem:
            yield folder, problem
            return
        stored = data_files(folder, fs)
        if not deep:
            return
        digests = read_digests(folder, fs)
        if digests is None:
            if read_folder(folder, fs) is not None:
                yield folder / INTEGRITY, f"{INTEGRITY} is missing"
            return
        for name in sorted(stored - digests.keys()):
            yield folder / name, f"{INTEGRITY} does not list it"
        for name, reason in damaged_files(folder, fs):
            yield folder / name, reason
    except (CorruptCopyError, UnsafePathError, FileNotFoundError) as error:
        yield folder, str(error)
