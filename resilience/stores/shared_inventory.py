"""Which checkpoints a shared directory holds, and why some of them cannot be resumed from. Reads only, without torch.

A folder is a candidate if it is complete and not newer than what the tracker names: users roll back by replacing the
tracker. Without a tracker the newest complete one is it, and that is noted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

from resilience.errors import CorruptCopyError, StoreError, UnsafePathError
from resilience.planning.inventory import AttemptLog, Inventory, SaveId, SharedSave, Tier
from resilience.stores.filesystem import FileSystem
from resilience.stores.records import decode_attempt_log
from resilience.stores.shared_records import RECORD_NAME, FolderRecord, decode_folder, folder_name, iteration_of
from resilience.stores.trackers import RELEASE, Tracker, read_tracker

__all__ = [
    "ATTEMPTS",
    "ForeignProblem",
    "Source",
    "folder_problem",
    "look",
    "path_of",
    "read_attempt_logs",
    "read_folder",
]

Source = Literal["save", "load", "global", "pretrained"]

#: Says what a folder that is not ours lacks ("" if nothing): the formats know; stores do not.
ForeignProblem = Callable[[Path, FileSystem], str]

ATTEMPTS = "attempts"
_RECORD_LIMIT = 64 << 20  # a folder's record lists one file per rank
_UNUSABLE = (CorruptCopyError, UnsafePathError, FileNotFoundError)


def look(root: Path, fs: FileSystem, source: Source, run_id: str | None, foreign: ForeignProblem) -> Inventory:
    """What `root` holds, seen by run `run_id`. An I/O error anywhere makes the whole answer *unknown*, never empty."""
    try:
        names = fs.list_dir(root)
        tracker = read_tracker(root, fs)
        folders = [name for name in names if iteration_of(name) is not None or name == RELEASE]
        found = [_judge(_look_at(root / name, fs, source, foreign), name, run_id, tracker) for name in folders]
        logs, log_notes = read_attempt_logs(root, fs)
    except StoreError as error:
        return Inventory(source, unknown=str(error))
    saves = tuple(sorted(found, key=lambda found: found.save, reverse=True))
    runs = {save.run_id for save in saves if save.run_id} | {log.run_id for log in logs}
    return Inventory(
        source=source,
        shared_saves=saves,
        attempts=tuple(log for log in logs if run_id is None or log.run_id == run_id),
        notes=(*tracker.notes, *log_notes, *_tracker_notes(root, tracker, saves)),
        foreign_runs=tuple(sorted(runs - {run_id})) if run_id else (),
    )


def read_folder(folder: Path, fs: FileSystem) -> FolderRecord | None:
    """The record of a folder of ours; None where there is none (a folder that another program wrote)."""
    path = folder / RECORD_NAME
    if fs.stat(path) is None:
        return None
    return decode_folder(fs.read(path, _RECORD_LIMIT), str(path))


def folder_problem(folder: Path, record: FolderRecord, fs: FileSystem) -> str:
    """What is torn about a folder of ours: a file that is missing, or shorter or longer than its record says."""
    expected = iteration_of(folder.name)
    if expected is not None and expected != record.save.iteration:
        return f"its record says iteration {record.save.iteration}"
    for name, nbytes in record.files.items():
        there = fs.stat(folder / name)
        if there is None:
            return f"{name} is missing"
        if not there.is_file or there.nbytes != nbytes:
            return f"{name} has {there.nbytes} bytes instead of {nbytes}"
    return ""


def read_attempt_logs(root: Path, fs: FileSystem) -> tuple[tuple[AttemptLog, ...], tuple[str, ...]]:
    """All attempt logs, and a note on each that cannot be believed (every node keeps a copy of its own)."""
    logs: list[AttemptLog] = []
    notes: list[str] = []
    for name in fs.list_dir(root / ATTEMPTS):
        path = root / ATTEMPTS / name
        if not name.endswith(".json") or name.startswith("."):
            continue
        try:
            logs.append(decode_attempt_log(fs.read(path), str(path)))
        except _UNUSABLE as error:
            notes.append(str(error))
    return tuple(logs), tuple(notes)


def _look_at(folder: Path, fs: FileSystem, source: Source, foreign: ForeignProblem) -> SharedSave:
    tier: Tier = "global" if source == "global" else "persistent"
    named = SaveId(iteration_of(folder.name) or 0, 0, "")
    try:
        record = read_folder(folder, fs)
        if record is not None:
            problem = folder_problem(folder, record, fs)
            save = replace(record.save, iteration=named.iteration)
            return SharedSave(tier, record.run_id, save, record.world_size, record.nbytes, source, problem)
        problem = foreign(folder, fs)
        return SharedSave(tier, None, named, None, _bytes_in(folder, fs), source, problem)
    except _UNUSABLE as error:
        return SharedSave(tier, None, named, None, 0, source, str(error))


def newer_than_tracker(save: SharedSave) -> bool:
    """Users roll back by replacing the tracker: what is newer than it says is left alone."""
    return save.tracker is not None and save.save.iteration > save.tracker


def _judge(save: SharedSave, name: str, run_id: str | None, tracker: Tracker) -> SharedSave:
    """Adds to a complete save why this run must pass it over."""
    if save.problem:
        return save
    if run_id and save.run_id not in (None, run_id) and save.source in ("save", "global"):
        return replace(save, problem=f"it belongs to run {save.run_id}")
    if isinstance(tracker.names, int) and name != RELEASE:
        return replace(save, tracker=tracker.names)  # a newer one is passed over by the election, unless asked for
    if (name == RELEASE) != (tracker.names == RELEASE):
        says = f"the tracker names {tracker.names}" if tracker.names is not None else "no tracker names it"
        return replace(save, problem=says)
    return save


def _tracker_notes(root: Path, tracker: Tracker, saves: tuple[SharedSave, ...]) -> tuple[str, ...]:
    usable = [save.save.iteration for save in saves if not save.problem and not newer_than_tracker(save)]
    if tracker.names is None:
        if not usable:
            return ()
        return (f"{root} has no readable tracker: the newest complete checkpoint in it, {usable[0]}, is taken.",)
    if tracker.names == RELEASE or tracker.names in usable:
        return ()
    why = next((s.problem for s in saves if s.save.iteration == tracker.names and s.problem), "it is not there")
    instead = f"{usable[0]} is taken" if usable else "there is no older one"
    return (f"The tracker in {root} names {tracker.names}, which cannot be used ({why}): {instead}.",)


def _bytes_in(folder: Path, fs: FileSystem) -> int:
    found = (fs.stat(folder / name) for name in fs.list_dir(folder))
    return sum(stat.nbytes for stat in found if stat is not None and stat.is_file)


def path_of(root: Path, save: SaveId, fs: FileSystem) -> Path:
    """The folder of a save that `look` found; `release` goes under iteration 0."""
    folder = root / folder_name(save.iteration)
    if save.iteration == 0 and fs.stat(folder) is None:
        return root / RELEASE
    return folder
