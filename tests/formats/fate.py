"""Places in the life of a save at which a process is killed: whenever its disk is about to change, or just has."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilience.stores.filesystem import PosixFileSystem

_CHANGING = ("make_dir", "write_atomic", "rename", "unlink", "remove_tree", "fsync_dir")


@dataclass(frozen=True)
class Place:
    """The `number`th passing by of the disk in the save itself, or of the attempt log (whose lane has its own pace)."""

    number: int
    of_log: bool = False


@dataclass
class Fate:
    """Counts what a process does to a directory once it is armed, and kills it at a given place."""

    root: str
    kill_at: Place | None
    armed: bool = False
    count: int = 0
    log_count: int = 0
    along: Sequence[int] = ()  # processes that die in the same moment

    def pass_by(self, path: Path) -> None:
        if not self.armed or not str(path).startswith(self.root):
            return
        of_log = "attempts" in path.relative_to(self.root).parts
        if self.kill_at == Place(self.log_count if of_log else self.count, of_log):
            for process in (*self.along, os.getpid()):
                os.kill(process, signal.SIGKILL)
        if of_log:
            self.log_count += 1
        else:
            self.count += 1

    def watch(self) -> None:
        """From now on the disk passes by here before and after each change, and between two pieces of a file."""
        for name in _CHANGING:
            self._wrap(name)
        write_file = PosixFileSystem.write_file

        def writing(fs: PosixFileSystem, path: Path, chunks: Iterator[memoryview]) -> None:
            def passing() -> Iterator[memoryview]:
                for chunk in chunks:
                    self.pass_by(path)
                    yield chunk
                self.pass_by(path)

            write_file(fs, path, passing())
            self.pass_by(path)

        PosixFileSystem.write_file = writing  # type: ignore[method-assign]

    def _wrap(self, name: str) -> None:
        change = getattr(PosixFileSystem, name)

        def changing(fs: PosixFileSystem, path: Path, *arguments: Any, **options: Any) -> Any:
            self.pass_by(path)
            done = change(fs, path, *arguments, **options)
            self.pass_by(path)
            return done

        setattr(PosixFileSystem, name, changing)
