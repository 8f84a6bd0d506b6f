"""Promise 2: a crash at any call of a save or a deletion leaves a state in which a good save is found."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resilience.errors import CorruptCopyError, StoreError
from resilience.planning.inventory import AttemptLog, SaveId
from resilience.snapshot.arena import Arena
from resilience.stores.digest import digest_of
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.keeper import ShardKeeper
from resilience.stores.lock import DirectoryLock
from resilience.stores.node_reader import newer_log
from resilience.stores.node_store import NodeStore
from tests.core.shards import ATTEMPT, record_of

SIZE = 4096
FS = PosixFileSystem()
CHANGES = (
    "make_dir", "write_atomic", "create_mapping", "write_file", "rename", "unlink", "remove_dir", "remove_tree",
    "fsync_dir",
)  # fmt: skip


class Crash(BaseException):
    """The process is gone: nothing gets to clean up."""


class FailingFileSystem(PosixFileSystem):
    """Fails at change number `at`, before or after it was made: by a crash, after which nothing works, or an error."""

    def __init__(self, at: int, after: bool, crash: bool) -> None:
        self.at, self.after, self.crash = at, after, crash
        self.calls = 0
        self.dead = False

    def __getattribute__(self, name: str) -> Any:
        method = super().__getattribute__(name)
        if name not in CHANGES:
            return method

        def call(*arguments: Any, **options: Any) -> Any:
            if self.dead:
                raise Crash
            self.calls += 1
            failing = self.calls == self.at
            if failing and not self.after:
                self._fail(name)
            result = method(*arguments, **options)
            if failing and (self.crash or name != "rename"):  # a rename that is an error did not happen
                self._fail(name)
            return result

        return call

    def _fail(self, name: str) -> None:
        self.dead = self.crash
        if self.crash:
            raise Crash
        raise StoreError(f"call {self.calls}, {name}, failed: Input/output error.")


def save_at(iteration: int) -> SaveId:
    return SaveId(iteration, 2, ATTEMPT)


def letter(iteration: int) -> bytes:
    return bytes([iteration]) * SIZE


def keeper_on(base: Path, arenas: Path, fs: PosixFileSystem) -> ShardKeeper:
    store = NodeStore(base, "run", "a", "local", fs)
    store.prepare()
    fs.make_dir(arenas)
    return ShardKeeper(store, arenas, fs, 0, 1, lambda: 1.5)


def commit(keeper: ShardKeeper, iteration: int) -> None:
    arena = keeper.take_arena(SIZE, 4, 1.0)
    try:
        arena.mapped.view[:] = letter(iteration)
        keeper.commit(save_at(iteration), 0, arena, digest_of(letter(iteration)), role="primary", split=False)
    finally:
        keeper.unpin(arena)
    keeper.store.write_certificate(save_at(iteration), 1, protected=True)
    keeper.store.write_attempt_log(AttemptLog("run", ATTEMPT, 2, completed=save_at(iteration)))


def life(keeper: ShardKeeper, quietly: Callable[[], Any]) -> None:
    """A few saves and deletions, such that a complete save always exists. `quietly` survives an error, no crash."""
    for iteration in (5, 10, 15):
        with quietly():
            commit(keeper, iteration)
            if iteration > 5:
                keeper.delete(save_at(iteration - 5))


def found(base: Path) -> dict[int, bytes]:
    """What the next start finds after it swept: by iteration, the content of every copy that verifies."""
    store = NodeStore(base, "run", "a", "local", FS)
    store.prepare()
    store.remover.sweep()
    good = {}
    assert store.reader.inventory().notes == (), "records come last and go first: none is ever without its bytes"
    for save in store.reader.inventory().node_saves:
        location = store.reader.locate(save.save, 0, 1, "a")
        content = location.path.read_bytes()
        assert digest_of(content) == save.digests[0], "a copy with a record is always the owner's bytes"
        good[save.save.iteration] = content
    return good


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("after", [False, True], ids=["before the call", "after the call"])
@pytest.mark.parametrize("crash", [True, False], ids=["crash", "error"])
def test_a_failure_at_any_call_of_saves_and_deletions_leaves_a_good_save(
    memory_mount: Path, tmp_path: Path, where: str, after: bool, crash: bool
) -> None:
    quietly = contextlib.nullcontext if crash else lambda: contextlib.suppress(StoreError)
    committed_before = 0
    for at in range(1, 500):
        base = (memory_mount if where == "memory" else tmp_path) / f"base{at}"
        arenas = memory_mount / f"arenas{at}"
        fs = FailingFileSystem(10**9, after, crash)
        keeper = keeper_on(base, arenas, fs)
        fs.at = fs.calls + at
        with contextlib.suppress(Crash):
            life(keeper, quietly)
        there = found(base)
        assert all(content == letter(iteration) for iteration, content in there.items())
        if crash:
            committed_before = max(committed_before, max(there, default=0))
            assert max(there, default=0) == committed_before, "what was committed once is there at any later crash"
        else:
            assert 15 in there or 10 in there, "one error costs one save at most"
        shutil.rmtree(base)
        shutil.rmtree(arenas, ignore_errors=True)
        if fs.calls < fs.at:
            assert set(there) == {15}, "the last round failed nowhere"
            assert at > 15, "and it was not the first"
            return
    raise AssertionError("it never came to an end")


# -- reading -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(memory_mount: Path) -> NodeStore:
    store = NodeStore(memory_mount, "run", "a", "local", FS)
    store.prepare()
    return store


def put(store: NodeStore, iteration: int, owner: int = 0, world_size: int = 2, **fields: Any) -> Path:
    """A committed copy in the store's own directory."""
    content = letter(iteration)
    given = {"save": save_at(iteration), "node_id": store.node_id, "tier": store.tier} | fields
    record = record_of(content, owner, world_size, **given)
    path = store.arenas / f"new{owner}"
    arena = Arena(FS.create_mapping(path, SIZE))
    arena.mapped.view[:] = content
    arena.close()
    return store.commit_file(path, record)


def test_an_inventory_reads_every_directory_of_the_run_below_the_base(store: NodeStore) -> None:
    """Host names of containers change: what an earlier name left is found."""
    put(store, 5, 0)
    other = NodeStore(store.base, "run", "old-name", "local", FS)
    other.prepare()
    put(other, 5, 1, role="replica")
    foreign = NodeStore(store.base, "another-run", "a", "local", FS)
    foreign.prepare()
    put(foreign, 50, run_id="another-run")
    found = store.reader.inventory().node_saves
    held = {(save.node_id, save.save.iteration, save.owners, save.roles) for save in found}
    assert held == {("a", 5, (0,), ("primary",)), ("old-name", 5, (1,), ("replica",))}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.with_suffix(".json").write_bytes(b"{}"),
        lambda path: path.with_suffix(".json").rename(path.with_name("rank_00001-of-00002.json")),
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"short"),
        lambda path: (path.rename(path.with_name("elsewhere")), path.symlink_to("elsewhere")),
    ],
    ids=["record garbled", "record of another", "bytes missing", "bytes too short", "bytes are a link"],
)
def test_a_copy_that_is_not_what_its_record_says_is_left_out_with_a_note(
    store: NodeStore, spoil: Callable[[Path], Any]
) -> None:
    put(store, 10)
    spoil(put(store, 5))
    inventory = store.reader.inventory()
    assert [save.save.iteration for save in inventory.node_saves] == [10]
    assert len(inventory.notes) == 1
    assert not inventory.unknown
    with pytest.raises((CorruptCopyError, StoreError, FileNotFoundError)):
        store.reader.locate(save_at(5), 0, 2, "a")


def test_a_record_moved_to_another_saves_folder_is_no_copy_of_it(store: NodeStore) -> None:
    folder = put(store, 5).parent
    put(store, 10)
    for name in ("rank_00000-of-00002.json", "rank_00000-of-00002.safetensors"):
        shutil.copyfile(folder / name, store.root / "iter_0000010" / folder.name / name)
    assert [save.save.iteration for save in store.reader.inventory().node_saves] == [5]


def test_a_sweep_leaves_the_directory_of_a_live_job_alone(store: NodeStore) -> None:
    live = NodeStore(store.base, "run", "live", "local", FS)
    live.prepare()
    dead = NodeStore(store.base, "run", "dead", "local", FS)
    dead.prepare()
    for each in (live, dead):
        (each.arenas / "buffer").write_bytes(b"x")
    lock = DirectoryLock(live.root, 3)
    lock.acquire()
    try:
        store.remover.sweep()
    finally:
        lock.release()
    assert (live.arenas / "buffer").exists()
    assert not (dead.arenas / "buffer").exists()


def test_dropping_earlier_attempts_keeps_what_is_named_and_what_this_attempt_wrote(store: NodeStore) -> None:
    mine = replace(save_at(15), attempt="beef0000" + "0" * 24, generation=3)
    put(store, 5)
    put(store, 10)
    put(store, 15)
    put(store, 15, save=mine)
    store.remover.drop_earlier_attempts(mine.attempt, [save_at(10)])
    assert [save.save for save in store.reader.inventory().node_saves] == [save_at(10), mine]
    assert not (store.root / "iter_0000005").exists()


def test_a_folder_of_the_same_iteration_of_another_attempt_survives_a_deletion(store: NodeStore) -> None:
    mine = replace(save_at(5), attempt="beef0000" + "0" * 24, generation=3)
    put(store, 5)
    put(store, 5, save=mine)
    store.remover.drop(save_at(5))
    assert [save.save for save in store.reader.inventory().node_saves] == [mine]


def test_of_two_copies_of_an_attempts_log_the_one_that_knows_more_counts() -> None:
    early = AttemptLog("run", ATTEMPT, 2)
    late = replace(early, completed=save_at(10))
    ended = replace(early, completed=save_at(5), end="stopped", end_iteration=7)
    assert newer_log(early, late) == newer_log(late, early) == late
    assert newer_log(late, ended) == replace(late, end="stopped", end_iteration=7)
