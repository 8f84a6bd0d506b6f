"""Who may write a node's directory of a run: one live job, told by record locks that die with their process.

`fcntl` record locks, not `flock`: a forked data-loader worker would keep the latter after its parent was killed. Record
locks do not conflict within one process and are all lost when *any* descriptor of the file is closed, so a registry
here refuses the second taker and the file is opened once.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import struct
import threading
from pathlib import Path
from typing import Final

from resilience.errors import AnotherJobError, StoreError, UnsafePathError
from resilience.stores.interrupted import again, close_quietly

__all__ = ["ALL_RANKS", "LOCK", "DirectoryLock"]

ALL_RANKS: Final = -1
LOCK: Final = "lock"  # the file in the directory
_RANKS = 1 << 16
_FLOCK: Final = struct.Struct("@hhqqi0q")  # struct flock of Linux, 64-bit: type, whence, start, length, pid
_taken: dict[tuple[int, int], set[int]] = {}
_guard = threading.Lock()


class DirectoryLock:
    """Byte `local_rank` of `<directory>/lock`, or all of it (`ALL_RANKS`: the command line, sweeping)."""

    def __init__(self, directory: Path, local_rank: int) -> None:
        self._path = directory / LOCK
        self._byte = local_rank
        self._fd = -1
        self._key: tuple[int, int] | None = None

    def acquire(self) -> None:
        """Take the lock now; AnotherJobError if a live process holds it."""
        with _guard:
            held = self._refuse_second_taker()
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
                fd = again(os.open, self._path, flags, 0o600)
            except OSError as error:
                if error.errno == errno.ELOOP:
                    raise UnsafePathError(f"the lock {self._path} is a link.", advice="Remove it.") from error
                raise StoreError(f"cannot open the lock {self._path}: {error.strerror}.") from error
            try:
                found = again(os.fstat, fd)
                if not stat.S_ISREG(found.st_mode) or found.st_uid not in (os.geteuid(), 0):
                    raise UnsafePathError(f"the lock {self._path} is no regular file of ours.", advice="Remove it.")
                key = (found.st_dev, found.st_ino)
                start, length = self._range()
                again(fcntl.lockf, fd, fcntl.LOCK_EX | fcntl.LOCK_NB, length, start)
            except OSError as error:
                if not held:  # else closing it would drop the locks that this process has on the file
                    close_quietly(fd)
                if isinstance(error, UnsafePathError):
                    raise
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise self._refusal("another live process") from error
                raise StoreError(f"cannot take the lock {self._path}: {error.strerror}.") from error
            _taken.setdefault(key, set()).add(self._byte)
        self._fd, self._key = fd, key

    def holder(self) -> int | None:
        """Process id of who holds any of these bytes, None if nobody does. Only looks: takes and changes nothing.

        0 stands for a process that cannot be named from here (another container). StoreError if it cannot be told.
        """
        with _guard:
            try:
                found = again(os.lstat, self._path)
                if _taken.get((found.st_dev, found.st_ino)):  # opening and closing it here would drop these locks
                    return os.getpid()
                fd = again(os.open, self._path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            except FileNotFoundError:
                return None
            except OSError as error:
                raise StoreError(f"cannot look at the lock {self._path}: {error.strerror}.") from error
            try:
                start, length = self._range()
                asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, start, length, 0)
                kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(fd, fcntl.F_GETLK, asked))
            except OSError as error:
                raise StoreError(f"cannot look at the lock {self._path}: {error.strerror}.") from error
            finally:
                close_quietly(fd)
        return None if kind == fcntl.F_UNLCK else max(pid, 0)

    def release(self) -> None:
        """Give the lock back; a no-op if it is not held."""
        if self._key is None:
            return
        with _guard:
            held = _taken.get(self._key, set())
            held.discard(self._byte)
            start, length = self._range()
            with contextlib.suppress(OSError):  # a lock that cannot be given back goes with its process
                again(fcntl.lockf, self._fd, fcntl.LOCK_UN, length, start)
            if not held:
                close_quietly(self._fd)
                _taken.pop(self._key, None)
        self._fd, self._key = -1, None

    def _range(self) -> tuple[int, int]:
        return (0, _RANKS) if self._byte == ALL_RANKS else (self._byte, 1)

    def _refuse_second_taker(self) -> set[int]:
        """Before the file is opened: record locks would let this process through, and closing it would drop them.

        Returns the bytes of the file that this process holds.
        """
        try:
            found = again(os.lstat, self._path)
        except FileNotFoundError:
            return set()
        except OSError as error:
            raise StoreError(f"cannot look at the lock {self._path}: {error.strerror}.") from error
        held = _taken.get((found.st_dev, found.st_ino), set())
        if held and (self._byte in held or ALL_RANKS in (self._byte, *held)):
            raise self._refusal("this very process")
        return held

    def _refusal(self, holder: str) -> AnotherJobError:
        return AnotherJobError(
            f"{self._path.parent} is in use by {holder}: two jobs must not write one run.",
            advice="Stop the other job, or give this one another run_id.",
        )
