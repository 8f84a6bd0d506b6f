"""How a node's directory of a run is written: shards with their records, certificates, attempt logs.

No record, no copy: a shard is committed by the rename that brings its record, and deleted by unlinking the record
first. What lies where is in `node_names.py`; it is read by `node_reader.py` and deleted by `node_remover.py`.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from resilience.errors import CorruptCopyError, StoreError, UnsafePathError
from resilience.planning.inventory import AttemptLog, Kept, ParityName, SaveId, Tier
from resilience.stores.authentication import UNSEALED, Seal
from resilience.stores.digest import segments
from resilience.stores.filesystem import TEMPORARY_PREFIX, FileSystem
from resilience.stores.node_names import ARENAS, ATTEMPTS, CERTIFICATE, file_name, save_folder
from resilience.stores.node_reader import NodeReader
from resilience.stores.node_remover import NodeRemover
from resilience.stores.records import ShardRecord, encode_attempt_log, encode_certificate, encode_record

__all__ = ["NodeStore"]


class NodeStore:
    """The copies below one base directory, on one node. Shared by the node's ranks, each writing its own files.

    `reader` says what is there, `remover` deletes what is not kept.
    """

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
        self.arenas = self.root / ARENAS
        self.reader = NodeReader(self.root, fs, seal)
        self.remover = NodeRemover(self.root, fs)
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

    def shard_path(self, save: SaveId, kept: Kept, world_size: int) -> Path:
        return save_folder(self.root, save) / (file_name(kept, world_size) + ".safetensors")

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
        folder = save_folder(self.root, save)
        self.fs.make_dir(folder)
        digests: dict[str, str] = {}
        for owner in self.reader.kept_of(save):
            if isinstance(owner, ParityName):
                continue
            with contextlib.suppress(CorruptCopyError, FileNotFoundError):  # deleted or damaged meanwhile: not held
                record = self.reader.read_copy(folder, f"{file_name(owner, world_size)}.json").record
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
        return self.root / ATTEMPTS / f"{log.name}.json"
