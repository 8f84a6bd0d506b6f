"""The edge between this package and the kernel, where a test lets one call fail: below every line of the real code.

Every call by which the package touches a file below given directories is counted while the edge is armed. The n-th one
fails with an errno, is carried out and then reported as failed, writes or reads only half, or is the last thing that
the process does. The calls are replaced in the modules that the package calls them through (`os`, `fcntl`, and what
`stores/pages.py` maps with), so that no code is left out and none knows.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final

from resilience.stores import pages

__all__ = ["FAULTS", "Edge", "applies"]

_OS_CALLS = (
    *("open", "read", "write", "close", "fsync", "ftruncate", "posix_fallocate", "rename", "unlink", "rmdir", "mkdir"),
    *("listdir", "scandir", "lstat", "stat", "fstat", "statvfs"),
)
_MAKE_DESCRIPTORS = frozenset({"open", "create", "listdir", "scandir", "mmap"})
_NEED_ROOM = frozenset({"create", "write", "close", "fsync", "ftruncate", "posix_fallocate", "rename", "mkdir", "mmap"})
_MOVE_BYTES = frozenset({"read", "write"})
_CHANGE = frozenset({"create", "write", "ftruncate", "posix_fallocate", "rename", "unlink", "rmdir", "mkdir", "fsync"})
_ERRNOS: Final = {"ENOSPC": errno.ENOSPC, "EIO": errno.EIO, "EMFILE": errno.EMFILE, "EINTR": errno.EINTR}
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

#: Each with the calls that can give it. "lie": the call is carried out, and EIO is what is said of it (a shared file
#: system whose answer was lost). "half": a short read or write. "crash": SIGKILL right after the call, if it changes
#: anything on the disk (else it is the crash after the call before); "torn": after half of the bytes.
FAULTS: Final[dict[str, frozenset[str] | None]] = {
    "ENOSPC": _NEED_ROOM,
    "EIO": None,
    "EMFILE": _MAKE_DESCRIPTORS,
    "EINTR": None,
    "lie": _CHANGE,
    "half": _MOVE_BYTES,
    "crash": _CHANGE,
    "torn": frozenset({"write"}),
}


def applies(fault: str, call: str) -> bool:
    """Whether the kernel can answer `call` (as `Edge.seen` has it) in this way."""
    calls = FAULTS[fault]
    return calls is None or call.split(" ", 1)[0] in calls


@dataclass
class _Call:
    name: str
    real: Callable[..., Any]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    def carry_out(self) -> Any:
        return self.real(*self.arguments, **self.options)

    def fail(self, number: int) -> Any:
        """As the kernel: a descriptor is closed even where closing it fails."""
        if self.name == "close":
            self.carry_out()
        raise OSError(number, os.strerror(number))

    def lie(self) -> Any:
        done = self.carry_out()
        if self.name == "open":
            os.close(done)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def half(self) -> Any:
        fd, what = self.arguments
        part = memoryview(what)[: max(1, len(what) // 2)] if self.name == "write" else max(1, what // 2)
        return self.real(fd, part)


class Edge:
    """One fault, at the first call from the `at`th on that can give it; `at` 0 only counts.

    For a process that is about to end: nothing is put back.
    """

    def __init__(self, roots: tuple[str, ...], at: int = 0, fault: str = "EIO") -> None:
        self.armed = False
        self.seen: list[str] = []  # "write /some/file" of every call that was counted
        self.struck = ""  # the call that the fault struck
        self._roots = tuple(os.path.realpath(root) for root in roots)
        self._at = at
        self._fault = fault
        self._guard = threading.Lock()
        self._real_close = os.close

    def install(self) -> Edge:
        for name in _OS_CALLS:
            self._replace(os, name)
        self._replace(fcntl, "lockf")
        mapping = SimpleNamespace(**vars(mmap))
        self._replace(mapping, "mmap", fd_at=0)
        pages.mmap = mapping  # type: ignore[assignment]
        kernel = SimpleNamespace(mmap=pages._libc.mmap, madvise=pages._libc.madvise)
        self._replace(kernel, "mmap", fd_at=4, failed=_MAP_FAILED)
        self._replace(kernel, "madvise", fd_at=None, failed=-1)
        pages._libc = kernel  # type: ignore[assignment]
        return self

    def _replace(self, module: Any, name: str, *, fd_at: int | None = 0, failed: int | None = None) -> None:
        real = getattr(module, name)

        def replaced(*arguments: Any, **options: Any) -> Any:
            if not self.armed:
                return real(*arguments, **options)
            place = self._place(arguments[fd_at], options) if fd_at is not None else "memory"
            if not place:
                return real(*arguments, **options)
            return self._passing(_Call(name, real, arguments, options), place, failed)

        setattr(module, name, replaced)

    def _place(self, what: Any, options: dict[str, Any]) -> str:
        """The file that a call is about, if it lies below the roots; else ""."""
        try:
            if isinstance(what, int):
                path = os.readlink(f"/proc/self/fd/{what}") if what >= 0 else ""
            else:
                path = os.fspath(what)
                if options.get("dir_fd") is not None:
                    path = os.path.join(os.readlink(f"/proc/self/fd/{options['dir_fd']}"), path)
                path = os.path.abspath(path)
        except (OSError, TypeError):
            return ""
        inside = any(path == root or path.startswith(root + "/") for root in self._roots)
        return path if inside else ""

    def _passing(self, call: _Call, place: str, failed: int | None) -> Any:
        created = call.name == "open" and bool(call.arguments[1] & os.O_CREAT)
        said = f"{'create' if created else call.name} {place}"
        with self._guard:
            self.seen.append(said)
            strikes = 0 < self._at <= len(self.seen) and not self.struck and applies(self._fault, said)
            if strikes:
                self.struck = said
        if not strikes:
            return call.carry_out()
        if failed is not None and self._fault in _ERRNOS:  # the C library's way of saying it
            ctypes.set_errno(_ERRNOS[self._fault])
            return failed
        match self._fault:
            case "lie":
                return call.lie()
            case "half":
                return call.half()
            case "torn":
                call.half()
                os.kill(os.getpid(), signal.SIGKILL)
            case "crash":
                with contextlib.suppress(OSError):  # a failure that is usual ends here as well
                    call.carry_out()
                os.kill(os.getpid(), signal.SIGKILL)
        return call.fail(_ERRNOS[self._fault])
