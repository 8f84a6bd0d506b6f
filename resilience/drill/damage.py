"""Damage to what a node holds: bytes flipped, or a file cut in half, in a committed copy of the newest save."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from resilience.drill.scenario import CopyChoice


@dataclass(frozen=True, order=True)
class CommittedCopy:
    """A shard file with its record, as found on a node."""

    iteration: int
    generation: int
    owner: int
    role: str
    shard: Path


def committed_copies(directories: Sequence[Path], run_id: str) -> list[CommittedCopy]:
    """Copies of this run below these directories whose record can be read, the newest save first, owners ascending."""
    found: list[CommittedCopy] = []
    for directory in directories:
        for record in directory.glob(f"{run_id}/*/iter_*/g*/*.json"):
            copy = _committed(record)
            if copy is not None:
                found.append(copy)
    return sorted(found, key=lambda copy: (-copy.iteration, -copy.generation, copy.owner, copy.role))


def _committed(record: Path) -> CommittedCopy | None:
    shard = record.with_suffix(".safetensors")
    try:
        entry = json.loads(record.read_bytes())
        copy = CommittedCopy(
            int(entry["iteration"]), int(entry["generation"]), int(entry["owner"]), str(entry["role"]), shard
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a certificate, a torn record: no committed copy
    return copy if shard.is_file() else None


def choose(copies: Sequence[CommittedCopy], which: CopyChoice) -> list[CommittedCopy]:
    """Of the newest save: the first primary, the first copy held for another rank, or all copies."""
    if not copies:
        return []
    newest = [
        copy for copy in copies if (copy.iteration, copy.generation) == (copies[0].iteration, copies[0].generation)
    ]
    if which == "all":
        return newest
    return [copy for copy in newest if (copy.role == "primary") == (which == "primary")][:1]


def flip_bytes(shard: Path) -> None:
    """Invert 16 bytes in the middle; size and times stay, as with a disk that lies."""
    before = shard.stat()
    with shard.open("r+b") as stream:
        stream.seek(before.st_size // 2)
        bytes_there = stream.read(16)
        stream.seek(before.st_size // 2)
        stream.write(bytes(byte ^ 0xFF for byte in bytes_there))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))


def cut_in_half(shard: Path) -> None:
    """Truncate to half the size, as a write that was never finished."""
    os.truncate(shard, shard.stat().st_size // 2)
