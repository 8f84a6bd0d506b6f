"""What goes from a node's directories of a run: copies that are not kept, and what no record vouches for.

A copy is deleted by unlinking its record first, durably; only then its bytes. Deletion happens only in this node's own
directory, or in one beside it whose lock could be taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from resilience.errors import AnotherJobError, StoreError
from resilience.planning.inventory import SaveId
from resilience.stores.filesystem import TEMPORARY_PREFIX, FileSystem
from resilience.stores.lock import ALL_RANKS
from resilience.stores.node_names import (
    ARENAS,
    ATTEMPTS,
    folder_names,
    is_iteration,
    kept_named,
    save_folder,
    save_folders,
)
from resilience.stores.records import is_name

__all__ = ["NodeRemover", "leftovers"]


def leftovers(root: Path, fs: FileSystem) -> Iterator[Path]:
    """Files in the node's directory `root` that no record vouches for: what a start sweeps away."""
    for name in fs.list_dir(root / ARENAS):
        yield root / ARENAS / name
    for folder in (root, root / ATTEMPTS):
        yield from (folder / name for name in fs.list_dir(folder) if name.startswith(TEMPORARY_PREFIX))
    for folder in save_folders(root, fs):
        names = fs.list_dir(folder)
        for name in names:
            orphan = name.endswith(".safetensors") and name.removesuffix(".safetensors") + ".json" not in names
            if orphan or name.startswith(TEMPORARY_PREFIX):
                yield folder / name


class NodeRemover:
    """Deletes in the directory `root` of a node, `<base>/<run_id>/<node_id>`, and in those of the same run beside it.

    Whoever asks for it holds the lock of `root`; those beside it are locked here, for as long as it takes.
    """

    def __init__(self, root: Path, fs: FileSystem) -> None:
        self.root = root
        self.fs = fs

    def remove_folder_if_empty(self, save: SaveId) -> None:
        """After every rank of the node gave up its copies: the certificate and the folders go."""
        folder = save_folder(self.root, save)
        names = self.fs.list_dir(folder)
        if any(kept_named(name) is not None or name.endswith(".safetensors") for name in names):
            return
        for name in names:
            self.fs.unlink(folder / name)
        self.fs.remove_dir(folder)
        self.fs.remove_dir(folder.parent)  # only if empty: another attempt may save this iteration at this very moment

    def sweep(self, keep: Iterable[SaveId] | None = None) -> int:
        """Remove what no record vouches for: temporary files, free arenas, shards without a record.

        With `keep`, the copies of all other saves go too, record first. One rank per node, holding the lock, before any
        other writes. Returns the number of files and folders removed.
        """
        removed = 0
        for root in self._roots():
            with self._alone(root) as alone:
                removed += self._sweep(root, keep) if alone else 0
        return removed

    def drop(self, save: SaveId) -> None:
        """Delete all copies of one save that lie in our own directory."""
        self._remove_save(save_folder(self.root, save))

    def drop_beside(self, save: SaveId) -> None:
        """Delete all copies of one save that lie beside our own directory, where nobody holds them.

        This node had another name when it wrote them, and nobody else will ever see them. One rank per node.
        """
        for root in self._beside():
            folder = save_folder(root, save)
            self._remove_saves(root, [folder] if self.fs.stat(folder) is not None else [])

    def drop_earlier_attempts(self, attempt: str, keep: Iterable[SaveId]) -> None:
        """Delete the copies of other attempts but those in `keep`, in our own directory and in ones nobody holds.

        What this attempt writes meanwhile is not touched. One rank per node.
        """
        kept = {folder_names(save) for save in keep}
        for root in self._roots():
            doomed = [
                folder
                for folder in save_folders(root, self.fs)
                if not folder.name.endswith(f"-{attempt[:8]}") and folder.parts[-2:] not in kept
            ]
            self._remove_saves(root, doomed)

    def forget(self) -> None:
        """Free this node's memory: all copies of the run go, attempt logs stay. After the run has finished."""
        self._sweep(self.root, keep=())

    def _roots(self) -> Iterator[Path]:
        yield self.root
        yield from self._beside()

    def _beside(self) -> Iterator[Path]:
        """The other directories of this run: of names that this node had before, or of other nodes."""
        run = self.root.parent
        for name in self.fs.list_dir(run):
            if name != self.root.name and is_name(name):
                yield run / name

    def _sweep(self, root: Path, keep: Iterable[SaveId] | None) -> int:
        kept = None if keep is None else {folder_names(save) for save in keep}
        removed = 0
        for folder in list(save_folders(root, self.fs)):
            if kept is not None and folder.parts[-2:] not in kept:
                self._remove_save(folder)
                removed += 1
        for path in list(leftovers(root, self.fs)):
            removed += self.fs.unlink(path)
        for folder in list(save_folders(root, self.fs)):  # of saves that failed before they had a record
            self.fs.remove_dir(folder)
        for name in self.fs.list_dir(root):  # and where a deletion got no further
            if is_iteration(name):
                self.fs.remove_dir(root / name)
        return removed

    def _remove_saves(self, root: Path, folders: Sequence[Path]) -> None:
        if not folders:
            return
        with self._alone(root) as alone:
            for folder in folders if alone else ():
                self._remove_save(folder)

    @contextmanager
    def _alone(self, root: Path) -> Iterator[bool]:
        """Whether `root` may be touched: our own, or one beside it, under its lock; a job that lives holds that."""
        if root == self.root:
            yield True
            return
        lock = self.fs.lock(root, ALL_RANKS)
        try:
            lock.acquire()
        except (AnotherJobError, StoreError):
            yield False  # it lives, or is not ours, or cannot be told
            return
        try:
            yield True
        finally:
            lock.release()

    def _remove_save(self, folder: Path) -> None:
        """Records first, durably; then the bytes."""
        names = self.fs.list_dir(folder)
        for name in names:
            if kept_named(name) is not None:
                self.fs.unlink(folder / name)
        if names:
            self.fs.fsync_dir(folder)
        self.fs.remove_tree(folder)
        self.fs.remove_dir(folder.parent)  # only if empty: other attempts may have saved the same iteration
