"""The JSON files that make a shared directory safe: who owns it, what a folder holds, which commit is under way.

<root>/resilience.json                the owner: run and attempt that may write here
<root>/iter_NNNNNNN/resilience.json   what the folder holds: its save, world size, format, and every file's length
<root>/.commit-<iteration>-<attempt>.json   a commit that has begun and whose end nobody has seen yet
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from resilience.errors import CorruptCopyError
from resilience.planning.inventory import SaveId
from resilience.stores.records import _Fields, _save_json, seal_json, unseal_json

__all__ = [
    "RECORD_NAME",
    "CommitNote",
    "FolderRecord",
    "Owner",
    "decode_folder",
    "decode_note",
    "decode_owner",
    "encode_folder",
    "encode_note",
    "encode_owner",
    "folder_name",
    "is_inner_name",
    "iteration_of",
]

RECORD_NAME = "resilience.json"
_FOLDER = re.compile(r"iter_(\d{7,15})")
_FILE_NAME = re.compile(r"\.?[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}")
_MAX_DEPTH = 64
_MAX_RANKS = 1 << 20


def folder_name(iteration: int) -> str:
    """`iter_0000035`."""
    return f"iter_{iteration:07d}"


def iteration_of(name: str) -> int | None:
    """The iteration in a checkpoint folder's name; None for any other name (`iter_old`, `iter_7`)."""
    match = _FOLDER.fullmatch(name)
    return int(match[1]) if match and folder_name(int(match[1])) == name else None


def is_inner_name(name: str) -> bool:
    """Whether `name` is a relative path that stays in its folder.

    A file directly in it has a plain name; in a sub-folder anything that a disk takes may stand.
    """
    parts = name.split("/")
    if len(parts) == 1:
        return _FILE_NAME.fullmatch(name) is not None
    return len(parts) <= _MAX_DEPTH and all(
        part not in ("", ".", "..") and len(part.encode(errors="replace")) <= 255 and part.isprintable()
        for part in parts
    )


@dataclass(frozen=True)
class Owner:
    """Who may write to a shared directory: named at its start, looked up again around every rename."""

    run_id: str
    attempt: str
    generation: int


@dataclass(frozen=True)
class FolderRecord:
    """What one checkpoint folder holds. `files`: name → bytes of each other file in it, where they are known.

    A name is relative to the folder (`tokenizer/vocab.txt`).

    It is written after those files, so that a length that differs means: torn.
    """

    run_id: str
    save: SaveId
    world_size: int
    format: str
    files: Mapping[str, int]
    base: SaveId | None = None
    fork: tuple[int, str] | None = None

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())


@dataclass(frozen=True)
class CommitNote:
    """A commit that was begun: which save of which run; the names of its folders follow from it."""

    run_id: str
    save: SaveId

    @property
    def _suffix(self) -> str:
        return f"{self.save.iteration}-{self.save.attempt[:8]}"

    @property
    def note_name(self) -> str:
        return f".commit-{self._suffix}.json"

    @property
    def saving_name(self) -> str:
        """Where the files are written, before they are the checkpoint."""
        return f".saving-{self._suffix}"

    @property
    def aside_name(self) -> str:
        """Where an older checkpoint of the same iteration waits until the new one is in place."""
        return f".aside-{self._suffix}"

    @property
    def final_name(self) -> str:
        return folder_name(self.save.iteration)


def encode_owner(owner: Owner) -> bytes:
    return seal_json({"run_id": owner.run_id, "attempt": owner.attempt, "generation": owner.generation})


def decode_owner(content: bytes, what: str) -> Owner:
    read = _Fields(unseal_json(content, what), what)
    return Owner(read.name("run_id"), read.attempt("attempt"), read.integer("generation", 0, 1 << 40))


def encode_note(note: CommitNote) -> bytes:
    return seal_json({"run_id": note.run_id, **_flat(note.save)})


def decode_note(content: bytes, what: str) -> CommitNote:
    read = _Fields(unseal_json(content, what), what)
    return CommitNote(read.name("run_id"), read.save())


def encode_folder(record: FolderRecord) -> bytes:
    return seal_json(
        {
            "run_id": record.run_id,
            **_flat(record.save),
            "world_size": record.world_size,
            "format": record.format,
            "base": _save_json(record.base),
            "fork": list(record.fork) if record.fork else None,
            "files": dict(record.files),
        }
    )


def decode_folder(content: bytes, what: str) -> FolderRecord:
    read = _Fields(unseal_json(content, what), what)
    fork = read.fields.get("fork")
    if fork is not None and not (
        isinstance(fork, list) and len(fork) == 2 and type(fork[0]) is int and isinstance(fork[1], str)
    ):
        raise read.wrong("fork", "null or [iteration, fork id]")
    return FolderRecord(
        run_id=read.name("run_id"),
        save=read.save(),
        world_size=read.integer("world_size", 1, _MAX_RANKS),
        format=read.name("format"),
        files=_files(read.fields.get("files"), what),
        base=read.optional_save("base"),
        fork=(fork[0], fork[1]) if fork else None,
    )


def _flat(save: SaveId) -> dict[str, Any]:
    return {"iteration": save.iteration, "generation": save.generation, "attempt": save.attempt}


def _files(found: object, what: str) -> dict[str, int]:
    if not isinstance(found, dict):
        raise CorruptCopyError(f"{what}: field 'files' is no object of file names and lengths.")
    for name, nbytes in found.items():
        if not is_inner_name(name) or type(nbytes) is not int or not 0 <= nbytes < 1 << 60:
            raise CorruptCopyError(f"{what}: {name[:80]!r} with {str(nbytes)[:40]} bytes cannot be one of its files.")
    return found
