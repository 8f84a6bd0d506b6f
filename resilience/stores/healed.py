"""A shared directory as the next start will find it after it healed interrupted commits; nothing is touched.

`explain` looks through this, because the restore heals before it elects.
"""

from __future__ import annotations

from pathlib import Path

from resilience.stores.filesystem import FileStat, FileSystem, MappedFile, PosixFileSystem
from resilience.stores.shared_inventory import ForeignProblem
from resilience.stores.shared_store import SharedStore

__all__ = ["healed"]


def healed(store: SharedStore, foreign_problem: ForeignProblem) -> tuple[SharedStore, PosixFileSystem]:
    """The store to read from instead, and the view below it, through which its folders' files are found."""
    view = _HealedView(store.root, store.after_heal(), store.fs)
    return SharedStore(store.root, view, source=store.source, foreign_problem=foreign_problem), view


class _HealedView(PosixFileSystem):
    """A disk with some names of one directory standing for others. For reading only."""

    def __init__(self, root: Path, moved: dict[str, str | None], fs: FileSystem) -> None:
        self._root = root
        self._moved = moved
        self._fs = fs

    def list_dir(self, path: Path) -> list[str]:
        names = self._fs.list_dir(self._real(path))
        if path != self._root:
            return names
        gone = {name for name, now in self._moved.items() if now is None}
        return sorted({*names, *self._moved} - gone)

    def stat(self, path: Path) -> FileStat | None:
        return self._fs.stat(self._real(path))

    def read(self, path: Path, limit: int = 1 << 20) -> bytes:
        return self._fs.read(self._real(path), limit)

    def open_mapping(self, path: Path, *, writable: bool = False, populate: bool = False) -> MappedFile:
        return self._fs.open_mapping(self._real(path), populate=populate)

    def _real(self, path: Path) -> Path:
        try:
            inside = path.relative_to(self._root).parts
        except ValueError:
            return path
        if not inside or inside[0] not in self._moved:
            return path
        now = self._moved[inside[0]]
        return self._root / ".gone" if now is None else self._root.joinpath(now, *inside[1:])
