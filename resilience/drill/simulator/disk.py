"""`FileSystem` for a simulated node: in memory, with everything that a disk may do to whoever trusts it.

Each call is a point at which others may run and the process may die; calls that do several things to a disk (write,
fsync, rename, fsync of the directory) are several points. What is wrong with a mount is told by the mount.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NoReturn

from resilience.drill.simulator.schedule import Process, Scheduler
from resilience.drill.simulator.storage import Directory, Inode, Mount
from resilience.errors import AnotherJobError, CorruptCopyError, StoreError, UnsafePathError
from resilience.stores import pages
from resilience.stores.filesystem import TEMPORARY_PREFIX, FileStat, Lock, MappedFile
from resilience.stores.lock import ALL_RANKS

__all__ = ["SimFileSystem"]

_RECORD_LIMIT = 1 << 20

#: Told of every name that a file gets or loses: the path, and the file (None: the name is gone).
Watch = Callable[[Path, Inode | None], None]


class SimFileSystem:
    """What one process sees: its node's mounts and the shared ones, by the first component of a path."""

    def __init__(self, scheduler: Scheduler, process: Process, mounts: Mapping[str, Mount], watch: Watch) -> None:
        self.moved_bytes = 0
        self._scheduler = scheduler
        self._process = process
        self._mounts = mounts
        self._watch = watch
        self._written = 0

    # -- names --------------------------------------------------------------------------------------------------------

    def make_dir(self, path: Path) -> None:
        mount, parts = self._call("make_dir", path)
        here: Inode | Directory = mount.root
        for part in parts:
            if not isinstance(here, Directory):
                break
            if part not in here.names:
                self._refuse_if_full(mount, "cannot make the directory", path)
                here.put(part, Directory())
            here = here.names[part]
        if not isinstance(here, Directory):
            raise UnsafePathError(f"{path} is no directory (or a link to one).", advice="Remove it.")

    def list_dir(self, path: Path) -> list[str]:
        mount, parts = self._call("list_dir", path)
        found = mount.find(parts)
        return sorted(found.names) if isinstance(found, Directory) else []

    def stat(self, path: Path) -> FileStat | None:
        mount, parts = self._call("stat", path)
        found = mount.find(parts)
        if found is None:
            return None
        is_file = isinstance(found, Inode)
        nbytes = len(found.content) if isinstance(found, Inode) else 0
        return FileStat(nbytes, is_file, not is_file, os.geteuid(), found.number)

    def rename(self, source: Path, target: Path) -> None:
        mount, parts = self._call("rename", source)
        what = f"cannot rename to {target}:"
        entry = mount.find(parts)
        if entry is None:
            _raise(errno.ENOENT, what, source)
        old, new = self._parent(source, what), self._parent(target, what)
        if isinstance(entry, Directory) and target.is_relative_to(source) and target != source:
            _raise(errno.EINVAL, what, source)
        there = new.names.get(target.name)
        if there is entry:
            return
        if isinstance(entry, Directory) and isinstance(there, Inode):
            _raise(errno.ENOTDIR, what, source)
        if isinstance(there, Directory) and (not isinstance(entry, Directory) or there.names):
            _raise(errno.ENOTEMPTY, what, source)
        if new is old:
            old.move(source.name, target.name)
        else:
            new.put(target.name, entry)
            old.drop(source.name)
        if isinstance(entry, Inode):
            self._watch(source, None)
            self._watch(target, entry)
        else:
            self._watch_tree(entry, source, target)

    def unlink(self, path: Path) -> bool:
        mount, parts = self._call("unlink", path)
        entry = mount.find(parts)
        if entry is None:
            self._refuse_below_a_file(mount, parts, path)
            return False
        if isinstance(entry, Directory):
            _raise(errno.EISDIR, "cannot remove", path)
        self._parent(path, "cannot remove").drop(path.name)
        self._watch(path, None)
        return True

    def remove_dir(self, path: Path) -> bool:
        mount, parts = self._call("remove_dir", path)
        entry = mount.find(parts)
        if entry is None:
            self._refuse_below_a_file(mount, parts, path)
        if isinstance(entry, Inode):
            _raise(errno.ENOTDIR, "cannot remove", path)
        if not isinstance(entry, Directory) or entry.names:
            return False
        self._parent(path, "cannot remove").drop(path.name)
        return True

    def remove_tree(self, path: Path) -> None:
        """File by file: a crash leaves half of it."""
        mount, parts = self._call("remove_tree", path)
        entry = mount.find(parts)
        if isinstance(entry, Directory):
            for name, below in sorted(entry.names.items()):
                if isinstance(below, Directory):
                    self.remove_tree(path / name)
                else:
                    self.unlink(path / name)
            self.remove_dir(path)
        elif entry is not None:
            _raise(errno.ENOTDIR, "cannot remove", path)
        else:
            self._refuse_below_a_file(mount, parts, path)

    def fsync_dir(self, path: Path) -> None:
        mount, parts = self._call("fsync_dir", path)
        found = mount.find(parts)
        if not isinstance(found, Directory):
            _raise(errno.ENOENT, "cannot make durable", path)
        if not mount.lies:
            found.sync()

    # -- small files --------------------------------------------------------------------------------------------------

    def read(self, path: Path, limit: int = _RECORD_LIMIT) -> bytes:
        content = self._file("read", path).content
        if len(content) > limit:
            raise CorruptCopyError(f"{path} has {len(content)} bytes where at most {limit} are expected.")
        return bytes(content)

    def write_atomic(self, path: Path, content: bytes, *, durable: bool = True) -> None:
        self._written += 1
        beside = path.with_name(f"{TEMPORARY_PREFIX}{self._written}-{self._process.name}-{path.name}"[:200])
        created = False
        try:
            inode = self._create(beside)
            created = True
            self._write(beside, inode, content)
            if durable:
                self._sync(beside, inode)
            self.rename(beside, path)
            if durable:
                self.fsync_dir(path.parent)
        except OSError as error:
            if created:
                self._unlink_quietly(beside)
            _raise(error.errno or errno.EIO, "cannot write", path)

    def write_file(self, path: Path, chunks: Iterator[memoryview]) -> None:
        try:
            inode = self._create(path)
            for chunk in chunks:
                self._write(path, inode, chunk)
                self.moved_bytes += chunk.nbytes
            self._sync(path, inode)
        except OSError as error:
            if error.errno != errno.EEXIST:
                self._unlink_quietly(path)
            _raise(error.errno or errno.EIO, "cannot write", path)

    # -- mappings -----------------------------------------------------------------------------------------------------

    def create_mapping(self, path: Path, nbytes: int, wanted: Callable[[], bool] = pages.always) -> MappedFile:
        mapped = self.begin_mapping(path, nbytes)
        try:
            self.reserve(mapped, nbytes, wanted)
        except OSError:
            mapped.close()
            self._unlink_quietly(path)
            raise
        return mapped

    def begin_mapping(self, path: Path, nbytes: int) -> MappedFile:
        inode = self._create(path)
        inode.content = bytearray(nbytes)
        mapped = _SimMappedFile(path, inode)
        mapped.reserved = 0
        return mapped

    def reserve(self, mapped: MappedFile, stop: int, wanted: Callable[[], bool]) -> None:
        if stop <= mapped.reserved:
            return
        mount, _ = self._call("reserve", mapped.path)
        self._refuse_if_full(mount, f"cannot reserve {mapped.nbytes} bytes for", mapped.path)
        if not wanted():
            _raise(errno.ECANCELED, f"cannot reserve {mapped.nbytes} bytes for", mapped.path)
        mapped.reserved = stop

    def open_mapping(self, path: Path, *, writable: bool = False, populate: bool = False) -> MappedFile:
        inode = self._file("map", path)
        if not inode.content:
            raise CorruptCopyError(f"{path} is empty.")
        return _SimMappedFile(path, inode if writable else Inode(bytearray(inode.content)))

    # -- what kind of place it is -------------------------------------------------------------------------------------

    def is_memory_backed(self, path: Path) -> bool:
        return self._place(path)[0].kind == "memory"

    def is_network(self, path: Path) -> bool:
        return self._place(path)[0].kind == "shared"

    def free_bytes(self, path: Path) -> int:
        return self._call("free_bytes", path)[0].room

    def lock(self, directory: Path, local_rank: int) -> Lock:
        return _SimLock(self._scheduler, self._process, self._place(directory)[0], directory, local_rank)

    # -- parts of a call ----------------------------------------------------------------------------------------------

    def _place(self, path: Path) -> tuple[Mount, tuple[str, ...]]:
        parts = path.parts
        if len(parts) < 2 or parts[1] not in self._mounts:
            raise StoreError(f"{path} is on no mount of this node.")
        return self._mounts[parts[1]], parts[2:]

    def _call(self, what: str, path: Path) -> tuple[Mount, tuple[str, ...]]:
        mount, parts = self._place(path)
        self._scheduler.point(f"{what} {path}")
        if mount.slow_s:
            self._scheduler.sleep(mount.slow_s)
            mount, parts = self._place(path)
        if mount.failing > 0:
            mount.failing -= 1
            _raise(errno.EIO, f"cannot {what}", path)
        return mount, parts

    def _parent(self, path: Path, what: str) -> Directory:
        mount, parts = self._place(path)
        parent = mount.find(parts[:-1])
        if not isinstance(parent, Directory):
            _raise(errno.ENOENT, what, path)
        return parent

    def _file(self, what: str, path: Path) -> Inode:
        mount, parts = self._call(what, path)
        found = mount.find(parts)
        if found is None:
            self._refuse_below_a_file(mount, parts, path)
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        if not isinstance(found, Inode):
            raise UnsafePathError(f"{path} is no regular file of ours.", advice="Remove it.")
        return found

    def _refuse_below_a_file(self, mount: Mount, parts: tuple[str, ...], path: Path) -> None:
        """A path through a file leads nowhere: that is trouble, and not absence."""
        if any(isinstance(mount.find(parts[:depth]), Inode) for depth in range(1, len(parts))):
            _raise(errno.ENOTDIR, "cannot look at", path)

    def _create(self, path: Path) -> Inode:
        mount, _ = self._call("create", path)
        parent = self._parent(path, "cannot create")
        if path.name in parent.names:
            _raise(errno.EEXIST, "cannot create", path)
        self._refuse_if_full(mount, "cannot create", path)
        inode = Inode()
        parent.put(path.name, inode)
        return inode

    def _write(self, path: Path, inode: Inode, content: bytes | memoryview) -> None:
        mount, _ = self._call("write", path)
        self._scheduler.note("bytes", content)
        self._refuse_if_full(mount, "cannot write", path)
        if mount.tearing > 0:
            mount.tearing -= 1
            inode.content += content[: len(content) // 2]
            _raise(errno.EIO, "cannot write", path)
        inode.content += content

    def _sync(self, path: Path, inode: Inode) -> None:
        mount, _ = self._call("fsync", path)
        if not mount.lies:
            inode.sync()

    def _unlink_quietly(self, path: Path) -> None:
        try:
            self.unlink(path)
        except OSError:
            return

    def _refuse_if_full(self, mount: Mount, what: str, path: Path) -> None:
        if mount.full:
            _raise(errno.ENOSPC, what, path)

    def _watch_tree(self, entry: Directory, source: Path, target: Path) -> None:
        for path, directory in entry.walk(Path()):
            for name, below in directory.names.items():
                if isinstance(below, Inode):
                    self._watch(source / path / name, None)
                    self._watch(target / path / name, below)


class _SimMappedFile(MappedFile):
    """The file's own bytes: who writes them, writes the file."""

    def __init__(self, path: Path, inode: Inode) -> None:
        self.path = path
        self.nbytes = self.reserved = len(inode.content)
        self.huge_bytes: int | None = None
        self.view = memoryview(inode.content)

    def fault_in(
        self, start: int, nbytes: int, wanted: Callable[[], bool] = pages.always, *, writable: bool = True
    ) -> None:
        return

    def enlarge_pages(self, wanted: Callable[[], bool]) -> None:
        return

    def close(self) -> None:
        with contextlib.suppress(BufferError):  # a tensor over it is alive
            self.view.release()


class _SimLock:
    """A record lock: held by a process, and gone with it."""

    def __init__(self, scheduler: Scheduler, process: Process, mount: Mount, directory: Path, local_rank: int) -> None:
        self._scheduler = scheduler
        self._process = process
        self._mount = mount
        self._directory = directory
        self._byte = local_rank
        self._held: dict[int, object] | None = None

    def acquire(self) -> None:
        self._scheduler.point(f"acquire {self._directory}")
        found = self._mount.find(self._directory.parts[2:])
        if not isinstance(found, Directory):
            raise UnsafePathError(f"cannot open the lock {self._directory / 'lock'}: it is not there.")
        held = self._mount.locks.setdefault(found.number, {})
        for byte, holder in list(held.items()):
            if isinstance(holder, Process) and holder.dead:
                del held[byte]
        if self._byte in held or (held and ALL_RANKS in (self._byte, *held)):
            raise AnotherJobError(
                f"{self._directory} is in use by another live process: two jobs must not write one run."
            )
        held[self._byte] = self._process
        self._held = held
        found.names.setdefault("lock", Inode())

    def release(self) -> None:
        self._scheduler.point(f"release {self._directory}")
        if self._held is not None:
            self._held.pop(self._byte, None)
            self._held = None


def _raise(number: int, what: str, path: Path) -> NoReturn:
    error = StoreError(f"{what} {path}: {os.strerror(number)}.")
    error.errno = number
    raise error
