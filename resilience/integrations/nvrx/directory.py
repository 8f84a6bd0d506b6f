"""A session's directory on this node: the files that NVRx's users know, and beside them the records that prove them.

    <root>/<session>/<rank>/iter_0000005_3_local.pt             a shard: the rank's own, or one it keeps for another
    <root>/<session>/<rank>/iter_0000005_3_local.<…>.dirty.pt   one that is not whole yet
    <root>/<session>/.records/<rank>/iter_0000005.json          which of them are whole, of which save; digests
    <root>/<session>/.records/directory                         what tells this directory from those of other nodes
    <root>/<session>/.spare/<rank>/<…>                          memory of removed shards, for the next ones

No record, no checkpoint. A rank's directory holds shards and nothing else of ours, as its users expect; files of other
names are left alone. Records are written last and removed first.
"""

from __future__ import annotations

import itertools
import logging
import re
import secrets
import socket
import threading
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from resilience.errors import CorruptCopyError, StoreError
from resilience.integrations.nvrx.choice import Found
from resilience.planning.typed_json import from_plain
from resilience.snapshot.arena import Arena
from resilience.stores.digest import is_digest
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.records import seal_json, unseal_json

__all__ = ["RankDirectory", "Session", "Shard", "file_name", "parse_name"]

_LOG = logging.getLogger(__name__)

_SHARD: Final = re.compile(r"iter_(\d{7,18})_(\d{1,9})_local\.pt")
_DIRTY: Final = re.compile(r"iter_\d{7,18}_\d{1,9}_local\..*dirty\.pt")
_RECORD: Final = re.compile(r"iter_(\d{7,18})\.json")
_RECORDS, _SPARE = ".records", ".spare"
_MOST_SPARES: Final = 8  # of a rank; more come together only where shards change their size


def file_name(iteration: int | str, owner: int | str, suffix: str = "") -> str:
    """`iter_0000005_3_local.pt`; `suffix` comes before the `.pt`. Text (a pattern) is put in as it is."""
    number = f"{iteration:07d}" if isinstance(iteration, int) else iteration
    return f"iter_{number}_{owner}_local{suffix}.pt"


def parse_name(name: str) -> tuple[int, int] | None:
    """Iteration and owner; None if it is no shard's name."""
    match = _SHARD.fullmatch(name)
    return (int(match[1]), int(match[2])) if match else None


@dataclass(frozen=True)
class Shard:
    """What a record says of one file."""

    nbytes: int
    digest: str


@dataclass(frozen=True)
class _Record:
    iteration: int
    save: str
    world_size: int
    shards: dict[int, Shard]


class Session:
    """All of one session's directories that this node has."""

    def __init__(self, root: Path, session_id: str, fs: PosixFileSystem) -> None:
        self.path = root / session_id
        self._mark = self.path / _RECORDS / "directory"
        self._fs = fs

    def node(self) -> str:
        """What names this directory among those of other nodes. Makes it. StoreError."""
        self._fs.make_dir(self.path)
        found = self._fs.stat(self.path)
        if found is None:
            raise StoreError(f"{self.path} was removed.")
        return f"{socket.gethostname()}:{found.device}:{found.inode}"

    def mark(self) -> None:
        """Give the directory a name that stays with it, unless it has one. StoreError."""
        if self._fs.stat(self._mark) is None:
            self._fs.make_dir(self._mark.parent)
            self._fs.write_atomic(self._mark, secrets.token_hex(16).encode(), durable=False)

    def marked(self) -> str:
        """That name, the same on all hosts that share the directory, once all have called `mark`. StoreError."""
        try:
            return self._fs.read(self._mark, limit=64).decode("ascii", "replace")
        except (FileNotFoundError, CorruptCopyError) as error:
            raise StoreError(f"{self._mark} cannot be read: {error}") from error

    def folders(self) -> list[str]:
        """The ranks' directories that have, or had, something in them. StoreError."""
        here = {*self._fs.list_dir(self.path), *self._fs.list_dir(self.path / _RECORDS)}
        return sorted(name for name in here if name.isascii() and name.isdecimal())

    def found(self) -> list[Found]:
        """Every committed copy that is there and as long as it should be. StoreError if that cannot be told."""
        return [found for folder in self.folders() for found in self.rank(folder).found()]

    def rank(self, rank: int | str) -> RankDirectory:
        return RankDirectory(self.path, str(rank), self._fs)

    def tidy(self, living: Collection[int], oldest: int) -> None:
        """Remove what ranks that do not write here any more, unlike `living`, left of iterations before `oldest`.

        StoreError.
        """
        for folder in set(self.folders()) - {str(rank) for rank in living}:
            orphan = self.rank(folder)
            orphan.sweep()
            orphan.remove([each for each in orphan.iterations() if each < oldest])


@dataclass
class _Spares:
    """Files of removed shards, still mapped, by length: warm memory for the next ones."""

    by_length: dict[int, list[Arena]] = field(default_factory=dict)

    def take(self, nbytes: int) -> Arena | None:
        kept = self.by_length.get(nbytes)
        return kept.pop() if kept else None

    def put(self, arena: Arena) -> None:
        self.by_length.setdefault(arena.nbytes, []).append(arena)

    @property
    def full(self) -> bool:
        return sum(map(len, self.by_length.values())) >= _MOST_SPARES

    def drain(self) -> list[Arena]:
        drained = [arena for each in self.by_length.values() for arena in each]
        self.by_length.clear()
        return drained


class RankDirectory:
    """One rank's. Only that rank's process changes it."""

    def __init__(self, session: Path, folder: str, fs: PosixFileSystem) -> None:
        self.folder = folder
        self.path = session / folder
        self._records = session / _RECORDS / folder
        self._spare = session / _SPARE / folder
        self._fs = fs
        self._live: dict[tuple[int, int], Arena] = {}  # of shards that were written here and are mapped still
        self._spares = _Spares()
        self._changing = threading.RLock()  # the training thread takes spares, the background gives them
        self._count = itertools.count()

    def make(self) -> None:
        """Make it, and remove what a process that died left half done. StoreError."""
        self._fs.make_dir(self.path)
        self.sweep()

    def sweep(self) -> None:
        """Remove what is not whole. StoreError."""
        for name in self._fs.list_dir(self.path):
            if _DIRTY.fullmatch(name):
                self._fs.unlink(self.path / name)
        self._fs.remove_tree(self._spare)

    def shard(self, iteration: int, owner: int) -> Path:
        return self.path / file_name(iteration, owner)

    def begin(self, iteration: int, owner: int, nbytes: int) -> Arena:
        """A file of this length for a shard that is on its way, mapped and warm. StoreError if there is no room."""
        self._fs.make_dir(self.path)
        path = self.path / file_name(iteration, owner, f".{secrets.token_hex(4)}.dirty")
        with self._changing:
            arena = self._spares.take(nbytes)
            if arena is not None and self._renamed(arena, path):
                return arena
        return Arena(self._fs.create_mapping(path, nbytes))

    def finish(self, arena: Arena, iteration: int, owner: int) -> None:
        """Give a whole shard its name. StoreError."""
        if not self._fs.is_memory_backed(self.path):
            self._fs.fsync_file(arena.mapped.path)
        path = self.shard(iteration, owner)
        self._fs.rename(arena.mapped.path, path)
        arena.mapped.path = path
        self._live[iteration, owner] = arena
        _LOG.info("written %s", path)

    def discard(self, arena: Arena, *, reusable: bool = True) -> None:
        """What was begun comes to nothing. Not `reusable`: a broken link may still write into it."""
        if not (reusable and self._keep_spare(arena)):
            self._fs.unlink(arena.mapped.path)
            if reusable:
                arena.close()

    def commit(self, iteration: int, save: str, world_size: int, shards: Mapping[int, Shard]) -> None:
        """From here on these shards, which have their names, count. StoreError."""
        missing = [owner for owner in shards if not self._is_there(iteration, owner, shards[owner])]
        if missing:
            raise StoreError(f"{self.shard(iteration, missing[0])} is not there after it was written.")
        durable = not self._fs.is_memory_backed(self.path)
        if durable:
            self._fs.fsync_dir(self.path)
        self._fs.make_dir(self._records)
        fields = {
            "iteration": iteration,
            "save": save,
            "world_size": world_size,
            "shards": {str(owner): vars(shard) for owner, shard in sorted(shards.items())},
        }
        self._fs.write_atomic(self._record(iteration), seal_json(fields), durable=durable)

    def prepare(self, iteration: int, save: str) -> None:
        """Shards of `save` are about to get their names: those of another attempt at it count no longer. StoreError."""
        record = self._read(iteration)
        if record is None or record.save != save:
            self._fs.unlink(self._record(iteration))

    def extend(self, iteration: int, save: str, world_size: int, shards: Mapping[int, Shard]) -> None:
        """Commit these beside those of the same save that are here already. StoreError."""
        here = self.committed(iteration, save)
        self.commit(iteration, save, world_size, {**here, **shards})

    def committed(self, iteration: int, save: str) -> Mapping[int, Shard]:
        """The shards of this save that count here, by owner. StoreError."""
        record = self._read(iteration)
        if record is None or record.save != save:
            return {}
        return {owner: each for owner, each in record.shards.items() if self._is_there(iteration, owner, each)}

    def iterations(self) -> list[int]:
        """Of which something is here, whole or not, ascending. StoreError."""
        shards = {parsed[0] for name in self._fs.list_dir(self.path) if (parsed := parse_name(name))}
        records = {int(match[1]) for name in self._fs.list_dir(self._records) if (match := _RECORD.fullmatch(name))}
        return sorted(shards | records)

    def found(self) -> list[Found]:
        """The committed copies that are as long as they should be. StoreError."""
        copies = []
        for iteration in self.iterations():
            record = self._read(iteration)
            if record is None:
                _LOG.warning("%s has shards of iteration %d without a record: they do not count", self.path, iteration)
                continue
            copies += [
                Found(iteration, record.save, owner, self.folder, record.world_size, shard.nbytes, shard.digest)
                for owner, shard in sorted(record.shards.items())
                if self._is_there(iteration, owner, shard)
            ]
        return copies

    def open(self, found: Found) -> Arena:
        """Its bytes, mapped; they are not compared with its digest here. StoreError, CorruptCopyError."""
        try:
            return Arena(self._fs.open_mapping(self.shard(found.iteration, found.owner), populate=True))
        except FileNotFoundError as error:
            raise StoreError(f"{self.shard(found.iteration, found.owner)} is gone.") from error

    def remove(self, iterations: Iterable[int]) -> Callable[[], None]:
        """Take these away, at once; what is returned frees their memory, which takes longer. StoreError."""
        doomed = set(iterations)
        for iteration in sorted(doomed):
            self._fs.unlink(self._record(iteration))
        gone: list[Arena] = []
        for name in self._fs.list_dir(self.path):
            parsed = parse_name(name)
            if parsed is None or parsed[0] not in doomed:
                continue
            arena = self._live.pop(parsed, None)
            if arena is None or not self._keep_spare(arena):
                self._fs.unlink(self.path / name)
                gone += [] if arena is None else [arena]

        def free() -> None:
            for arena in gone:
                arena.close()

        return free

    def close(self) -> None:
        """Forget what is mapped; spare memory goes."""
        for arena in self._spares.drain():
            arena.close()
        self._fs.remove_tree(self._spare)
        for arena in self._live.values():
            arena.close()
        self._live.clear()

    def _keep_spare(self, arena: Arena) -> bool:
        """Keep the file of a shard that is not needed; False if there are enough of them."""
        spare = self._spare / f"{next(self._count)}-{secrets.token_hex(4)}"
        with self._changing:
            if self._spares.full:
                return False
            try:
                self._fs.make_dir(self._spare)
                self._fs.rename(arena.mapped.path, spare)
            except OSError:
                return False
            arena.mapped.path = spare
            self._spares.put(arena)
        return True

    def _renamed(self, arena: Arena, path: Path) -> bool:
        """Whether spare memory could be had; if not (somebody cleared the directory) it is forgotten."""
        try:
            self._fs.rename(arena.mapped.path, path)
        except OSError:
            arena.close()
            return False
        arena.mapped.path = path
        return True

    def _record(self, iteration: int) -> Path:
        return self._records / f"iter_{iteration:07d}.json"

    def _read(self, iteration: int) -> _Record | None:
        path = self._record(iteration)
        try:
            fields = unseal_json(self._fs.read(path), str(path))
            fields.pop("schema_version", None)
            record: _Record = from_plain(_Record, fields, str(path))
        except FileNotFoundError:
            return None
        except (CorruptCopyError, RuntimeError) as error:
            _LOG.warning("%s does not count: %s", path, error)
            return None
        if record.iteration != iteration or not all(is_digest(shard.digest) for shard in record.shards.values()):
            _LOG.warning("%s does not count: it is the record of something else", path)
            return None
        return record

    def _is_there(self, iteration: int, owner: int, shard: Shard) -> bool:
        found = self._fs.stat(self.shard(iteration, owner))
        return found is not None and found.is_file and found.nbytes == shard.nbytes
