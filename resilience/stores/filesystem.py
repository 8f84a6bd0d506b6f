"""How this package touches a disk: every call that opens, writes, renames or deletes is in this file.

Rules that hold for all of them: links are never followed in the last component, only regular files owned by us (or
root) are opened, reads are bounded by the caller, what must survive a crash is fsynced with its directory, and space is
reserved before it is touched (a full tmpfs is ENOSPC here, never SIGBUS later).
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import mmap
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from resilience.errors import CorruptCopyError, StoreError, UnsafePathError
from resilience.stores import pages
from resilience.stores.interrupted import again, close, close_quietly
from resilience.stores.lock import DirectoryLock
from resilience.stores.mapped_file import MappedFile

__all__ = ["FileStat", "FileSystem", "Lock", "MappedFile", "PosixFileSystem"]

#: Prefix of every file or folder that is not yet what its name will say; swept by the owner's next start.
TEMPORARY_PREFIX = ".tmp-"

_RECORD_LIMIT = 1 << 20
_WRITE_STEP_BYTES = 32 << 20
_MAKE_DIR_ATTEMPTS = 100
_counter = itertools.count()


@dataclass(frozen=True)
class FileStat:
    """What `stat` said without following links."""

    nbytes: int
    is_file: bool
    is_dir: bool
    uid: int
    inode: int
    open_to_others: bool = False  # a directory in which somebody else may rename and remove what is ours
    device: int = 0


class Lock(Protocol):
    """A claim on a directory; see `DirectoryLock`."""

    def acquire(self) -> None:
        """Now; AnotherJobError if a live process holds it."""
        ...

    def release(self) -> None: ...


class FileSystem(Protocol):
    """The port through which stores reach a disk; the cluster simulator puts its own behind it."""

    moved_bytes: int  # written to files so far: whoever waits for a slow disk sees by it that something moves

    def make_dir(self, path: Path) -> None: ...
    def list_dir(self, path: Path) -> list[str]: ...
    def stat(self, path: Path) -> FileStat | None: ...
    def read(self, path: Path, limit: int = _RECORD_LIMIT) -> bytes: ...
    def write_atomic(self, path: Path, content: bytes, *, durable: bool = True) -> None: ...
    def create_mapping(self, path: Path, nbytes: int, wanted: Callable[[], bool] = pages.always) -> MappedFile: ...
    def begin_mapping(self, path: Path, nbytes: int) -> MappedFile: ...
    def reserve(self, mapped: MappedFile, stop: int, wanted: Callable[[], bool]) -> None: ...
    def open_mapping(self, path: Path, *, writable: bool = False, populate: bool = False) -> MappedFile: ...
    def write_file(self, path: Path, chunks: Iterator[memoryview]) -> None: ...
    def rename(self, source: Path, target: Path) -> None: ...
    def unlink(self, path: Path) -> bool: ...
    def remove_dir(self, path: Path) -> bool: ...
    def remove_tree(self, path: Path) -> None: ...
    def fsync_dir(self, path: Path) -> None: ...
    def is_memory_backed(self, path: Path) -> bool: ...
    def free_bytes(self, path: Path) -> int: ...
    def is_network(self, path: Path) -> bool: ...
    def lock(self, directory: Path, local_rank: int) -> Lock: ...


#: What opening a socket, a device that is not there, or a folder (to write) is refused with.
_NOT_OF_A_FILE = frozenset({errno.ENXIO, errno.ENODEV, errno.EISDIR})


class PosixFileSystem:
    """The real disk."""

    moved_bytes = 0

    def make_dir(self, path: Path) -> None:
        """Make `path` and its parents, each new one 0700; the last one must be ours and no link."""
        for attempt in itertools.count():
            try:
                _make_missing(path)
                found = again(os.lstat, path)
                break
            except OSError as error:
                # a parent was empty, and another rank removed it meanwhile; that cannot go on for ever
                if not isinstance(error, (FileNotFoundError, FileExistsError)) or attempt >= _MAKE_DIR_ATTEMPTS:
                    raise _store_error("cannot make the directory", path, error) from error
        if not stat.S_ISDIR(found.st_mode):
            raise UnsafePathError(f"{path} is no directory (or a link to one).", advice="Remove it.")
        if found.st_uid not in (os.geteuid(), 0):
            raise UnsafePathError(
                f"{path} belongs to uid {found.st_uid}, not to {os.geteuid()}.", advice="Choose another directory."
            )

    def list_dir(self, path: Path) -> list[str]:
        """Names in `path`, sorted; empty if it does not exist. Any other failure is a StoreError."""
        try:
            return sorted(again(os.listdir, path))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError as error:
            raise _store_error("cannot list", path, error) from error

    def stat(self, path: Path) -> FileStat | None:
        """None if nothing is there; a link is reported as neither file nor directory."""
        try:
            found = again(os.lstat, path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise _store_error("cannot look at", path, error) from error
        return FileStat(
            found.st_size,
            stat.S_ISREG(found.st_mode),
            stat.S_ISDIR(found.st_mode),
            found.st_uid,
            found.st_ino,
            open_to_others=bool(found.st_mode & 0o022) and not found.st_mode & stat.S_ISVTX,
            device=found.st_dev,
        )

    def read(self, path: Path, limit: int = _RECORD_LIMIT) -> bytes:
        """The whole of a small file. FileNotFoundError if absent; CorruptCopyError above `limit` bytes."""
        with self._open(path) as (fd, nbytes):
            if nbytes > limit:
                raise CorruptCopyError(f"{path} has {nbytes} bytes where at most {limit} are expected.")
            return _read_all(fd, nbytes, path)

    def write_atomic(self, path: Path, content: bytes, *, durable: bool = True) -> None:
        """Write beside, fsync, rename, fsync the directory:

        afterwards `path` holds all of `content` or is as before.
        """
        # process ids repeat from one container to the next, so chance has a part in the name
        unique = f"{os.getpid()}-{next(_counter)}-{secrets.token_hex(4)}"
        beside = path.with_name(f"{TEMPORARY_PREFIX}{unique}-{path.name}"[:200])
        created = False
        try:
            fd = _open_new(beside, os.O_WRONLY)
            created = True
            try:
                _write_all(fd, memoryview(content))
                if durable:
                    again(os.fsync, fd)
            finally:
                close(fd)
            again(os.rename, beside, path)
            if durable:
                self.fsync_dir(path.parent)
        except OSError as error:
            if created or error.errno != errno.EEXIST:  # no other writer draws this name
                _unlink_quietly(beside)
            raise _store_error("cannot write", path, error) from error

    def create_mapping(self, path: Path, nbytes: int, wanted: Callable[[], bool] = pages.always) -> MappedFile:
        """A new file of `nbytes`, reserved, mapped and pre-faulted. Nothing is left behind when it fails.

        `wanted` is asked every now and then; once it says no, that is a StoreError (ECANCELED).
        """
        mapped = self.begin_mapping(path, nbytes)
        try:
            self.reserve(mapped, nbytes, wanted)
            mapped.fault_in(0, nbytes, wanted)
        except OSError as error:
            mapped.close()
            _unlink_quietly(path)
            raise _store_error(f"cannot reserve {nbytes} bytes for", path, error) from error
        return mapped

    def begin_mapping(self, path: Path, nbytes: int) -> MappedFile:
        """A new file of `nbytes`, mapped, but without any room as yet: `reserve` before a byte of it is touched."""
        try:
            fd = _open_new(path, os.O_RDWR)
        except OSError as error:
            raise _store_error("cannot create", path, error) from error
        try:
            again(os.ftruncate, fd, nbytes)
            mapped = MappedFile(path, *pages.map_file(fd, nbytes, mmap.MAP_SHARED), nbytes)
        except OSError as error:
            _unlink_quietly(path)
            raise _store_error(f"cannot map {nbytes} bytes for", path, error) from error
        finally:
            close_quietly(fd)
        mapped.reserved = 0
        return mapped

    def reserve(self, mapped: MappedFile, stop: int, wanted: Callable[[], bool]) -> None:
        """Give what was only begun room up to byte `stop` (of whole pages, or all); its pages are not mapped yet.

        StoreError: the mount is full, or `wanted` says no (ECANCELED).
        """
        start, nbytes = mapped.reserved, stop - mapped.reserved
        if nbytes <= 0:
            return
        try:
            with self._open(mapped.path, os.O_RDWR) as (fd, _):
                pages.reserve(fd, nbytes, wanted, start=start)
        except OSError as error:
            what = f"cannot reserve {mapped.nbytes} bytes for"
            raise _store_error(what, mapped.path, error) from error
        mapped.reserved = stop

    def open_mapping(self, path: Path, *, writable: bool = False, populate: bool = False) -> MappedFile:
        """Map an existing file;

        FileNotFoundError if absent. Not `writable`: private, so that it can never be changed.
        """
        with self._open(path, os.O_RDWR if writable else os.O_RDONLY) as (fd, nbytes):
            if nbytes == 0:
                raise CorruptCopyError(f"{path} is empty.")
            flags = mmap.MAP_SHARED if writable else mmap.MAP_PRIVATE
            try:
                if writable:  # a sparse file would be SIGBUS on a full mount
                    pages.reserve(fd, nbytes, pages.always)
                mapped = MappedFile(path, *pages.map_file(fd, nbytes, flags), nbytes)
            except OSError as error:
                raise _store_error("cannot map", path, error) from error
        try:
            if populate:
                mapped.fault_in(0, nbytes, writable=writable)
        except OSError as error:
            mapped.close()
            raise _store_error("cannot map", path, error) from error
        return mapped

    def write_file(self, path: Path, chunks: Iterator[memoryview]) -> None:
        """Write `chunks` to a new file and fsync it (not its directory). The file is removed when that fails."""
        created = False
        try:
            fd = _open_new(path, os.O_WRONLY)
            created = True
            try:
                for chunk in chunks:
                    for start in range(0, chunk.nbytes, _WRITE_STEP_BYTES):
                        part = chunk[start : start + _WRITE_STEP_BYTES]
                        _write_all(fd, part)
                        self.moved_bytes += part.nbytes
                again(os.fsync, fd)
            finally:
                close(fd)
        except OSError as error:
            if created:  # else what lies there is another's
                _unlink_quietly(path)
            raise _store_error("cannot write", path, error) from error

    def rename(self, source: Path, target: Path) -> None:
        try:
            again(os.rename, source, target)
        except OSError as error:
            raise _store_error(f"cannot rename to {target}:", source, error) from error

    def unlink(self, path: Path) -> bool:
        """True if something was removed, False if nothing was there."""
        try:
            again(os.unlink, path)
        except FileNotFoundError:
            return False
        except OSError as error:
            raise _store_error("cannot remove", path, error) from error
        return True

    def remove_dir(self, path: Path) -> bool:
        """Remove an empty folder; False if something is in it, or nothing was there."""
        try:
            again(os.rmdir, path)
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST):
                return False
            raise _store_error("cannot remove", path, error) from error
        return True

    def remove_tree(self, path: Path) -> None:
        """Remove a folder that we wrote; a link in its place is unlinked, not followed."""
        try:
            if stat.S_ISLNK(again(os.lstat, path).st_mode):
                again(os.unlink, path)
            else:
                again(shutil.rmtree, path)
        except FileNotFoundError:
            return
        except OSError as error:
            raise _store_error("cannot remove", path, error) from error

    def fsync_dir(self, path: Path) -> None:
        try:
            fd = again(os.open, path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                again(os.fsync, fd)
            finally:
                close_quietly(fd)
        except OSError as error:
            raise _store_error("cannot make durable", path, error) from error

    def fsync_file(self, path: Path) -> None:
        """What was written to the file, through mappings too, is on the disk afterwards."""
        try:
            with self._open(path, os.O_RDWR) as (fd, _):
                again(os.fsync, fd)
        except OSError as error:
            raise _store_error("cannot make durable", path, error) from error

    def is_memory_backed(self, path: Path) -> bool:
        """Whether `path` (or its nearest existing parent) lies on tmpfs or ramfs."""
        return _filesystem_type(path) in {"tmpfs", "ramfs"}

    def is_network(self, path: Path) -> bool:
        return _filesystem_type(path) in {"nfs", "nfs4", "lustre", "cifs", "gpfs", "beegfs", "ceph", "fuse.sshfs"}

    def lock(self, directory: Path, local_rank: int) -> Lock:
        """The directory's lock for one rank of the node, or for `ALL_RANKS`; not yet taken."""
        return DirectoryLock(directory, local_rank)

    def free_bytes(self, path: Path) -> int:
        """Bytes that an unprivileged process may still write below `path`."""
        try:
            found = again(os.statvfs, _existing(path))
        except OSError as error:
            raise _store_error("cannot look at", path, error) from error
        return found.f_bavail * found.f_frsize

    def _open(self, path: Path, flags: int = os.O_RDONLY) -> _Descriptor:
        try:
            # O_NONBLOCK: opening a FIFO that somebody put here must not hang
            fd = again(os.open, path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise UnsafePathError(f"{path} is a link; links are not followed.", advice="Remove it.") from error
            if error.errno in _NOT_OF_A_FILE:  # which would make all that lies beside it unknown
                raise UnsafePathError(f"{path} is no regular file: {error.strerror}.", advice="Remove it.") from error
            raise _store_error("cannot open", path, error) from error
        try:
            found = again(os.fstat, fd)
        except OSError as error:
            close_quietly(fd)
            raise _store_error("cannot look at", path, error) from error
        if not stat.S_ISREG(found.st_mode) or found.st_uid not in (os.geteuid(), 0):
            close_quietly(fd)
            raise UnsafePathError(f"{path} is no regular file of ours (uid {found.st_uid}).", advice="Remove it.")
        return _Descriptor(fd, found.st_size)


class _Descriptor:
    """An open file and its length."""

    def __init__(self, fd: int, nbytes: int) -> None:
        self._fd = fd
        self._nbytes = nbytes

    def __enter__(self) -> tuple[int, int]:
        return self._fd, self._nbytes

    def __exit__(self, *_: object) -> None:
        close_quietly(self._fd)


def _store_error(what: str, path: Path, error: OSError) -> StoreError:
    if isinstance(error, StoreError):
        return error
    advice = "Free space or point the directory elsewhere." if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    raised = StoreError(f"{what} {path}: {error.strerror or error}.", advice=advice)
    raised.errno = error.errno
    return raised


def no_space(what: str, path: Path) -> StoreError:
    """For a caller that does not even try."""
    return _store_error(what, path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def _read_all(fd: int, nbytes: int, path: Path) -> bytes:
    parts: list[bytes] = []
    while nbytes > 0:
        try:
            part = again(os.read, fd, nbytes)
        except OSError as error:
            raise _store_error("cannot read", path, error) from error
        if not part:
            raise CorruptCopyError(f"{path} ended {nbytes} bytes early.")
        parts.append(part)
        nbytes -= len(part)
    return b"".join(parts)


def _write_all(fd: int, content: memoryview) -> None:
    while content:
        content = content[again(os.write, fd, content) :]


def _open_new(path: Path, access: int) -> int:
    return again(os.open, path, access | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


def _make_missing(path: Path) -> None:
    missing = itertools.takewhile(lambda parent: not os.path.lexists(parent), (path, *path.parents))
    for parent in reversed(list(missing)):  # `parents=True` would leave the umask's mode on all but the last
        again(parent.mkdir, mode=0o700, exist_ok=True)


def _unlink_quietly(path: Path) -> None:
    """For the way out of a failure that is being raised already."""
    with contextlib.suppress(OSError):
        again(os.unlink, path)


def _existing(path: Path) -> Path:
    path = Path(os.path.abspath(path))
    while path != path.parent:
        try:
            again(os.stat, path)
        except (FileNotFoundError, NotADirectoryError):
            path = path.parent
        except OSError:
            break  # it is there: what is wrong with it is told by whatever is asked of it next
        else:
            break
    return path


def _filesystem_type(path: Path) -> str:
    """Type of the mount below which `path` lies, from /proc/self/mounts; "" where that cannot be told."""
    wanted = str(_existing(path).resolve())
    best, kind = -1, ""
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        fields = line.split()
        if len(fields) < 3:
            continue
        mount = fields[1].replace("\\040", " ")
        inside = wanted == mount or wanted.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= best:
            best, kind = len(mount), fields[2]
    return kind
