"""How persistent checkpoints get into a shared directory so that a crash at any instruction leaves a good one.

    begin     `.saving-<iteration>-<attempt>/` is made; every rank writes and fsyncs its files there
    commit    the folder is fsynced; a note says that the commit has begun; an existing `iter_N` is renamed aside; the
              folder is renamed to `iter_N`; the trackers follow, each by rename, `latest_train_state.pt` last; the
              note goes, then what was set aside
    heal      at the next start (or save) a note that is still there is carried to its end, or taken back

Who may write is fenced: `<root>/resilience.json` names the newest attempt that started, and every rename is preceded
and followed by a look at it. A window of one rename remains: a process that is stopped between the look and its rename,
and wakes after another attempt took over, does that one rename.

Nothing here is collective: one rank calls what writes, and tells the others how it went.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection
from pathlib import Path

from resilience.errors import (
    ConfigError,
    CorruptCopyError,
    EvictedError,
    SaveFailedError,
    StoreError,
    UnsafePathError,
)
from resilience.planning.inventory import AttemptLog, Inventory, SaveId, SharedSave
from resilience.stores.filesystem import TEMPORARY_PREFIX, FileSystem
from resilience.stores.records import encode_attempt_log
from resilience.stores.shared_inventory import (
    ATTEMPTS,
    ForeignProblem,
    Source,
    folder_problem,
    look,
    newer_than_tracker,
    path_of,
    read_attempt_logs,
    read_folder,
)
from resilience.stores.shared_records import (
    RECORD_NAME,
    CommitNote,
    Owner,
    decode_note,
    decode_owner,
    encode_note,
    encode_owner,
    folder_name,
    iteration_of,
)
from resilience.stores.trackers import TEXT_TRACKER, TRAIN_STATE, TRAIN_STATE_TRACKER, read_tracker

__all__ = ["SharedStore"]

_NOTE = re.compile(r"\.commit-\d+-[0-9a-f]{8}\.json")
_LEFTOVER = re.compile(r"\.(saving|aside|trash)-(\d+)-[0-9a-f]{8}")
_TRACKER_LIMIT = 1 << 20
_UNUSABLE = (CorruptCopyError, UnsafePathError, FileNotFoundError)


def _not_judged(folder: Path, fs: FileSystem) -> str:
    return ""


class SharedStore:
    """One directory on shared storage: `save`, `load`, a non-persistent global one, or a pretrained one.

    `foreign_problem` says what a folder that another program wrote lacks (`formats.registry.foreign_problem`); without
    it such folders count as usable as far as was looked.
    """

    def __init__(
        self, root: Path, fs: FileSystem, *, source: Source, foreign_problem: ForeignProblem = _not_judged
    ) -> None:
        self.root = root
        self.source = source
        self._fs = fs
        self._foreign_problem = foreign_problem
        self._owner: Owner | None = None

    # -- looking -----------------------------------------------------------------------------------------------------

    def inventory(self, run_id: str | None) -> Inventory:
        """What is here, as run `run_id` may use it; `Inventory.unknown` if it could not be looked at."""
        return look(self.root, self._fs, self.source, run_id, self._foreign_problem)

    def folder_of(self, save: SaveId) -> Path:
        """The folder of a save from the inventory."""
        return path_of(self.root, save, self._fs)

    @property
    def fs(self) -> FileSystem:
        """What the directory is looked at through."""
        return self._fs

    def owner(self) -> Owner | None:
        """Who owns the directory; None where no run of ours ever did. CorruptCopyError if that cannot be told."""
        try:
            return decode_owner(self._fs.read(self.root / RECORD_NAME), str(self.root / RECORD_NAME))
        except FileNotFoundError:
            return None

    def attempt_logs(self) -> tuple[AttemptLog, ...]:
        """Logs of all runs; one that cannot be believed is left out (`inventory` notes it). StoreError on I/O."""
        return read_attempt_logs(self.root, self._fs)[0]

    def after_heal(self) -> dict[str, str | None]:
        """What the next start's `heal` would put where: name → the name it has now (None: gone). Only looks."""
        moved: dict[str, str | None] = {}
        for name in self._fs.list_dir(self.root):
            leftover = _LEFTOVER.fullmatch(name)
            if leftover and leftover[1] == "aside":
                final = folder_name(int(leftover[2]))
                if not self._there(final) or self._is_whole(final) is False:
                    moved.setdefault(final, name)
            elif _NOTE.fullmatch(name):
                try:
                    note = decode_note(self._fs.read(self.root / name), name)
                except _UNUSABLE:
                    continue
                written = note.saving_name if self._there(note.saving_name) else note.final_name
                if not self._problem_of(note, written):
                    moved |= {note.final_name: written, TRAIN_STATE_TRACKER: f"{written}/{TRAIN_STATE}"}
                    moved[TEXT_TRACKER] = None
        return moved

    # -- owning ------------------------------------------------------------------------------------------------------

    def take_ownership(self, run_id: str, attempt: str, generation: int) -> None:
        """Name this attempt as the one that writes here; makes the directory. One rank, once, at its start.

        ConfigError if the directory belongs to another run, EvictedError if a newer attempt owns it already.
        """
        self._fs.make_dir(self.root)
        with contextlib.suppress(StoreError):  # above it nothing is ours
            self._fs.fsync_dir(self.root.parent)  # else a power failure may take the directory with all that is in it
        current = self.owner()
        if current is not None and current.run_id != run_id:
            raise ConfigError(
                f"{self.root} belongs to run {current.run_id!r}, and this is run {run_id!r}.",
                advice="Choose another directory, or set run_id to go on with that run.",
            )
        if current is not None and current.generation > generation:
            raise EvictedError(
                f"{self.root} is owned by generation {current.generation} of run {run_id!r}; this is {generation}.",
                advice="Another start of this run is newer: stop one of the two.",
            )
        owner = Owner(run_id, attempt, generation)
        self._fs.write_atomic(self.root / RECORD_NAME, encode_owner(owner))
        self._owner = owner

    def check_owner(self) -> None:
        """EvictedError unless this attempt still owns the directory."""
        mine = self._owned()
        current = self.owner()
        if current != mine:
            who = f"attempt {current.attempt[:8]} (generation {current.generation})" if current else "nobody"
            raise EvictedError(
                f"{self.root} is owned by {who}, no longer by attempt {mine.attempt[:8]}: a newer start of run "
                f"{mine.run_id!r} took over.",
                advice="This job must stop; the newer one goes on.",
            )

    # -- saving ------------------------------------------------------------------------------------------------------

    def begin(self, iteration: int, attempt: str) -> Path:
        """An empty folder for the files of a save. One rank; the others use the path afterwards."""
        self._settle()
        folder = self.root / self._note(iteration, attempt).saving_name
        self._fs.remove_tree(folder)
        self._fs.make_dir(folder)
        return folder

    def commit(self, iteration: int, attempt: str) -> None:
        """Make the folder from `begin` the newest checkpoint, once all ranks have written and fsynced their files.

        One rank. SaveFailedError if the folder is not whole; EvictedError; StoreError. After a StoreError the old
        checkpoint or the new one is there, and the next `begin` or `heal` carries the commit to its end.
        """
        self._settle()
        note = self._note(iteration, attempt)
        problem = self._problem_of(note, note.saving_name)
        if problem:
            raise SaveFailedError(f"The checkpoint of iteration {iteration} in {self.root} is not whole: {problem}.")
        self._fs.fsync_dir(self.root / note.saving_name)
        self._publish(note.note_name, encode_note(note))
        self._finish(note)

    def heal(self) -> tuple[str, ...]:
        """Carry an interrupted commit to its end or take it back, and sweep leftovers; says what was done.

        One rank, at a start, after `take_ownership` and before the directory is looked at for the election.
        """
        done = self._settle()
        for name in self._fs.list_dir(self.root):
            leftover = _LEFTOVER.fullmatch(name)
            if leftover and leftover[1] == "aside":
                done.append(self._restore(name, folder_name(int(leftover[2]))))
            elif leftover:
                self._fs.remove_tree(self.root / name)
                done.append(f"{name} was removed: a save or a deletion that was not finished.")
        for folder in (self.root, self.root / ATTEMPTS):
            for name in self._fs.list_dir(folder):
                if name.startswith(TEMPORARY_PREFIX):
                    self._fs.unlink(folder / name)
        return tuple(done)

    def prune(self, keep: int, *, abandoned: Collection[SaveId] = ()) -> tuple[SaveId, ...]:
        """Delete this run's complete checkpoints beyond the newest `keep`, and the abandoned ones; says which.

        Never the newest complete one, nor what the tracker names, nor what is newer than the tracker, nor what
        another program wrote. One rank.
        """
        doomed = self._surplus(self._owned().run_id, keep, abandoned)
        for save in doomed:
            self._delete(save)
        return tuple(save.save for save in doomed)

    def surplus(self, run_id: str, keep: int, *, abandoned: Collection[SaveId] = ()) -> tuple[SaveId, ...]:
        """What `prune` would delete. Only looks."""
        return tuple(save.save for save in self._surplus(run_id, keep, abandoned))

    def _surplus(self, run_id: str, keep: int, abandoned: Collection[SaveId]) -> list[SharedSave]:
        if keep < 1:
            raise ValueError(f"keep is {keep}; the newest checkpoint is never deleted, so at least 1")
        tracked = read_tracker(self.root, self._fs).names
        found = look(self.root, self._fs, self.source, run_id, self._foreign_problem)
        if found.unknown:
            raise StoreError(f"Nothing is deleted: {found.unknown}")
        ours = [save for save in found.shared_saves if save.run_id == run_id and not save.problem]
        complete = [save for save in ours if not newer_than_tracker(save)]
        good = [save.save for save in complete if save.save not in abandoned]
        kept = {*good[:keep], *(save.save for save in complete if save.save.iteration == tracked)}
        return [save for save in complete if save.save not in kept] if good else []

    def write_attempt_log(self, log: AttemptLog) -> None:
        """Keep what this attempt says of itself; one file per attempt, so no fence is needed."""
        self._fs.make_dir(self.root / ATTEMPTS)
        self._fs.fsync_dir(self.root)
        self._fs.write_atomic(self.root / ATTEMPTS / f"{log.name}.json", encode_attempt_log(log))

    # -- the steps ---------------------------------------------------------------------------------------------------

    def _owned(self) -> Owner:
        if self._owner is None:
            raise RuntimeError(f"{self.root} is written without take_ownership")
        return self._owner

    def _note(self, iteration: int, attempt: str) -> CommitNote:
        mine = self._owned()
        if attempt != mine.attempt:
            raise ValueError(f"attempt {attempt[:8]} saves into a directory that {mine.attempt[:8]} owns")
        return CommitNote(mine.run_id, SaveId(iteration, mine.generation, attempt))

    def _fenced(self, rename: Callable[[], None]) -> None:
        self.check_owner()
        rename()
        self.check_owner()

    def _rename(self, source: str, target: str) -> None:
        self._fenced(lambda: self._fs.rename(self.root / source, self.root / target))
        self._fs.fsync_dir(self.root)

    def _publish(self, name: str, content: bytes) -> None:
        self._fenced(lambda: self._fs.write_atomic(self.root / name, content))

    def _there(self, name: str) -> bool:
        return self._fs.stat(self.root / name) is not None

    def _finish(self, note: CommitNote) -> None:
        """Carry a commit from whatever point it reached to its end; every step may be repeated after a crash."""
        if self._there(note.saving_name):
            if self._there(note.final_name):
                self._fs.remove_tree(self.root / note.aside_name)  # of an earlier try, older than what is in place
                self._rename(note.final_name, note.aside_name)
            self._rename(note.saving_name, note.final_name)
        train_state = self._fs.read(self.root / note.final_name / TRAIN_STATE, _TRACKER_LIMIT)
        self._publish(TEXT_TRACKER, str(note.save.iteration).encode())
        self._publish(TRAIN_STATE_TRACKER, train_state)
        self._fs.unlink(self.root / note.note_name)
        self._fs.fsync_dir(self.root)
        self._fs.remove_tree(self.root / note.aside_name)

    def _settle(self) -> list[str]:
        """Deal with the notes of commits that were interrupted; there is at most one unless storage failed before."""
        self.check_owner()
        done = []
        for name in self._fs.list_dir(self.root):
            if not _NOTE.fullmatch(name):
                continue
            try:
                note = decode_note(self._fs.read(self.root / name), name)
            except _UNUSABLE as error:
                self._fs.unlink(self.root / name)
                done.append(f"A commit note was dropped: {error}")
                continue
            done.append(self._settle_one(note))
        return done

    def _settle_one(self, note: CommitNote) -> str:
        where = f"The interrupted commit of iteration {note.save.iteration} in {self.root}"
        written = note.saving_name if self._there(note.saving_name) else note.final_name
        problem = self._problem_of(note, written)
        if not problem:
            self._finish(note)
            return f"{where} was finished."
        self._fs.remove_tree(self.root / note.saving_name)
        self._restore(note.aside_name, note.final_name)
        self._fs.unlink(self.root / note.note_name)
        return f"{where} was taken back: {problem}."

    def _problem_of(self, note: CommitNote, name: str) -> str:
        """Why the folder `name` is not, whole, the checkpoint that the note speaks of."""
        try:
            record = read_folder(self.root / name, self._fs)
            if record is None:
                return f"{RECORD_NAME} is missing in {name}"
            if (record.run_id, record.save) != (note.run_id, note.save):
                return f"{name} holds iteration {record.save.iteration} of attempt {record.save.attempt[:8]}"
            return folder_problem(self.root / name, record, self._fs)
        except _UNUSABLE as error:
            return str(error)

    def _restore(self, aside: str, final: str) -> str:
        """A checkpoint that was set aside: gone if a whole one has replaced it, else back in its place."""
        if not self._there(aside):
            return f"{aside} is not there."
        if self._there(final):
            whole = self._is_whole(final)
            if whole is None:
                return f"{aside} is kept: {final} was put there by another program."
            if whole:
                self._fs.remove_tree(self.root / aside)
                return f"{aside} was removed: {final} has replaced it."
            self._discard(final)
        self._rename(aside, final)
        return f"{final} was put back in its place."

    def _is_whole(self, name: str) -> bool | None:
        """Whether the folder `name` is a whole checkpoint of ours; None if another program wrote it."""
        try:
            record = read_folder(self.root / name, self._fs)
            return None if record is None else not folder_problem(self.root / name, record, self._fs)
        except _UNUSABLE:
            return False

    def _delete(self, save: SharedSave) -> None:
        folder = self.folder_of(save.save)
        assert iteration_of(folder.name) == save.save.iteration, "only folders of ours are deleted"
        self._discard(folder.name)

    def _discard(self, name: str) -> None:
        """Remove a checkpoint folder, by a rename first: half of one must never look like a checkpoint."""
        trash = f".trash-{iteration_of(name)}-{self._owned().attempt[:8]}"
        self._fs.remove_tree(self.root / trash)
        self._rename(name, trash)
        self._fs.remove_tree(self.root / trash)
