"""What a node's directories of a run hold: copies, certificates, attempt logs, each read from its small file.

No record, no copy. A small file is believed if it is whole, where it belongs, and (with a key) authentic; a copy counts
if the bytes beside its record have the length that it says. Nothing here opens the bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from resilience.errors import CorruptCopyError, NotAuthenticError, ResilienceError, StoreError, UnsafePathError
from resilience.planning.inventory import AttemptLog, Inventory, Kept, NodeSave, ParityCopy, SaveId, Tier, named
from resilience.stores.authentication import UNSEALED, Seal
from resilience.stores.filesystem import TEMPORARY_PREFIX, FileSystem
from resilience.stores.node_names import (
    ATTEMPTS,
    CERTIFICATE,
    file_name,
    folder_names,
    kept_named,
    save_folder,
    save_folders,
)
from resilience.stores.records import (
    ShardRecord,
    decode_attempt_log,
    decode_certificate,
    decode_record,
    is_name,
)

__all__ = ["CopyLocation", "Found", "NodeReader", "locate_copy", "newer_log"]


@dataclass(frozen=True)
class CopyLocation:
    """A committed copy: its record and where its bytes lie."""

    record: ShardRecord
    path: Path


#: What a small file of a node's directory turns out to be: the save is that of a certificate.
Found = AttemptLog | SaveId | CopyLocation | ResilienceError


class NodeReader:
    """Reads the directory `root` of a node, `<base>/<run_id>/<node_id>`, and those of the same run beside it."""

    def __init__(self, root: Path, fs: FileSystem, seal: Seal = UNSEALED) -> None:
        """`seal`: of the small files; with a key those without its MAC count as not there."""
        self.root = root
        self.run = root.parent
        self.run_id = root.parent.name
        self.node_id = root.name
        self.fs = fs
        self.seal = seal

    def inventory(self, only: Iterable[str] | None = None) -> Inventory:
        """Everything of this run that lies below the base, in whoever's directory (host names change), or `only` these.

        An I/O error makes the answer `unknown`; a copy that is damaged is left out with a note.
        """
        found = _Inventoried()
        try:
            names = self.fs.list_dir(self.run) if only is None else list(only)
            for name in sorted(names, key=lambda name: (name != self.node_id, name)):
                if is_name(name):
                    self._look(self.run / name, found)
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
        location = self.read_copy(save_folder(self.run / node_dir, save), file_name(kept, world_size) + ".json")
        if location.record.save != save:
            raise CorruptCopyError(f"{location.path} belongs to attempt {location.record.save.attempt}.")
        return location

    def survey(self) -> Iterator[tuple[Path, Found]]:
        """Every small file in this node's own directory with what it says, or with what is wrong with it.

        What is deleted meanwhile is left out. StoreError if the directory cannot be read.
        """
        return self._survey(self.root)

    def kept_of(self, save: SaveId) -> tuple[Kept, ...]:
        """What of `save` has a record in this node's own directory, by their names."""
        names = self.fs.list_dir(save_folder(self.root, save))
        return tuple(kept for name in names if (kept := kept_named(name)) is not None)

    def read_copy(self, folder: Path, name: str) -> CopyLocation:
        """The copy whose record is the file `name` in a save's folder.

        FileNotFoundError, CorruptCopyError or StoreError.
        """
        what = str(folder / name)
        record = decode_record(self.fs.read(folder / name), what, self.seal)
        expected = (*folder_names(record.save), file_name(record.kept, record.world_size) + ".json", self.run_id)
        if (*folder.parts[-2:], name, record.run_id) != expected:
            raise CorruptCopyError(f"{what} speaks of {'/'.join(expected)}.")
        path = (folder / name).with_suffix(".safetensors")
        found = self.fs.stat(path)
        if found is None or not found.is_file:
            raise CorruptCopyError(f"{path} is missing beside its record.")
        if found.nbytes != record.nbytes:
            raise CorruptCopyError(f"{path} has {found.nbytes} bytes, its record says {record.nbytes}.")
        return CopyLocation(record, path)

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
        for folder in save_folders(root, self.fs):
            for name in self.fs.list_dir(folder):
                if name == CERTIFICATE or kept_named(name) is not None:
                    yield folder / name

    def _read_small(self, path: Path) -> AttemptLog | SaveId | CopyLocation | None:
        """What the file says; None if it speaks of another run."""
        if path.parent.name == ATTEMPTS:
            log = decode_attempt_log(self.fs.read(path), str(path), self.seal)
            return log if log.run_id == self.run_id else None
        if path.name == CERTIFICATE:
            run_id, save = decode_certificate(self.fs.read(path), str(path), self.seal)
            return save if run_id == self.run_id and folder_names(save) == path.parts[-3:-1] else None
        return self.read_copy(path.parent, path.name)


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
    readers: Iterable[NodeReader], save: SaveId, kept: Kept, world_size: int, node_dir: str, tier: Tier
) -> CopyLocation:
    """The copy in `node_dir`, below whichever of a node's base directories it is.

    A directory may hold saves of both node tiers, so that the record tells. FileNotFoundError, or what is wrong with
    what lies there.
    """
    problem: Exception = FileNotFoundError(f"the {tier} copy of {named(kept)} in {node_dir} is gone")
    for reader in readers:
        try:
            location = reader.locate(save, kept, world_size, node_dir)
        except FileNotFoundError:
            continue
        except (ResilienceError, OSError) as error:
            problem = error
            continue
        if location.record.tier == tier:
            return location
    raise problem


def newer_log(one: AttemptLog, other: AttemptLog) -> AttemptLog:
    """Two copies of one attempt's log: the one that knows more."""
    ranked = sorted((one, other), key=lambda log: (log.completed or SaveId(-1, -1, ""), bool(log.end)))
    newest = ranked[-1]
    return newest if newest.end else replace(newest, end=ranked[0].end, end_iteration=ranked[0].end_iteration)
