"""What lies on the simulated disks, found by a reader that shares nothing with the code under test."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import xxhash

from resilience.drill.simulator.storage import Directory, Inode, Mount

__all__ = ["Evidence", "Key", "generation_of", "key_of", "read_record", "save_folders"]

Key = tuple[int, str]  # of a save: iteration and folder of the attempt, in the order of election


class Evidence:
    """The mounts of all nodes. `spoiled`: inodes that a fault altered."""

    def __init__(self, mounts: Mapping[str, Mapping[str, Mount]], place: str) -> None:
        """`place`: on which mount of a node saves lie."""
        self.spoiled: set[int] = set()
        self._mounts = mounts
        self._place = place

    def holders(self, key: Key, bytes_of: Mapping[int, str]) -> dict[int, set[str]]:
        """By owner, the nodes that hold an intact copy of its shard; `bytes_of`: the true digests."""
        found: dict[int, set[str]] = {}
        for node, mounts in self._mounts.items():
            for there, folder in save_folders(mounts[self._place]):
                for name, record in folder.names.items() if there == key else ():
                    shard = folder.names.get(name.removesuffix(".json") + ".safetensors")
                    read = read_record(key, record, shard) if name.startswith("rank_") else None
                    if read is None or {record.number, shard.number if shard else 0} & self.spoiled:
                        continue
                    if read[1] == bytes_of.get(read[0]):
                        found.setdefault(read[0], set()).add(node)
        return found

    def shared_files(self, folder: str) -> dict[str, str]:
        """The digest of each file below a folder on shared storage; empty if it is not there."""
        found = self._shared.find(tuple(folder.split("/")))
        return dict(_digests(found)) if isinstance(found, Directory) else {}

    def has_shared_log(self, attempt: str) -> bool:
        return self._shared.find(("save", "attempts", f"{attempt}.json")) is not None

    @property
    def _shared(self) -> Mount:
        return next(iter(self._mounts.values()))["shared"]


def _digests(directory: Directory) -> Iterator[tuple[str, str]]:
    for path, below in directory.walk(Path()):
        for name, entry in below.names.items():
            if isinstance(entry, Inode):
                yield str(path / name), xxhash.xxh3_64_hexdigest(entry.content)


def generation_of(folder: str) -> int:
    return int(folder[1:].split("-", maxsplit=1)[0])


def key_of(path: Path) -> Key | None:
    iteration, folder = path.parts[-3:-1]
    return (int(iteration[5:]), folder) if iteration.startswith("iter_") else None


def read_record(key: Key | None, record: object, shard: object) -> tuple[int, str] | None:
    """Whose shard of the save `key` a record vouches for, and the digest of the bytes; None if it does not."""
    if not isinstance(record, Inode) or not isinstance(shard, Inode):
        return None
    try:
        fields = json.loads(bytes(record.content))
        found = int(fields["iteration"]), int(fields["generation"])
        if key is None or found != (key[0], generation_of(key[1])) or int(fields["bytes"]) != len(shard.content):
            return None
        return int(fields["owner"]), xxhash.xxh3_128_hexdigest(shard.content)
    except (ValueError, KeyError, TypeError):
        return None


def save_folders(mount: Mount) -> Iterator[tuple[Key, Directory]]:
    """Every folder of a save on a node's mount."""
    for run in mount.root.names.values():
        for node in run.names.values() if isinstance(run, Directory) else ():
            for iteration, found in node.names.items() if isinstance(node, Directory) else ():
                if iteration.startswith("iter_") and isinstance(found, Directory):
                    for folder, entry in found.names.items():
                        if isinstance(entry, Directory):
                            yield (int(iteration[5:]), folder), entry
