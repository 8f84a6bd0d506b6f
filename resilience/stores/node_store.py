"""A node's directory of a run: which copies lie there, how one is committed, how one is deleted.

    <base>/<run_id>/<node_id>/iter_0000035/g0002-3f9ac01b/rank_00003-of-00008.safetensors   a shard
                                                          rank_00003-of-00008.json          its record, written last
                                                          parity_00000_02.safetensors       parity: clique, member
                                                          complete.json                     the save's certificate
                              attempts/g0002-3f9ac01b.json
                              .arenas/                                                      free and filling buffers
                              lock

No record, no copy: a shard is committed by the rename that brings its record, and deleted by unlinking the record
first. Deletion happens only in this node's own directory, or in one beside it whose lock could be taken.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from resilience.errors import (
    AnotherJobError,
    CorruptCopyError,
    NotAuthenticError,
    ResilienceError,
    StoreError,
    UnsafePathError,
)
from resilience.planning.inventory import (
    AttemptLog,
    Inventory,
    Kept,
    NodeSave,
    ParityCopy,
    ParityName,
    SaveId,
    Tier,
    named,
)
from resilience.stores.authentication import UNSEALED, Seal
from resilience.stores.digest import segments
from resilience.stores.filesystem import TEMPORARY_PREFIX, FileSystem
from resilience.stores.lock import ALL_RANKS
from resilience.stores.records import (
    ShardRecord,
    decode_attempt_log,
    decode_certificate,
    decode_record,
    encode_attempt_log,
    encode_certificate,
    encode_record,
    is_name,
)

__all__ = ["CopyLocation", "NodeStore", "file_name", "locate_copy"]

CERTIFICATE: Final = "complete.json"
ATTEMPTS: Final = "attempts"
_ITERATION = re.compile(r"iter_(\d{7,16})")
_GENERATION = re.compile(r"g\d{4,}-[0-9a-f]{8}")
_RECORD = re.compile(r"rank_(\d{5,7})-of-(\d{5,7})\.json|parity_(\d{5,7})_(\d{2,3})\.json")


def file_name(kept: Kept, world_size: int) -> str:
    """File name of a shard or of parity, without its ending."""
    if isinstance(kept, ParityName):
        return f"parity_{kept.clique:05d}_{kept.index:02d}"
    return f"rank_{kept:05d}-of-{world_size:05d}"


@dataclass(frozen=True)
class CopyLocation:
    """A committed copy: its record and where its bytes lie."""

    record: ShardRecord
    path: Path


#: What a small file of a node's directory turns out to be: the save is that of a certificate.
Found = AttemptLog | SaveId | CopyLocation | ResilienceError


class NodeStore:
    """The copies below one base directory, on one node. Shared by the node's ranks, each writing its own files."""

    def __init__(
        self, base: Path, run_id: str, node_id: str, tier: Tier, fs: FileSystem, seal: Seal = UNSEALED
    ) -> None:
        """`seal`: of the small files; with a key those without its MAC count as not there."""
        self.seal = seal
        self.base = base
        self.run_id = run_id
        self.node_id = node_id
        self.tier: Tier = tier
        self.fs = fs
        self.root = base / run_id / node_id
        self.arenas = self.root / ".arenas"
        self._durable = True
        self._owed: AttemptLog | None = None  # what has to lie here before the next copy does

    def prepare(self) -> None:
        """Make the directories. Local; any rank, before it takes the lock."""
        base = Path(os.path.realpath(self.base))  # a person may give a link to it
        for folder in (base, self.root.parent, self.root, self.root / ATTEMPTS, self.arenas):
            self.fs.make_dir(folder)  # each must be ours: who owns one may swap its files
            found = self.fs.stat(folder)
            if found is not None and found.open_to_others:
                raise UnsafePathError(f"others may swap files in {folder}.", advice=f"Run chmod go-w {folder}.")
        # a memory-backed mount loses everything with the node: fsync there would only cost time
        self._durable = not self.fs.is_memory_backed(self.root)
        if self._durable:  # what is durable in a directory is lost with the directory's own name
            with contextlib.suppress(StoreError):  # above the base nothing is ours
                self.fs.fsync_dir(base.parent)
            for folder in (base, self.root.parent, self.root):
                self.fs.fsync_dir(folder)

    @property
    def memory_backed(self) -> bool:
        return not self._durable

    # -- reading ------------------------------------------------------------------------------------------------------

    def inventory(self, only: Iterable[str] | None = None) -> Inventory:
        """Everything of this run that lies below the base, in whoever's directory (host names change), or `only` these.

        An I/O error makes the answer `unknown`; a copy that is damaged is left out with a note.
        """
        found = _Inventoried()
        try:
            names = self.fs.list_dir(self.base / self.run_id) if only is None else list(only)
            for name in sorted(names, key=lambda name: (name != self.node_id, name)):
                if is_name(name):
                    self._look(self.base / self.run_id / name, found)
        except StoreError as error:
            return Inventory(source=self.node_id, unknown=str(error))
        return Inventory(
            source=self.node_id,
            node_saves=tuple(_node_save(place, copies, found) for place, copies in sorted(found.copies.items())),
            attempts=tuple(found.attempts.values()),
            certificates=tuple(sorted(found.certificates)),
            notes=tuple(found.notes),
            unauthentic=found.unauthentic,
        )

    def locate(self, save: SaveId, kept: Kept, world_size: int, node_dir: str) -> CopyLocation:
        """The copy that the directory `node_dir` of this run holds.

        FileNotFoundError, CorruptCopyError or StoreError.
        """
        folder = self.base / self.run_id / node_dir / iteration_folder(save.iteration) / save.folder
        location = self._read_copy(folder, file_name(kept, world_size) + ".json")
        if location.record.save != save:
            raise CorruptCopyError(f"{location.path} belongs to attempt {location.record.save.attempt}.")
        return location

    def survey(self) -> Iterator[tuple[Path, Found]]:
        """Every small file in this node's own directory with what it says, or with what is wrong with it.

        What is deleted meanwhile is left out. StoreError if the directory cannot be read.
        """
        return self._survey(self.root)

    def leftovers(self) -> Iterator[Path]:
        """Files in this node's own directory that no record vouches for: what a start sweeps away."""
        return self._leftovers(self.root)

    def _roots(self) -> Iterator[Path]:
        run = self.base / self.run_id
        yield self.root
        for name in self.fs.list_dir(run):
            if name != self.node_id and is_name(name):
                yield run / name

    def _look(self, root: Path, found: _Inventoried) -> None:
        for _, content in self._survey(root):
            match content:
                case AttemptLog() as log:
                    kept = found.attempts.get(log.attempt)
                    found.attempts[log.attempt] = log if kept is None else newer_log(kept, log)
                case SaveId() as certified:
                    found.certificates.add(certified)
                case CopyLocation(record=record):
                    found.copies.setdefault((record.save, root.name, record.tier), {})[record.kept] = content
                case problem:
                    found.notes.append(str(problem))
                    found.unauthentic += isinstance(problem, NotAuthenticError)

    def _survey(self, root: Path) -> Iterator[tuple[Path, Found]]:
        for path in self._small_files(root):
            try:
                content = self._read_small(path)
            except FileNotFoundError:
                continue  # deleted meanwhile by its owner
            except (CorruptCopyError, UnsafePathError) as error:
                if self.fs.stat(path) is not None:  # else the copy was taken away between two looks
                    yield path, error
                continue
            if content is not None:
                yield path, content

    def _small_files(self, root: Path) -> Iterator[Path]:
        for name in self.fs.list_dir(root / ATTEMPTS):
            if name.endswith(".json") and not name.startswith(TEMPORARY_PREFIX):
                yield root / ATTEMPTS / name
        for folder in self._save_folders(root):
            for name in self.fs.list_dir(folder):
                if name == CERTIFICATE or _RECORD.fullmatch(name):
                    yield folder / name

    def _read_small(self, path: Path) -> AttemptLog | SaveId | CopyLocation | None:
        """What the file says; None if it speaks of another run."""
        if path.parent.name == ATTEMPTS:
            log = decode_attempt_log(self.fs.read(path), str(path), self.seal)
            return log if log.run_id == self.run_id else None
        if path.name == CERTIFICATE:
            run_id, save = decode_certificate(self.fs.read(path), str(path), self.seal)
            return save if run_id == self.run_id and _folder_of(save) == path.parts[-3:-1] else None
        return self._read_copy(path.parent, path.name)

    def _save_folders(self, root: Path) -> Iterator[Path]:
        for iteration in self.fs.list_dir(root):
            if _ITERATION.fullmatch(iteration):
                for generation in self.fs.list_dir(root / iteration):
                    if _GENERATION.fullmatch(generation):
                        yield root / iteration / generation

    def _read_copy(self, folder: Path, name: str) -> CopyLocation:
        what = str(folder / name)
        record = decode_record(self.fs.read(folder / name), what, self.seal)
        expected = (*_folder_of(record.save), file_name(record.kept, record.world_size) + ".json", self.run_id)
        if (*folder.parts[-2:], name, record.run_id) != expected:
            raise CorruptCopyError(f"{what} speaks of {'/'.join(expected)}.")
        path = (folder / name).with_suffix(".safetensors")
        found = self.fs.stat(path)
        if found is None or not found.is_file:
            raise CorruptCopyError(f"{path} is missing beside its record.")
        if found.nbytes != record.nbytes:
            raise CorruptCopyError(f"{path} has {found.nbytes} bytes, its record says {record.nbytes}.")
        return CopyLocation(record, path)

    # -- writing ------------------------------------------------------------------------------------------------------

    def shard_path(self, save: SaveId, kept: Kept, world_size: int) -> Path:
        folder = self.root / iteration_folder(save.iteration) / save.folder
        return folder / (file_name(kept, world_size) + ".safetensors")

    def commit_file(self, source: Path, record: ShardRecord) -> Path:
        """Make the sealed file at `source` (same mount) the copy that `record` describes. Returns its path.

        StoreError: there is no copy, and the file is at `source` again unless storage refused that too.
        """
        path = self._folder_for(record)
        try:
            self.fs.rename(source, path)
            self._commit_record(path, record)
        except StoreError:
            with contextlib.suppress(StoreError):  # whoever gave the file looks whether he has it back
                self.fs.unlink(path.with_suffix(".json"))
                if self.fs.stat(source) is None:  # else the rename was one that failed
                    self.fs.rename(path, source)
            raise
        return path

    def commit_bytes(self, content: memoryview, record: ShardRecord) -> Path:
        """Write `content` beside, fsync, rename, commit the record. Returns the shard's path."""
        path = self._folder_for(record)
        beside = path.with_name(f"{TEMPORARY_PREFIX}{path.name}")
        self.fs.unlink(beside)
        self.fs.write_file(beside, (content[start:stop] for start, stop in segments(len(content))))
        self.fs.rename(beside, path)
        try:
            self._commit_record(path, record)
        except StoreError:
            self.fs.unlink(path.with_suffix(".json"))
            self.fs.unlink(path)  # nobody would: what no record vouches for is only swept at the next start
            raise
        return path

    def _folder_for(self, record: ShardRecord) -> Path:
        self._pay_log()
        path = self.shard_path(record.save, record.kept, record.world_size)
        self.fs.make_dir(path.parent)
        return path

    def _commit_record(self, path: Path, record: ShardRecord) -> None:
        if self._durable:
            self.fs.fsync_dir(path.parent)
            self.fs.fsync_dir(path.parent.parent)
            self.fs.fsync_dir(self.root)
        self.fs.write_atomic(path.with_suffix(".json"), encode_record(record, self.seal), durable=self._durable)

    def uncommit(self, save: SaveId, kept: Kept, world_size: int) -> Path | None:
        """Unlink the record, durably; then the bytes at the returned path are nobody's and may be recycled."""
        path = self.shard_path(save, kept, world_size)
        if self.fs.unlink(path.with_suffix(".json")) and self._durable:
            self.fs.fsync_dir(path.parent)
        return path if self.fs.stat(path) is not None else None

    def write_certificate(self, save: SaveId, world_size: int, *, protected: bool) -> None:
        folder = self.root / iteration_folder(save.iteration) / save.folder
        self.fs.make_dir(folder)
        digests: dict[str, str] = {}
        for owner in self.kept_of(save):
            if isinstance(owner, ParityName):
                continue
            with contextlib.suppress(CorruptCopyError, FileNotFoundError):  # deleted or damaged meanwhile: not held
                record = self._read_copy(folder, f"{file_name(owner, world_size)}.json").record
                digests[str(owner)] = record.digest
        content = encode_certificate(self.run_id, save, world_size, protected, digests, self.seal)
        self.fs.write_atomic(folder / CERTIFICATE, content, durable=self._durable)

    def write_attempt_log(self, log: AttemptLog) -> None:
        self.fs.make_dir(self.root / ATTEMPTS)
        self.fs.write_atomic(self._log_path(log), encode_attempt_log(log, self.seal), durable=self._durable)

    def owe_log(self, log: AttemptLog) -> None:
        """No copy is committed here before this log lies here: what has copies of an attempt knows of it."""
        self._owed = log

    def _pay_log(self) -> None:
        if self._owed is None:
            return
        if self.fs.stat(self._log_path(self._owed)) is None:
            self.write_attempt_log(self._owed)
        self._owed = None

    def _log_path(self, log: AttemptLog) -> Path:
        return self.root / ATTEMPTS / f"g{log.generation:04d}-{log.attempt[:8]}.json"

    def remove_folder_if_empty(self, save: SaveId) -> None:
        """After every rank of the node gave up its copies: the certificate and the folders go."""
        iteration = self.root / iteration_folder(save.iteration)
        names = self.fs.list_dir(iteration / save.folder)
        if any(_RECORD.fullmatch(name) or name.endswith(".safetensors") for name in names):
            return
        for name in names:
            self.fs.unlink(iteration / save.folder / name)
        self.fs.remove_dir(iteration / save.folder)
        self.fs.remove_dir(iteration)  # only if empty: another attempt may save this iteration at this very moment

    def sweep(self, keep: Iterable[SaveId] | None = None) -> int:
        """Remove what no record vouches for: temporary files, free arenas, shards without a record.

        With `keep`, the copies of all other saves go too, record first. One rank per node, holding the lock, before any
        other writes. Returns the number of files and folders removed.
        """
        removed = self._sweep(self.root, keep)
        for root in list(self._roots())[1:]:
            lock = self.fs.lock(root, ALL_RANKS)
            try:
                lock.acquire()
            except (AnotherJobError, StoreError):
                continue  # it lives, or is not ours, or cannot be told: not touched
            try:
                removed += self._sweep(root, keep)
            finally:
                lock.release()
        return removed

    def _sweep(self, root: Path, keep: Iterable[SaveId] | None) -> int:
        kept = None if keep is None else {_folder_of(save) for save in keep}
        removed = 0
        for folder in list(self._save_folders(root)):
            if kept is not None and folder.parts[-2:] not in kept:
                self._remove_save(folder)
                removed += 1
        for path in list(self._leftovers(root)):
            removed += self.fs.unlink(path)
        for folder in list(self._save_folders(root)):  # of saves that failed before they had a record
            self.fs.remove_dir(folder)
        for name in self.fs.list_dir(root):  # and where a deletion got no further
            if _ITERATION.fullmatch(name):
                self.fs.remove_dir(root / name)
        return removed

    def _leftovers(self, root: Path) -> Iterator[Path]:
        for name in self.fs.list_dir(root / ".arenas"):
            yield root / ".arenas" / name
        for folder in (root, root / ATTEMPTS):
            yield from (folder / name for name in self.fs.list_dir(folder) if name.startswith(TEMPORARY_PREFIX))
        for folder in self._save_folders(root):
            names = self.fs.list_dir(folder)
            for name in names:
                orphan = name.endswith(".safetensors") and name.removesuffix(".safetensors") + ".json" not in names
                if orphan or name.startswith(TEMPORARY_PREFIX):
                    yield folder / name

    def kept_of(self, save: SaveId) -> tuple[Kept, ...]:
        """What of `save` has a record in this node's own directory, by their names."""
        names = self.fs.list_dir(self.root / iteration_folder(save.iteration) / save.folder)
        return tuple(
            int(found[1]) if found[1] else ParityName(int(found[3]), int(found[4]))
            for name in names
            if (found := _RECORD.fullmatch(name))
        )

    def drop_earlier_attempts(self, attempt: str, keep: Iterable[SaveId]) -> None:
        """Delete the copies of other attempts but those in `keep`, in our own directory and in ones nobody holds.

        What this attempt writes meanwhile is not touched. One rank per node.
        """
        kept = {_folder_of(save) for save in keep}
        for root in self._roots():
            doomed = [
                folder
                for folder in self._save_folders(root)
                if not folder.name.endswith(f"-{attempt[:8]}") and folder.parts[-2:] not in kept
            ]
            self._remove_saves(root, doomed)

    def drop(self, save: SaveId) -> None:
        """Delete all copies of one save that lie in our own directory."""
        self._remove_save(self.root.joinpath(*_folder_of(save)))

    def drop_beside(self, save: SaveId) -> None:
        """Delete all copies of one save that lie beside our own directory, where nobody holds them.

        This node had another name when it wrote them, and nobody else will ever see them. One rank per node.
        """
        for root in list(self._roots())[1:]:
            folder = root.joinpath(*_folder_of(save))
            self._remove_saves(root, [folder] if self.fs.stat(folder) is not None else [])

    def _remove_saves(self, root: Path, folders: Sequence[Path]) -> None:
        """In a directory beside ours only under its lock, which a live job holds."""
        if not folders:
            return
        lock = None if root == self.root else self.fs.lock(root, ALL_RANKS)
        try:
            if lock is not None:
                lock.acquire()
        except (AnotherJobError, StoreError):
            return
        try:
            for folder in folders:
                self._remove_save(folder)
        finally:
            if lock is not None:
                lock.release()

    def _remove_save(self, folder: Path) -> None:
        """Records first, durably; then the bytes."""
        names = self.fs.list_dir(folder)
        for name in names:
            if _RECORD.fullmatch(name):
                self.fs.unlink(folder / name)
        if names:
            self.fs.fsync_dir(folder)
        self.fs.remove_tree(folder)
        self.fs.remove_dir(folder.parent)  # only if empty: see above

    def forget(self) -> None:
        """Free this node's memory: all copies of the run go, attempt logs stay. After the run has finished."""
        self._sweep(self.root, keep=())


class _Inventoried:
    """What `inventory` gathers on its way."""

    def __init__(self) -> None:
        self.copies: dict[tuple[SaveId, str, Tier], dict[Kept, CopyLocation]] = {}
        self.attempts: dict[str, AttemptLog] = {}
        self.certificates: set[SaveId] = set()
        self.notes: list[str] = []
        self.unauthentic = 0


def _node_save(place: tuple[SaveId, str, Tier], copies: dict[Kept, CopyLocation], found: _Inventoried) -> NodeSave:
    save, node_dir, tier = place
    everything = [copy.record for copy in copies.values()]
    records = sorted((each for each in everything if each.cover is None), key=lambda record: record.owner)
    parity = [
        ParityCopy(each.cover, each.cover.members.index(each.owner), each.nbytes, each.digest)
        for each in everything
        if each.cover is not None
    ]
    return NodeSave(
        node_id=node_dir,
        tier=tier,
        run_id=everything[0].run_id,
        save=save,
        world_size=everything[0].world_size,
        owners=tuple(record.owner for record in records),
        digests=tuple(record.digest for record in records),
        nbytes=tuple(record.nbytes for record in records),
        roles=tuple(record.role for record in records),
        certified=save in found.certificates,
        split=everything[0].split,
        parity=tuple(sorted(parity, key=lambda each: each.name)),
    )


def locate_copy(
    stores: Iterable[NodeStore], save: SaveId, kept: Kept, world_size: int, node_dir: str, tier: Tier
) -> CopyLocation:
    """The copy in `node_dir`, in whichever of a node's stores it is: a directory may hold saves of both node tiers, so

    that the record tells. FileNotFoundError, or what is wrong with what lies there.
    """
    problem: Exception = FileNotFoundError(f"the {tier} copy of {named(kept)} in {node_dir} is gone")
    for store in stores:
        try:
            location = store.locate(save, kept, world_size, node_dir)
        except FileNotFoundError:
            continue
        except (ResilienceError, OSError) as error:
            problem = error
            continue
        if location.record.tier == tier:
            return location
    raise problem


def iteration_folder(iteration: int) -> str:
    return f"iter_{iteration:07d}"


def newer_log(one: AttemptLog, other: AttemptLog) -> AttemptLog:
    """Two copies of one attempt's log: the one that knows more."""
    ranked = sorted((one, other), key=lambda log: (log.completed or SaveId(-1, -1, ""), bool(log.end)))
    newest = ranked[-1]
    return newest if newest.end else replace(newest, end=ranked[0].end, end_iteration=ranked[0].end_iteration)


def _folder_of(save: SaveId) -> tuple[str, str]:
    return iteration_folder(save.iteration), save.folder
