"""The shared directory: who may write, what can be resumed from, and a crash at every single call of a commit."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from resilience.errors import ConfigError, CorruptCopyError, EvictedError, SaveFailedError, StoreError
from resilience.formats.protocol import Target
from resilience.formats.registry import foreign_problem, open_checkpoint
from resilience.planning.inventory import AttemptLog, SaveId
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.shared_inventory import newer_than_tracker
from resilience.stores.shared_records import folder_name, iteration_of
from resilience.stores.shared_store import SharedStore
from tests.formats.worlds import RUN, rows, save

FS = PosixFileSystem()
FIRST = "a" * 32
SECOND = "b" * 32
THIRD = "c" * 32


def store_at(root: Path, fs: Any = FS, source: Any = "save") -> SharedStore:
    return SharedStore(root, fs, source=source, foreign_problem=foreign_problem)


def owned(root: Path, attempt: str = FIRST, generation: int = 1, fs: Any = FS, run_id: str = RUN) -> SharedStore:
    store = store_at(root, fs)
    store.take_ownership(run_id, attempt, generation)
    return store


def content_of(iteration: int, attempt: str) -> torch.Tensor:
    return torch.arange(6.0) + iteration + 1000 * int(attempt[0], 16)


def fill(folder: Path, iteration: int, attempt: str, generation: int, run_id: str = RUN) -> None:
    tensor = content_of(iteration, attempt)
    save(
        folder,
        lambda rank: [rows("model/0/w", tensor, 3 * rank, 3 * rank + 3)],
        world_size=2,
        iteration=iteration,
        attempt=attempt,
        generation=generation,
        run_id=run_id,
    )


def publish(store: SharedStore, iteration: int, attempt: str = FIRST, generation: int = 1) -> None:
    fill(store.begin(iteration, attempt), iteration, attempt, generation)
    store.commit(iteration, attempt)


def usable(root: Path, run_id: str | None = RUN, source: Any = "save") -> list[int]:
    found = store_at(root, source=source).inventory(run_id)
    assert not found.unknown
    return [save.save.iteration for save in found.shared_saves if not save.problem and not newer_than_tracker(save)]


def problems(root: Path, source: Any = "save") -> dict[int, str]:
    found = store_at(root, source=source).inventory(RUN).shared_saves
    return {
        save.save.iteration: f"the tracker names {save.tracker}"
        if save.tracker is not None and save.save.iteration > save.tracker and not save.problem
        else save.problem
        for save in found
    }


def loads(root: Path, save: SaveId) -> None:
    """The checkpoint is whole and holds what its attempt wrote, every byte of it."""
    reader = open_checkpoint(store_at(root).folder_of(save), FS)
    reader.verify()
    out = torch.zeros(6)
    reader.read([Target("model/0/w", out, (0,), (6,))])
    reader.close()
    assert torch.equal(out, content_of(save.iteration, save.attempt))


def newest(root: Path) -> SaveId:
    found = store_at(root).inventory(RUN)
    return next(save.save for save in found.shared_saves if not save.problem)


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


# -- a commit --------------------------------------------------------------------------------------------------------


def test_a_committed_save_is_the_newest_and_leaves_nothing_else_behind(tmp_path: Path) -> None:
    store = owned(tmp_path / "save")
    publish(store, 10)
    publish(store, 20)
    assert usable(tmp_path / "save") == [20, 10]
    loads(tmp_path / "save", SaveId(20, 1, FIRST))
    assert names(tmp_path / "save") == {
        *("resilience.json", "iter_0000010", "iter_0000020"),
        *("latest_checkpointed_iteration.txt", "latest_train_state.pt"),
    }
    assert (tmp_path / "save" / "latest_checkpointed_iteration.txt").read_bytes() == b"20"
    assert torch.load(tmp_path / "save" / "latest_train_state.pt", weights_only=True)["step"] == 20


def test_the_inventory_tells_what_a_save_is(tmp_path: Path) -> None:
    publish(owned(tmp_path), 10)
    (save,) = store_at(tmp_path).inventory(RUN).shared_saves
    assert (save.tier, save.run_id, save.save, save.world_size) == ("persistent", RUN, SaveId(10, 1, FIRST), 2)
    folder = tmp_path / "iter_0000010"
    own = ("resilience.json", "integrity.json")
    assert save.nbytes == sum(path.stat().st_size for path in folder.iterdir() if path.name not in own)


def test_a_save_of_an_iteration_that_exists_takes_its_place(tmp_path: Path) -> None:
    publish(owned(tmp_path), 10)
    publish(owned(tmp_path, SECOND, 2), 10, SECOND, 2)
    loads(tmp_path, SaveId(10, 2, SECOND))
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_a_folder_that_is_not_whole_is_not_committed(tmp_path: Path) -> None:
    store = owned(tmp_path)
    publish(store, 10)
    folder = store.begin(20, FIRST)
    fill(folder, 20, FIRST, 1)
    (folder / "__1_0.distcp").write_bytes(b"short")
    with pytest.raises(SaveFailedError, match=r"__1_0\.distcp has 5 bytes"):
        store.commit(20, FIRST)
    (folder / "resilience.json").unlink()
    with pytest.raises(SaveFailedError, match=r"resilience\.json is missing"):
        store.commit(20, FIRST)
    assert usable(tmp_path) == [10]


def test_beginning_again_starts_from_an_empty_folder(tmp_path: Path) -> None:
    store = owned(tmp_path)
    (store.begin(10, FIRST) / "stale").write_text("x")
    assert not list(store.begin(10, FIRST).iterdir())


class Crash(BaseException):
    """The process dies here: no handler of the code under test sees it."""


class CrashingFileSystem(PosixFileSystem):
    """Dies before, or half-way through, the n-th call that changes something, and at every call after it."""

    CHANGES = ("make_dir", "write_atomic", "write_file", "rename", "unlink", "remove_tree", "fsync_dir")

    def __init__(self, crash_at: int, after: bool, error: Callable[[], BaseException]) -> None:
        self.left = crash_at
        self._after = after
        self._error = error

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name not in CrashingFileSystem.CHANGES:
            return method

        def counted(*arguments: Any, **options: Any) -> Any:
            self.left -= 1
            if self.left > 0:
                return method(*arguments, **options)
            if self.left == 0 and self._after:
                method(*arguments, **options)
            raise self._error()

        return counted


@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
@pytest.mark.parametrize("again", [False, True], ids=["a new iteration", "an iteration that exists"])
@pytest.mark.parametrize("error", [Crash, lambda: StoreError("No space left on device.")], ids=["crash", "error"])
def test_a_crash_at_any_call_of_a_save_leaves_the_old_or_the_new_checkpoint(
    tmp_path: Path, after: bool, again: bool, error: Callable[[], BaseException]
) -> None:
    old, new = SaveId(10, 1, FIRST), SaveId(10 if again else 20, 2, SECOND)
    seen: set[SaveId] = set()
    for crash_at in range(1, 60):
        root = tmp_path / str(crash_at)
        store = owned(root)
        publish(store, 5)
        publish(store, old.iteration)
        fs = CrashingFileSystem(crash_at, after, error)
        dying = owned(root, SECOND, 2)
        dying._fs = fs
        try:
            fill(dying.begin(new.iteration, SECOND), new.iteration, SECOND, 2)
            dying.commit(new.iteration, SECOND)
        except (Crash, StoreError):
            pass
        finished = fs.left > 0

        # Somebody who only looks finds a good one too, at worst an older iteration.
        loads(root, newest(root))
        healed = owned(root, THIRD, 3)
        healed.heal()
        found = newest(root)
        assert found in (old, new)
        assert found == new or not finished
        loads(root, found)
        seen.add(found)
        assert not [name for name in names(root) if name.startswith(".")], names(root)
        tracked = (root / "latest_checkpointed_iteration.txt").read_text()
        assert tracked == str(found.iteration)
        publish(healed, 30, THIRD, 3)
        loads(root, SaveId(30, 3, THIRD))
        if finished:
            break
    else:
        pytest.fail("the save never succeeded")
    assert seen == {old, new}, "both outcomes were met"


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_while_healing_loses_nothing_either(tmp_path: Path, after: bool) -> None:
    for crash_at in range(1, 60):
        root = tmp_path / str(crash_at)
        publish(owned(root), 10)
        dying = owned(root, SECOND, 2)
        fill(dying.begin(10, SECOND), 10, SECOND, 2)
        dying._fs = CrashingFileSystem(6, False, Crash)  # the old folder is aside, the new one not yet in place
        with pytest.raises(Crash):
            dying.commit(10, SECOND)
        assert "iter_0000010" not in names(root)

        healing = owned(root, THIRD, 3)
        healing._fs = fs = CrashingFileSystem(crash_at, after, Crash)
        with contextlib.suppress(Crash):
            healing.heal()
        owned(root, "d" * 32, 4).heal()
        loads(root, newest(root))
        assert newest(root) == SaveId(10, 2, SECOND)
        if fs.left > 0:
            return
    pytest.fail("healing never succeeded")


def test_an_error_in_a_commit_is_made_good_by_the_next_save(tmp_path: Path) -> None:
    store = owned(tmp_path)
    publish(store, 10)
    fill(store.begin(20, FIRST), 20, FIRST, 1)
    store._fs = CrashingFileSystem(4, False, lambda: StoreError("No space left on device."))
    with pytest.raises(StoreError, match="No space"):
        store.commit(20, FIRST)
    store._fs = FS
    publish(store, 30)
    assert usable(tmp_path) == [30, 20, 10]
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "30"


def test_an_interrupted_commit_whose_folder_is_torn_is_taken_back(tmp_path: Path) -> None:
    publish(owned(tmp_path), 10)
    dying = owned(tmp_path, SECOND, 2)
    fill(dying.begin(10, SECOND), 10, SECOND, 2)
    dying._fs = CrashingFileSystem(6, False, Crash)
    with pytest.raises(Crash):
        dying.commit(10, SECOND)
    (tmp_path / ".saving-10-bbbbbbbb" / "__0_0.distcp").unlink()
    (said,) = owned(tmp_path, THIRD, 3).heal()
    assert "taken back: __0_0.distcp is missing" in said
    assert newest(tmp_path) == SaveId(10, 1, FIRST)
    loads(tmp_path, SaveId(10, 1, FIRST))


# -- who may write ---------------------------------------------------------------------------------------------------


def test_another_runs_directory_is_refused(tmp_path: Path) -> None:
    owned(tmp_path)
    with pytest.raises(ConfigError, match=r"belongs to run 'run-a', and this is run 'run-b'"):
        owned(tmp_path, SECOND, 2, run_id="run-b")


def test_an_older_generation_does_not_take_over(tmp_path: Path) -> None:
    owned(tmp_path, SECOND, 2)
    with pytest.raises(EvictedError, match="generation 2"):
        owned(tmp_path, FIRST, 1)


def test_of_two_attempts_of_one_generation_the_later_starter_wins(tmp_path: Path) -> None:
    older, newer = owned(tmp_path, FIRST, 3), owned(tmp_path, SECOND, 3)
    newer.check_owner()
    with pytest.raises(EvictedError, match="took over"):
        older.begin(10, FIRST)


def test_an_older_job_that_is_still_alive_publishes_nothing_more(tmp_path: Path) -> None:
    older = owned(tmp_path)
    publish(older, 10)
    fill(older.begin(20, FIRST), 20, FIRST, 1)
    owned(tmp_path, SECOND, 2)
    for step in (lambda: older.commit(20, FIRST), older.heal, lambda: older.begin(30, FIRST), older.check_owner):
        with pytest.raises(EvictedError):
            step()
    assert usable(tmp_path) == [10]


class TakenOver(PosixFileSystem):
    """A newer attempt takes the directory over just before the n-th rename of this one."""

    def __init__(self, root: Path, at: int) -> None:
        self.root = root
        self.left = at

    def rename(self, source: Path, target: Path) -> None:
        self.left -= 1
        if self.left == 0:
            owned(self.root, SECOND, 2).heal()
        super().rename(source, target)

    def write_atomic(self, path: Path, content: bytes, *, durable: bool = True) -> None:
        self.left -= 1
        if self.left == 0:
            owned(self.root, SECOND, 2).heal()
        super().write_atomic(path, content, durable=durable)


@pytest.mark.parametrize("at", range(1, 6))
def test_a_job_that_is_taken_over_in_mid_commit_stops_within_one_rename(tmp_path: Path, at: int) -> None:
    publish(owned(tmp_path), 10)
    older = owned(tmp_path)
    fill(older.begin(10, FIRST), 10, FIRST, 1)
    older._fs = fs = TakenOver(tmp_path, at)
    with pytest.raises((EvictedError, StoreError)):
        older.commit(10, FIRST)
    assert fs.left == 0, "not one rename more"
    owned(tmp_path, THIRD, 3).heal()
    loads(tmp_path, newest(tmp_path))


def test_a_directory_without_owner_is_not_written_to(tmp_path: Path) -> None:
    store = owned(tmp_path)
    (tmp_path / "resilience.json").unlink()
    with pytest.raises(EvictedError, match="nobody"):
        store.begin(10, FIRST)
    with pytest.raises(RuntimeError, match="without take_ownership"):
        store_at(tmp_path).begin(10, FIRST)


def test_an_owners_file_that_is_damaged_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "resilience.json").write_text("{")
    with pytest.raises(CorruptCopyError, match=r"resilience\.json"):
        owned(tmp_path)


def test_foreign_checkpoints_do_not_keep_a_run_out(tmp_path: Path) -> None:
    (tmp_path / "iter_0000005").mkdir()
    publish(owned(tmp_path), 10)
    assert usable(tmp_path) == [10]
    assert (tmp_path / "iter_0000005").is_dir(), "nor are they touched"


# -- what can be resumed from ----------------------------------------------------------------------------------------


def test_a_directory_that_is_not_there_is_empty(tmp_path: Path) -> None:
    found = store_at(tmp_path / "nowhere").inventory(RUN)
    assert (found.shared_saves, found.unknown, found.notes) == ((), "", ())


@pytest.mark.parametrize("call", ["list_dir", "stat", "read"])
def test_a_directory_that_cannot_be_looked_at_is_unknown_and_never_empty(
    tmp_path: Path, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(owned(tmp_path), 10)
    fs = PosixFileSystem()

    def broken(*arguments: Any, **options: Any) -> Any:
        raise StoreError("Input/output error")

    monkeypatch.setattr(fs, call, broken)
    found = store_at(tmp_path, fs).inventory(RUN)
    assert "Input/output error" in found.unknown
    assert not found.shared_saves


def test_what_is_newer_than_the_tracker_is_passed_over(tmp_path: Path) -> None:
    store = owned(tmp_path)
    for iteration in (10, 20, 30):
        publish(store, iteration)
    for tracker, name in (("latest_train_state.pt", "train_state.pt"), ("latest_checkpointed_iteration.txt", "")):
        rolled_back = (tmp_path / "iter_0000020" / name).read_bytes() if name else b"20"
        (tmp_path / tracker).write_bytes(rolled_back)
    assert problems(tmp_path) == {30: "the tracker names 20", 20: "", 10: ""}


def test_the_binary_tracker_counts_and_a_disagreement_is_noted(tmp_path: Path) -> None:
    store = owned(tmp_path)
    publish(store, 10)
    publish(store, 20)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    found = store_at(tmp_path).inventory(RUN)
    assert usable(tmp_path) == [20, 10]
    assert any("names 20" in note and "10" in note for note in found.notes)


@pytest.mark.parametrize("torn", [b"", b"PK\x03\x04 torn", None])
def test_the_text_tracker_counts_where_the_other_is_absent_or_torn(tmp_path: Path, torn: bytes | None) -> None:
    store = owned(tmp_path)
    publish(store, 10)
    publish(store, 20)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    (tmp_path / "latest_train_state.pt").unlink()
    if torn is not None:
        (tmp_path / "latest_train_state.pt").write_bytes(torn)
    assert usable(tmp_path) == [10]


def test_without_a_tracker_the_newest_complete_one_is_taken_and_that_is_noted(tmp_path: Path) -> None:
    store = owned(tmp_path)
    for iteration in (10, 20, 30):
        publish(store, iteration)
    for tracker in ("latest_train_state.pt", "latest_checkpointed_iteration.txt"):
        (tmp_path / tracker).unlink()
    (tmp_path / "iter_0000030" / "__0_0.distcp").unlink()
    found = store_at(tmp_path).inventory(RUN)
    assert usable(tmp_path) == [20, 10]
    assert any("no readable tracker" in note and "20" in note for note in found.notes)


def test_a_tracker_that_names_a_torn_folder_is_not_trusted(tmp_path: Path) -> None:
    store = owned(tmp_path)
    publish(store, 10)
    publish(store, 20)
    (tmp_path / "iter_0000020" / "__1_0.distcp").write_bytes(b"")
    found = store_at(tmp_path).inventory(RUN)
    assert problems(tmp_path)[20].startswith("__1_0.distcp has 0 bytes")
    assert usable(tmp_path) == [10]
    assert any("names 20, which cannot be used" in note and "10 is taken" in note for note in found.notes)


def test_a_leftover_of_another_run_with_a_higher_iteration_is_never_usable(tmp_path: Path) -> None:
    publish(owned(tmp_path), 10)
    fill(tmp_path / "iter_0000099", 99, SECOND, 5, run_id="run-b")
    (tmp_path / "latest_train_state.pt").unlink()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("99")
    assert problems(tmp_path)[99] == "it belongs to run run-b"
    assert usable(tmp_path) == [10]
    assert store_at(tmp_path).inventory(RUN).foreign_runs == ("run-b",)
    assert usable(tmp_path, source="load") == [99, 10], "under `load` the election decides"


def test_a_foreign_checkpoint_has_generation_zero(tmp_path: Path) -> None:
    fill(tmp_path / "iter_0000010", 10, FIRST, 1)
    (tmp_path / "iter_0000010" / "resilience.json").unlink()
    (save,) = store_at(tmp_path).inventory(RUN).shared_saves
    assert (save.save, save.run_id, save.problem) == (SaveId(10, 0, ""), None, "")
    assert save.nbytes > 0


def test_release_is_found_under_iteration_zero(tmp_path: Path) -> None:
    fill(tmp_path / "release", 0, FIRST, 1)
    (tmp_path / "release" / "resilience.json").unlink()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("release")
    (save,) = store_at(tmp_path, source="pretrained").inventory(RUN).shared_saves
    assert (save.save.iteration, save.problem) == (0, "")
    assert store_at(tmp_path).folder_of(save.save) == tmp_path / "release"


def test_folders_of_other_names_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("iter_old", "iter_7", "iter_00000010", "non_persistent", ".saving-10-aaaaaaaa"):
        (tmp_path / name).mkdir()
    assert not store_at(tmp_path).inventory(RUN).shared_saves
    assert iteration_of(folder_name(123456789)) == 123456789


def test_a_folder_that_was_renamed_to_another_iteration_is_not_usable(tmp_path: Path) -> None:
    publish(owned(tmp_path), 10)
    (tmp_path / "iter_0000010").rename(tmp_path / "iter_0000020")
    assert "its record says iteration 10" in problems(tmp_path)[20]


def test_a_non_persistent_global_save_has_its_tier(tmp_path: Path) -> None:
    store = store_at(tmp_path, source="global")
    store.take_ownership(RUN, FIRST, 1)
    publish(store, 10)
    assert [save.tier for save in store.inventory(RUN).shared_saves] == ["global"]


# -- attempt logs ----------------------------------------------------------------------------------------------------


def test_attempt_logs_are_kept_and_a_damaged_one_is_noted(tmp_path: Path) -> None:
    store = owned(tmp_path)
    log = AttemptLog(RUN, FIRST, 1, base=SaveId(5, 0, FIRST), completed=SaveId(10, 1, FIRST), end="stopped")
    other = AttemptLog("run-b", SECOND, 2)
    for entry in (log, other):
        store.write_attempt_log(entry)
    (tmp_path / "attempts" / "g0003-cccccccc.json").write_text("{")
    assert set(store.attempt_logs()) == {log, other}
    found = store.inventory(RUN)
    assert found.attempts == (log,)
    assert found.foreign_runs == ("run-b",)
    assert any("g0003-cccccccc" in note for note in found.notes)
    assert (tmp_path / "attempts" / "g0001-aaaaaaaa.json").exists()


# -- deletion --------------------------------------------------------------------------------------------------------


def test_prune_keeps_the_newest_ones(tmp_path: Path) -> None:
    store = owned(tmp_path)
    for iteration in (10, 20, 30, 40):
        publish(store, iteration)
    assert [save.iteration for save in store.prune(2)] == [20, 10]
    assert usable(tmp_path) == [40, 30]
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_the_only_complete_one_is_never_deleted(tmp_path: Path) -> None:
    store = owned(tmp_path)
    for iteration in (10, 20, 30):
        publish(store, iteration)
    for iteration in (20, 30):
        (tmp_path / f"iter_{iteration:07d}" / "__0_0.distcp").unlink()
    assert store.prune(1) == ()
    assert usable(tmp_path) == [10]
    with pytest.raises(ValueError, match="at least 1"):
        store.prune(0)


def test_foreign_and_newer_ones_and_what_the_tracker_names_are_not_deleted(tmp_path: Path) -> None:
    store = owned(tmp_path)
    for iteration in (5, 10, 20, 30):
        publish(store, iteration)
    (tmp_path / "iter_0000005" / "resilience.json").unlink()
    fill(tmp_path / "iter_0000008", 8, SECOND, 1, run_id="run-b")
    (tmp_path / "latest_train_state.pt").write_bytes((tmp_path / "iter_0000020" / "train_state.pt").read_bytes())
    assert [save.iteration for save in store.prune(1)] == [10]
    assert {"iter_0000005", "iter_0000008", "iter_0000020", "iter_0000030"} <= names(tmp_path)


def test_abandoned_ones_do_not_count_as_kept(tmp_path: Path) -> None:
    store = owned(tmp_path)
    for iteration in (10, 20, 30):
        publish(store, iteration)
    (tmp_path / "latest_train_state.pt").unlink()
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    assert store.prune(1, abandoned={SaveId(30, 1, FIRST)}) == (SaveId(30, 1, FIRST), SaveId(10, 1, FIRST))
    assert usable(tmp_path) == [20]


@pytest.mark.parametrize("after", [False, True])
def test_a_crash_in_the_middle_of_a_deletion_leaves_the_newest(tmp_path: Path, after: bool) -> None:
    for crash_at in range(1, 20):
        root = tmp_path / str(crash_at)
        store = owned(root)
        for iteration in (10, 20, 30):
            publish(store, iteration)
        store._fs = fs = CrashingFileSystem(crash_at, after, Crash)
        with contextlib.suppress(Crash):
            store.prune(1)
        assert all(problem == "" for problem in problems(root).values()), "no half-deleted folder looks like one"
        loads(root, SaveId(30, 1, FIRST))
        owned(root, SECOND, 2).heal()
        assert not [name for name in names(root) if name.startswith(".")]
        if fs.left > 0:
            return
    pytest.fail("the deletion never succeeded")


def test_leftovers_of_dead_writers_are_swept(tmp_path: Path) -> None:
    publish(owned(tmp_path), 10)
    for name in (".saving-20-aaaaaaaa", ".trash-5-aaaaaaaa", ".aside-10-aaaaaaaa"):
        (tmp_path / name).mkdir()
    (tmp_path / ".tmp-1-1-latest_train_state.pt").write_text("x")
    (tmp_path / ".commit-20-aaaaaaaa.json").write_text(json.dumps({"torn": True}))
    said = owned(tmp_path, SECOND, 2).heal()
    assert len(said) == 4
    assert not [name for name in names(tmp_path) if name.startswith(".")]
    loads(tmp_path, SaveId(10, 1, FIRST))


@pytest.fixture(autouse=True)
def _no_torch_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
