"""What a simulated mount holds, and what of it outlives what: the durable state beside the one that processes see.

A file's bytes and a directory's names become durable by their fsync, one by one. When the power fails, of each
directory's changes since its last fsync a prefix survives, and of a file's bytes none, all, or the first part: as the
seed says. A mount of memory keeps nothing. A killed process takes nothing with it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

__all__ = ["Directory", "Inode", "Mount", "MountKind"]

MountKind = Literal["memory", "disk", "shared"]

_numbers = itertools.count(1)
_ROOM: Final = 1 << 30


@dataclass(eq=False)
class Inode:
    """A file. `durable` None: a power failure leaves nothing certain of it."""

    content: bytearray = field(default_factory=bytearray)
    durable: bytes | None = None
    number: int = field(default_factory=lambda: next(_numbers))

    def sync(self) -> None:
        self.durable = bytes(self.content)

    def after_power_failure(self, chance: random.Random) -> Inode:
        found = Inode(number=self.number)
        written, certain = bytes(self.content), self.durable
        if certain is not None and (written == certain or chance.random() < 0.5):
            found.content = bytearray(certain)
        else:
            kept = chance.choice((0, len(written) // 2, len(written)))
            found.content = bytearray(written[:kept] + bytes(len(written) - kept)) if kept else bytearray()
        found.sync()
        return found


@dataclass(eq=False)
class Directory:
    """Names as processes see them, those that are durable, and the changes between the two, in order."""

    names: dict[str, Inode | Directory] = field(default_factory=dict)
    durable: dict[str, Inode | Directory] = field(default_factory=dict)
    changes: list[dict[str, Inode | Directory | None]] = field(default_factory=list)  # each atomic
    number: int = field(default_factory=lambda: next(_numbers))

    def put(self, name: str, entry: Inode | Directory) -> None:
        self._change({name: entry})

    def drop(self, name: str) -> None:
        self._change({name: None})

    def move(self, name: str, target: str) -> None:
        """Within this directory: a power failure leaves the entry under one of the two names."""
        self._change({target: self.names[name], name: None})

    def _change(self, change: dict[str, Inode | Directory | None]) -> None:
        self.changes.append(change)
        _apply(change, self.names)

    def sync(self) -> None:
        self.durable = dict(self.names)
        self.changes.clear()

    def after_power_failure(self, chance: random.Random) -> Directory:
        survivors = dict(self.durable)
        for change in self.changes[: chance.randint(0, len(self.changes))]:
            _apply(change, survivors)
        found = Directory(number=self.number)
        found.names = {name: entry.after_power_failure(chance) for name, entry in sorted(survivors.items())}
        found.durable = dict(found.names)
        return found

    def walk(self, path: Path) -> Iterator[tuple[Path, Directory]]:
        """This directory and all below it."""
        yield path, self
        for name, entry in list(self.names.items()):
            if isinstance(entry, Directory):
                yield from entry.walk(path / name)


def _apply(change: dict[str, Inode | Directory | None], names: dict[str, Inode | Directory]) -> None:
    for name, entry in change.items():
        if entry is None:
            names.pop(name, None)
        else:
            names[name] = entry


@dataclass(eq=False)
class Mount:
    """One file system: of a node, or shared. What is wrong with it now is said by its fields."""

    kind: MountKind
    root: Directory = field(default_factory=Directory)
    locks: dict[int, dict[int, object]] = field(default_factory=dict)  # by directory, then byte: which process
    full: bool = False  # nothing more can be written
    slow_s: float = 0.0  # each call takes so long
    lies: bool = False  # fsync says yes and does nothing
    failing: int = 0  # so many of the next calls are EIO
    tearing: int = 0  # so many of the next writes stop half way, with EIO

    @property
    def room(self) -> int:
        return 0 if self.full else _ROOM

    def fail_power(self, chance: random.Random) -> None:
        """The node (or the storage server) loses power."""
        self.root = Directory() if self.kind == "memory" else self.root.after_power_failure(chance)
        self.locks.clear()

    def wipe(self) -> None:
        self.root = Directory()
        self.locks.clear()

    def find(self, parts: tuple[str, ...]) -> Inode | Directory | None:
        found: Inode | Directory = self.root
        for part in parts:
            if not isinstance(found, Directory) or part not in found.names:
                return None
            found = found.names[part]
        return found
