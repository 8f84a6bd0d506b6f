"""Arenas: free, filling, or sealed with readers; bytes are recycled when the record is gone and nobody reads them."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resilience.errors import SaveFailedError, StoreError
from resilience.planning.inventory import SaveId
from resilience.snapshot.arena import Arena
from resilience.stores.digest import digest_of
from resilience.stores.filesystem import MappedFile, PosixFileSystem
from resilience.stores.keeper import ShardKeeper
from resilience.stores.node_store import NodeStore
from resilience.stores.pages import always
from tests.core.shards import ATTEMPT, SAVE

SIZE = 4096


class NoRecords(PosixFileSystem):
    """Renames work, small files cannot be written."""

    refuse = False

    def write_atomic(self, path: Path, content: bytes, *, durable: bool = True) -> None:
        if self.refuse:
            raise StoreError(f"cannot write {path}: no space is left.")
        super().write_atomic(path, content, durable=durable)


@pytest.fixture(params=["memory", "disk"])
def keeper(request: pytest.FixtureRequest, memory_mount: Path, tmp_path: Path) -> Iterator[ShardKeeper]:
    base = memory_mount if request.param == "memory" else tmp_path
    fs = NoRecords()
    store = NodeStore(base, "run", "a", "local", fs)
    store.prepare()
    arenas = memory_mount / "arenas"
    fs.make_dir(arenas)
    keeper = ShardKeeper(store, arenas, fs, 0, 2, lambda: 1.5)
    assert keeper.file_is_arena == (request.param == "memory")
    yield keeper
    keeper.close()


def save_at(iteration: int) -> SaveId:
    return SaveId(iteration, 2, ATTEMPT)


def fill(arena: Arena, letter: bytes) -> str:
    arena.mapped.view[:] = letter * arena.nbytes
    return digest_of(arena.mapped.view)


def take(keeper: ShardKeeper, letter: bytes = b"x", *, capacity: int = 3, bound_s: float = 5.0) -> tuple[Arena, str]:
    arena = keeper.take_arena(SIZE, capacity, bound_s)
    return arena, fill(arena, letter)


def commit(keeper: ShardKeeper, iteration: int, letter: bytes = b"x", **options: Any) -> Arena:
    """As a save: take, commit, done with."""
    arena, digest = take(keeper, letter, **options)
    keeper.commit(save_at(iteration), 0, arena, digest, role="primary", split=False)
    keeper.unpin(arena)
    return arena


def content(keeper: ShardKeeper, iteration: int, owner: int = 0) -> bytes:
    return keeper.store.reader.locate(save_at(iteration), owner, 2, "a").path.read_bytes()


def test_a_committed_copy_holds_what_was_in_the_arena(keeper: ShardKeeper) -> None:
    commit(keeper, 5, b"a")
    commit(keeper, 10, b"b")
    assert content(keeper, 5) == b"a" * SIZE
    assert content(keeper, 10) == b"b" * SIZE
    assert keeper.holds(save_at(5), 0)


def test_deleted_copies_give_their_memory_to_the_next_save(keeper: ShardKeeper) -> None:
    seen = set()
    for iteration in range(1, 9):
        seen.add(id(commit(keeper, iteration, bytes([64 + iteration])).mapped))
        if iteration > 2:
            keeper.delete(save_at(iteration - 2))
            assert not keeper.holds(save_at(iteration - 2), 0)
    assert len(seen) <= 3
    assert content(keeper, 8) == bytes([72]) * SIZE
    assert content(keeper, 7) == bytes([71]) * SIZE
    assert [save.save.iteration for save in keeper.store.reader.inventory().node_saves] == [7, 8]
    assert sorted(path.name for path in keeper.store.root.glob("iter_*")) == ["iter_0000007", "iter_0000008"]


@pytest.mark.parametrize("keeper", ["memory"], indirect=True)  # on a disk it is free as soon as its bytes are written
def test_when_all_arenas_are_in_use_a_save_waits_for_a_deletion_within_a_bound(keeper: ShardKeeper) -> None:
    for iteration in (1, 2, 3):
        commit(keeper, iteration)
    with pytest.raises(SaveFailedError, match=r"no arena became free within 0\.2 s: 3 are in use"):
        keeper.take_arena(SIZE, 3, 0.2)
    threading.Timer(0.2, lambda: keeper.delete(save_at(1))).start()
    arena = keeper.take_arena(SIZE, 3, 5.0)
    keeper.unpin(arena)


def test_an_arena_that_somebody_reads_is_not_recycled_before_the_last_reader_is_done(keeper: ShardKeeper) -> None:
    arena, digest = take(keeper, b"r")
    keeper.pin(arena)  # a drain reads it, too
    keeper.commit(save_at(5), 0, arena, digest, role="primary", split=False)
    keeper.unpin(arena)
    keeper.delete(save_at(5))
    other, _ = take(keeper, b"n")
    assert other is not arena
    assert bytes(arena.mapped.view) == b"r" * SIZE, "the reader still sees the save"
    keeper.unpin(arena)
    keeper.unpin(other)
    again = [keeper.take_arena(SIZE, 3, 1.0) for _ in range(2)]
    assert arena in again, "free with its last reader"


def test_a_commit_that_fails_leaves_no_copy_and_a_buffer_that_can_be_used_again(keeper: ShardKeeper) -> None:
    keeper.store.fs.refuse = True  # type: ignore[attr-defined]
    arena, digest = take(keeper, b"f")
    with pytest.raises(StoreError):
        keeper.commit(save_at(5), 0, arena, digest, role="primary", split=False)
    keeper.unpin(arena)
    assert not keeper.holds(save_at(5), 0)
    keeper.delete(save_at(5))
    assert keeper.store.reader.inventory().node_saves == ()
    assert not keeper.store.reader.inventory().notes
    keeper.store.fs.refuse = False  # type: ignore[attr-defined]
    assert commit(keeper, 10, b"g") is arena
    assert content(keeper, 10) == b"g" * SIZE


def test_another_size_gets_a_new_buffer_and_the_old_ones_go(keeper: ShardKeeper) -> None:
    arena, _ = take(keeper)
    keeper.unpin(arena)
    path = arena.mapped.path
    larger = keeper.take_arena(2 * SIZE, 3, 1.0)
    assert larger.nbytes == 2 * SIZE
    assert not path.exists(), "its memory went back before new memory was asked for"
    keeper.unpin(larger)


def test_replicas_land_in_buffers_of_their_owner_that_are_used_again(keeper: ShardKeeper) -> None:
    slot = keeper.slot(1, SIZE)
    keeper.commit(save_at(5), 1, slot, fill(slot, b"p"), role="replica", split=False)
    assert content(keeper, 5, owner=1) == b"p" * SIZE
    keeper.delete(save_at(5))
    assert keeper.slot(1, SIZE) is slot


def test_a_buffer_that_a_broken_link_may_still_write_into_is_never_used_again(keeper: ShardKeeper) -> None:
    slot = keeper.slot(1, SIZE)
    keeper.discard(1, slot, reusable=False)
    assert keeper.slot(1, SIZE) is not slot
    assert not slot.mapped.path.exists()
    other = keeper.slot(1, SIZE)
    keeper.discard(1, other, reusable=True)
    assert keeper.slot(1, SIZE) is other


def test_what_was_fetched_for_a_load_only_goes_with_its_memory(keeper: ShardKeeper) -> None:
    slot = keeper.slot(1, SIZE)
    keeper.commit(save_at(5), 1, slot, fill(slot, b"q"), role="replica", split=False)
    keeper.give_up(save_at(5), 1)
    assert not keeper.holds(save_at(5), 1)
    assert keeper.store.reader.inventory().node_saves == ()
    assert list(keeper.arena_dir.iterdir()) == []


def test_copies_of_an_earlier_attempt_are_adopted_sent_and_deleted_like_our_own(keeper: ShardKeeper) -> None:
    commit(keeper, 5, b"o")
    again = ShardKeeper(keeper.store, keeper.arena_dir, keeper.store.fs, 0, 2, lambda: 1.5)
    again.adopt(save_at(5), [0, 1])
    assert again.holds(save_at(5), 0)
    assert not again.holds(save_at(5), 1), "which is not there"
    assert bytes(again.mapped(save_at(5), 0).mapped.view) == b"o" * SIZE
    again.delete(save_at(5))
    assert again.store.reader.inventory().node_saves == ()
    again.close()


def test_closing_removes_free_buffers_and_keeps_copies(keeper: ShardKeeper) -> None:
    commit(keeper, 5, b"k")
    arena, _ = take(keeper)
    keeper.unpin(arena)
    keeper.close()
    assert list(keeper.arena_dir.iterdir()) == []
    assert content(keeper, 5) == b"k" * SIZE


def test_commits_and_deletions_in_two_threads_do_not_disturb_each_other(keeper: ShardKeeper) -> None:
    problems: list[BaseException] = []
    done = threading.Event()

    def receive() -> None:
        try:
            for number in range(150):
                slot = keeper.slot(1, SIZE)
                save = replace(SAVE, iteration=1000 + number)
                keeper.commit(save, 1, slot, fill(slot, b"t"), role="replica", split=False)
                keeper.discard(1, keeper.slot(1, SIZE), reusable=True)
        except BaseException as error:  # noqa: BLE001 - told below
            problems.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=receive)
    thread.start()
    number = 0
    while not done.is_set() or keeper.holds(replace(SAVE, iteration=1000 + number), 1):
        save = replace(SAVE, iteration=1000 + number)
        if keeper.holds(save, 1):
            keeper.delete(save)
            number += 1
    thread.join()
    assert problems == []
    assert keeper.store.reader.inventory().node_saves == ()


class Gate(NoRecords):
    """A mount that makes its files when it is told to. Counts what it was asked for."""

    def __init__(self) -> None:
        self.asked = threading.Semaphore(0)
        self.open = threading.Event()
        self.made: list[Path] = []

    def create_mapping(self, path: Path, nbytes: int, wanted: Callable[[], bool] = always) -> MappedFile:
        self.made.append(path)
        path.touch()
        self.asked.release()
        assert self.open.wait(30)
        path.unlink()
        return super().create_mapping(path, nbytes, wanted)


@pytest.fixture
def gated(memory_mount: Path) -> Iterator[tuple[ShardKeeper, Gate]]:
    fs = Gate()
    store = NodeStore(memory_mount, "run", "a", "local", fs)
    store.prepare()
    keeper = ShardKeeper(store, store.arenas, fs, 0, 2, lambda: 1.5)
    yield keeper, fs
    fs.open.set()
    keeper.close()


def test_what_is_in_use_and_what_is_kept_counts_when_buffers_are_made_ahead(keeper: ShardKeeper) -> None:
    commit(keeper, 5)  # kept in its arena in memory; on a disk the arena is free again
    arena, _ = take(keeper)
    while keeper.reserve(0, SIZE, 4, always):
        pass
    buffers = len(list(keeper.arena_dir.iterdir())) + len(list(keeper.store.root.glob("iter_*"))) * keeper.file_is_arena
    assert buffers == 4
    others = [keeper.take_arena(SIZE, 4, 1.0) for _ in range(2)]
    assert len({id(arena), *map(id, others)}) == 3
    assert len(list(keeper.arena_dir.iterdir())) == 4 - keeper.file_is_arena, "none was made for them"
    for each in (arena, *others):
        keeper.unpin(each)


def test_copies_of_an_earlier_attempt_count_as_the_buffers_they_will_be(memory_mount: Path) -> None:
    store = NodeStore(memory_mount, "run", "a", "local", PosixFileSystem())
    store.prepare()
    first = ShardKeeper(store, store.arenas, store.fs, 0, 2, lambda: 1.5)
    commit(first, 5)
    again = ShardKeeper(store, store.arenas, store.fs, 0, 2, lambda: 1.5)
    again.adopt(save_at(5), [0])
    assert [again.reserve(0, SIZE, 3, always) for _ in range(3)] == [True, True, False]
    again.delete(save_at(5))
    assert len({id(again.take_arena(SIZE, 3, 1.0)) for _ in range(3)}) == 3
    again.close()


def test_buffers_of_another_size_go_before_new_ones_are_made_ahead(keeper: ShardKeeper) -> None:
    while keeper.reserve(0, SIZE, 3, always):
        pass
    while keeper.reserve(0, 2 * SIZE, 3, always):
        pass
    assert [path.stat().st_size for path in keeper.arena_dir.iterdir()] == [2 * SIZE] * 3


def test_a_save_waits_for_the_arena_that_is_being_made_instead_of_making_one_more(
    gated: tuple[ShardKeeper, Gate],
) -> None:
    keeper, fs = gated
    taken: list[Arena] = []
    lane = threading.Thread(target=lambda: keeper.reserve(0, SIZE, 3, always))
    lane.start()
    assert fs.asked.acquire(timeout=200)
    save = threading.Thread(target=lambda: taken.append(keeper.take_arena(SIZE, 3, 30.0)))
    save.start()
    save.join(0.2)
    assert not taken
    fs.open.set()
    save.join(30)
    lane.join(30)
    assert [arena.mapped.path for arena in taken] == fs.made, "one was made, and that one was taken"
    keeper.unpin(taken[0])


def test_a_save_that_waits_in_vain_for_its_arena_says_so(gated: tuple[ShardKeeper, Gate]) -> None:
    keeper, fs = gated
    lane = threading.Thread(target=lambda: keeper.reserve(0, SIZE, 3, always))
    lane.start()
    assert fs.asked.acquire(timeout=200)
    with pytest.raises(SaveFailedError, match="1 is being made"):
        keeper.take_arena(SIZE, 3, 0.1)
    fs.open.set()
    lane.join(30)


def test_a_reservation_that_is_no_longer_wanted_leaves_nothing(gated: tuple[ShardKeeper, Gate]) -> None:
    keeper, fs = gated
    wanted = threading.Event()
    wanted.set()
    problems: list[OSError] = []

    def reserve() -> None:
        try:
            keeper.reserve(0, SIZE, 3, wanted.is_set)
        except OSError as error:
            problems.append(error)

    lane = threading.Thread(target=reserve)
    lane.start()
    assert fs.asked.acquire(timeout=200)
    wanted.clear()
    fs.open.set()
    lane.join(30)
    assert [error.errno for error in problems] == [errno.ECANCELED]
    assert list(keeper.arena_dir.iterdir()) == []
    assert not keeper.reserve(0, SIZE, 3, wanted.is_set)


def test_nothing_is_made_ahead_where_no_room_would_be_left_for_records(memory_mount: Path) -> None:
    class Small(PosixFileSystem):
        def free_bytes(self, path: Path) -> int:
            return SIZE + 100

    store = NodeStore(memory_mount, "run", "a", "local", Small())
    store.prepare()
    keeper = ShardKeeper(store, store.arenas, store.fs, 0, 2, lambda: 1.5)
    with pytest.raises(StoreError, match="would fill up") as raised:
        keeper.reserve(0, SIZE, 3, always)
    assert raised.value.errno == errno.ENOSPC
    keeper.unpin(keeper.take_arena(SIZE, 3, 1.0))
    keeper.close()


def replica(keeper: ShardKeeper, iteration: int, nbytes: int = SIZE) -> Arena:
    """A committed copy of rank 1's shard, as one that came and was verified."""
    slot = keeper.slot(1, nbytes)
    digest = fill(slot, b"%d" % (iteration % 10))
    slot.holds = save_at(iteration)
    keeper.commit(save_at(iteration), 1, slot, digest, role="replica", split=False)
    return slot


def test_a_free_buffer_still_holds_its_newest_shard_until_somebody_may_write_to_it(keeper: ShardKeeper) -> None:
    assert keeper.holding_slot(1) is None
    replica(keeper, 5)
    replica(keeper, 6)
    for iteration in (5, 6):
        keeper.delete(save_at(iteration))
    held = keeper.holding_slot(1)
    assert held is not None
    slot, save = held
    assert save == save_at(6)
    assert bytes(slot.mapped.view) == b"6" * SIZE
    assert slot.holds is None, "it is about to be written to"
    keeper.discard(1, slot, reusable=True)
    if keeper.file_is_arena:  # on a disk one buffer served both
        other = keeper.holding_slot(1)
        assert other is not None
        assert other[1] == save_at(5)
    assert keeper.holding_slot(1) is None


@pytest.mark.parametrize("take", ["slot", "warm_slot"])
def test_a_buffer_that_was_given_out_holds_nothing_any_more(keeper: ShardKeeper, take: str) -> None:
    replica(keeper, 5)
    keeper.delete(save_at(5))
    slot = getattr(keeper, take)(1, SIZE)
    keeper.discard(1, slot, reusable=True)
    assert keeper.holding_slot(1) is None


def test_a_buffer_of_another_layout_that_is_out_does_not_stand_for_one_that_is_wanted(keeper: ShardKeeper) -> None:
    replica(keeper, 5)
    keeper.delete(save_at(5))
    held = keeper.holding_slot(1)
    assert held is not None
    assert keeper.reserve(1, 2 * SIZE, 1, always)
    assert not keeper.reserve(1, 2 * SIZE, 1, always)
    keeper.discard(1, held[0], reusable=False)
    assert not held[0].mapped.path.exists()
