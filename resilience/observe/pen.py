"""Where lines of the event log are written: by a thread of its own, so that a directory that hangs holds up nobody.

As a rule a line is in the file when `write` returns. A directory that does not answer is waited for once, for a
moment; until it moves again, lines are put aside, up to a bound, and nobody waits.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Final

from resilience.runtime.threads import SYSTEM_THREADS, Threads
from resilience.runtime.worker import Lane
from resilience.stores.interrupted import again, close

__all__ = ["Pen"]

PATIENCE_S: Final = 1.0
_PUT_ASIDE: Final = 1000  # lines


class Pen:
    """Appends lines to one file, which several processes may share. Never raises: `on_error` hears, from any thread."""

    def __init__(self, path: Path, on_error: Callable[[Exception], None], threads: Threads = SYSTEM_THREADS) -> None:
        self._path = path
        self._on_error = on_error
        self._fd: int | None = None
        self._torn = False  # the file may end in part of a line: the next one must not continue it
        self._behind = 0
        self._hangs = False
        self._lane = Lane("events", lambda what, error: on_error(error), threads)
        self._lane.submit("open", self._open)
        self._wait()

    def write(self, line: bytes) -> None:
        """One write for the whole line."""
        if self._hangs and self._lane.wait(0.0):
            self._hangs, self._behind = False, 0
        if self._behind >= _PUT_ASIDE:
            self._on_error(OSError("the directory does not answer, and too much is to be written"))
            return
        self._behind += 1
        self._lane.submit("line", lambda: self._append(line))
        if not self._hangs:
            self._wait()

    def close(self) -> None:
        """Write what was put aside if the directory answers within a moment."""
        self._lane.submit("close", self._close)
        self._lane.close(PATIENCE_S)

    def _wait(self) -> None:
        if self._lane.wait(PATIENCE_S):
            self._behind = 0
            return
        self._hangs = True
        self._on_error(OSError("the directory does not answer"))

    def _open(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        # a pipe that somebody put here would be waited for, and a link may lead to any file of ours
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        fd = again(os.open, self._path, flags, 0o600)
        try:
            if not stat.S_ISREG(again(os.fstat, fd).st_mode):
                raise OSError(f"{self._path} is no regular file")
        except OSError:
            close(fd)
            raise
        self._fd = fd

    def _append(self, line: bytes) -> None:
        if self._fd is None:
            return  # that it could not be opened was told
        line = b"\n" * self._torn + line
        self._torn = True
        if again(os.write, self._fd, line) != len(line):
            raise OSError("only part of a line was written")
        self._torn = False

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
