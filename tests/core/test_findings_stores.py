"""What once went wrong between a store's parts: arenas freed twice or never, copies struck off without cause."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from resilience.errors import CorruptCopyError, SaveFailedError, StoreError, UnsafePathError
from resilience.job import Job
from resilience.planning.decision import Strike
from resilience.planning.inventory import SaveId
from resilience.planning.retrieval import Fetch, RetrievalPlan
from resilience.planning.topology import Topology
from resilience.replication import gathering
from resilience.replication.communicator import Communicator
from resilience.replication.gathering import ShardGatherer
from resilience.replication.retrieval import Fetched
from resilience.snapshot.arena import Arena
from resilience.stores import filesystem
from resilience.stores.digest import digest_of
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.keeper import ShardKeeper
from resilience.stores.node_store import NodeStore
from resilience.stores.records import ShardRecord
from tests.core.shards import ATTEMPT, SAVE, identity, item, layout_of, random_bytes

SIZE = 4096


class Interrupted(PosixFileSystem):
    """Lets a test step in right before a rename."""

    def __init__(self) -> None:
        self.before_rename = lambda: None

    def rename(self, source: Path, target: Path) -> None:
        self.before_rename()
        super().rename(source, target)


@pytest.fixture
def fs() -> Interrupted:
    return Interrupted()


@pytest.fixture
def keeper(fs: Interrupted, memory_mount: Path) -> Iterator[ShardKeeper]:
    """Rank 0 of two, on a mount where the file is the arena."""
    store = NodeStore(memory_mount, "run", "a", "in_memory", fs)
    store.prepare()
    keeper = ShardKeeper(store, store.arenas, fs, 0, 2, lambda: 1.5)
    yield keeper
    keeper.close()


def save_at(iteration: int) -> SaveId:
    return SaveId(iteration, 2, ATTEMPT)


def commit(keeper: ShardKeeper, iteration: int) -> Arena:
    """A copy of this rank's shard whose arena is still read: pinned once."""
    arena = keeper.take_arena(SIZE, 9, 1.0)
    arena.mapped.view[:] = b"x" * SIZE
    keeper.commit(save_at(iteration), 0, arena, digest_of(arena.mapped.view), role="primary", split=False)
    return arena


def test_an_arena_whose_last_reader_ends_during_its_deletion_is_free_once(fs: Interrupted, keeper: ShardKeeper) -> None:
    arena = commit(keeper, 5)
    fs.before_rename = lambda: keeper.unpin(arena)  # the drain's end, at the worst moment
    keeper.delete(save_at(5))
    fs.before_rename = lambda: None
    first, second = (keeper.take_arena(SIZE, 9, 1.0) for _ in range(2))
    assert first is not second, "two snapshots would be written into one buffer"


def test_copies_kept_on_a_node_take_no_arenas_once_saves_go_elsewhere(keeper: ShardKeeper) -> None:
    for iteration in (5, 10):
        keeper.unpin(commit(keeper, iteration))
    with pytest.raises(SaveFailedError):
        keeper.take_arena(SIZE, 2, 0.05)
    keeper.unpin(keeper.take_arena(SIZE, 2, 0.05, held_count=False))


def test_what_was_fetched_in_a_round_that_failed_gives_its_arena_back(keeper: ShardKeeper) -> None:
    for iteration in (5, 10):
        keeper.unpin(commit(keeper, iteration))
    keeper.keep_only([save_at(5)])
    assert [held.save for held in keeper.store.reader.inventory().node_saves] == [save_at(5)]
    keeper.unpin(keeper.take_arena(SIZE, 2, 0.05))


class Refusing(PosixFileSystem):
    """A mount that is full for small files, or that lets nothing be removed."""

    def __init__(self, *, full: bool = False) -> None:
        self.full = full
        self.read_only = False

    def write_atomic(self, path: Path, content: bytes, *, durable: bool = True) -> None:
        if self.full:
            raise StoreError(f"cannot write {path}: no space is left.")
        super().write_atomic(path, content, durable=durable)

    def unlink(self, path: Path) -> bool:
        if self.read_only:
            raise StoreError(f"cannot remove {path}: the mount is read-only.")
        return super().unlink(path)


def gatherer_on(base: Path, fs: PosixFileSystem, told: list[str]) -> tuple[ShardGatherer, ShardKeeper]:
    """The restore of rank 0 of two, on node a; what rank 1 sends is made by the tests."""
    store = NodeStore(base, "run", "a", "in_memory", fs)
    store.prepare()
    keeper = ShardKeeper(store, store.arenas, fs, 0, 2, lambda: 1.5)
    job = cast("Job", SimpleNamespace(rank=0, world_size=2, node_id="a", leads_node=True, node_ranks=(0,)))
    topology = cast("Topology", SimpleNamespace(held=lambda: ((1,), (0,))))
    links = cast("Communicator", None)  # nothing here goes over a link
    return ShardGatherer(job, links, [store], keeper, topology, lambda _, what, advice: told.append(what)), keeper


def arrive(gatherer: ShardGatherer, keeper: ShardKeeper, monkeypatch: pytest.MonkeyPatch, problem: str) -> list[Strike]:
    """One round in which rank 0's shard comes from node b: whole, or with a `problem`."""
    items = [item("model/0/a", random_bytes(torch.float32, [8]))]
    layout = layout_of(items)
    arena = keeper.slot(0, layout.nbytes)
    arena.use(layout)
    arena.write_values(b"{}")
    arena.seal(identity(0, 2))
    fetch = Fetch(0, "b", "b", "in_memory", 1, "a", 0, layout.nbytes, digest_of(arena.mapped.view))
    monkeypatch.setattr(gathering, "run_fetches", lambda *_, **__: [Fetched(fetch, arena, problem)])
    return gatherer.obtain(SAVE, RetrievalPlan((), (fetch,), ()), False, "round")


def test_a_node_that_cannot_commit_what_it_fetched_loads_it_and_says_that_it_keeps_none(
    memory_mount: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    gatherer, keeper = gatherer_on(memory_mount, Refusing(full=True), told)
    assert arrive(gatherer, keeper, monkeypatch, "") == [], "no copy is to blame"
    ((owner, path),) = gatherer.loose(SAVE)
    assert owner == 0
    assert Path(path).parent == keeper.arena_dir
    assert gatherer.shards(SAVE, RetrievalPlan(), (0,))[0].header.owner == 0
    assert any("no space is left" in what for what in told)
    assert keeper.store.reader.inventory().node_saves == ()
    gatherer.close()
    assert len(list(keeper.arena_dir.iterdir())) == 1, "a warm buffer for the next one"
    assert keeper.warm_slot(0, Path(path).stat().st_size) is not None


def test_what_a_full_node_holds_in_a_buffer_is_there_for_its_other_ranks(
    memory_mount: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = Refusing(full=True)
    holder, keeper = gatherer_on(memory_mount, fs, [])
    arrive(holder, keeper, monkeypatch, "")
    other, _ = gatherer_on(memory_mount, fs, [])
    other.borrow(SAVE, holder.loose(SAVE))
    assert (
        other.shards(SAVE, RetrievalPlan(), (0,))[0].digest() == holder.shards(SAVE, RetrievalPlan(), (0,))[0].digest()
    )
    with pytest.raises(CorruptCopyError, match="another save"):
        gatherer_on(memory_mount, fs, [])[0].borrow(SAVE, [(1, path) for _, path in holder.loose(SAVE)])
    other.close()
    assert len(list(keeper.arena_dir.iterdir())) == 1, "it was lent"


def test_bytes_that_do_not_match_are_struck_off_and_their_memory_goes(
    memory_mount: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gatherer, keeper = gatherer_on(memory_mount, Refusing(), [])
    strikes = arrive(gatherer, keeper, monkeypatch, "its bytes have another digest")
    assert strikes == [Strike("b", "in_memory", SAVE, 0)]
    assert list(keeper.arena_dir.iterdir()) == []


def test_a_bad_copy_that_cannot_be_removed_is_told_of_and_fails_no_restore(memory_mount: Path) -> None:
    fs, told = Refusing(), list[str]()
    gatherer, keeper = gatherer_on(memory_mount, fs, told)
    slot = keeper.slot(1, SIZE)
    keeper.commit(SAVE, 1, slot, digest_of(slot.mapped.view), role="replica", split=False)  # zeros are no shard
    fs.read_only = True
    gatherer.drop_bad_copies([Strike("a", "in_memory", SAVE, 1)])
    fs.read_only = False
    assert any("read-only" in what for what in told)


def test_a_shard_whose_record_cannot_be_written_is_removed_from_the_disk(tmp_path: Path) -> None:
    store = NodeStore(tmp_path, "run", "a", "local", Refusing(full=True))
    store.prepare()
    content = memoryview(b"x" * SIZE)
    record = ShardRecord("run", SAVE, 0, 2, "primary", "local", "a", SIZE, digest_of(content), 1.5, False)
    with pytest.raises(StoreError):
        store.commit_bytes(content, record)
    assert not store.shard_path(SAVE, 0, 2).exists()


def test_two_containers_with_one_process_id_write_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Path] = []
    rename = os.rename
    monkeypatch.setattr(os, "rename", lambda source, target: (seen.append(Path(source)), rename(source, target))[1])
    for _ in range(2):
        monkeypatch.setattr(filesystem, "_counter", itertools.count())  # as in a process that has just begun
        PosixFileSystem().write_atomic(tmp_path / "log.json", b"{}")
    assert len(set(seen)) == 2


def test_what_another_writer_put_beside_is_not_removed_when_the_names_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "_counter", itertools.repeat(0))
    monkeypatch.setattr(secrets, "token_hex", lambda _: "0" * 8)
    theirs = tmp_path / f".tmp-{os.getpid()}-0-{'0' * 8}-log.json"
    theirs.write_bytes(b"half of")
    with pytest.raises(StoreError):
        PosixFileSystem().write_atomic(tmp_path / "log.json", b"{}")
    assert theirs.read_bytes() == b"half of"


@pytest.mark.parametrize("level", ["", "run", "run/a"])
def test_a_directory_in_which_others_may_swap_files_is_refused(tmp_path: Path, level: str) -> None:
    base = tmp_path / "base"
    store = NodeStore(base, "run", "a", "local", PosixFileSystem())
    store.prepare()
    (base / level).chmod(0o770)
    with pytest.raises(UnsafePathError, match="chmod go-w"):
        store.prepare()
    (base / level).chmod(0o1777)  # as /dev/shm: nobody may remove what is another's
    store.prepare()
