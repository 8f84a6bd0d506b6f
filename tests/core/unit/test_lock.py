"""Promise 10: two live jobs never write one run. Record locks die with their process, whoever it forked."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from resilience.errors import AnotherJobError, UnsafePathError
from resilience.stores.lock import ALL_RANKS, DirectoryLock


@contextmanager
def another_process(work: Callable[[], None]) -> Iterator[int]:
    """`work` has returned in a process that goes on living until the end of the block."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os.write(writer, b"x")
            signal.pause()
        finally:
            os._exit(0)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b"x", "it failed"
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(reader)


def holds(directory: Path, byte: int) -> Callable[[], None]:
    return lambda: DirectoryLock(directory, byte).acquire()


def free(directory: Path, byte: int) -> bool:
    """Whether another process may take it."""
    pid = os.fork()
    if pid == 0:
        status = 2
        try:
            DirectoryLock(directory, byte).acquire()
            status = 0
        except AnotherJobError:
            status = 1
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert status in (0, 1), "it ended in another way"
    return status == 0


def test_a_directory_held_by_a_live_process_is_refused_and_free_once_it_was_killed(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path, 0)
    with another_process(holds(tmp_path, 0)) as pid:
        with pytest.raises(AnotherJobError, match="another live process"):
            lock.acquire()
        assert lock.holder() == pid
    lock.acquire()
    lock.release()
    assert lock.holder() is None


def test_a_forked_worker_does_not_keep_the_lock_of_its_killed_parent(tmp_path: Path) -> None:
    reader, writer = os.pipe()  # it lives until nobody has the writing end

    def take_and_fork() -> None:
        DirectoryLock(tmp_path, 0).acquire()
        if os.fork() == 0:
            os.close(writer)
            os.read(reader, 1)
            os._exit(0)

    with another_process(take_and_fork):
        assert not free(tmp_path, 0)
    assert free(tmp_path, 0)
    os.close(writer)
    os.close(reader)


def test_ranks_of_one_node_hold_a_byte_each_and_a_sweep_needs_all(tmp_path: Path) -> None:
    with another_process(holds(tmp_path, 3)):
        assert free(tmp_path, 4)
        assert not free(tmp_path, 3)
        assert not free(tmp_path, ALL_RANKS)
    everything = DirectoryLock(tmp_path, ALL_RANKS)
    everything.acquire()
    assert not free(tmp_path, 7)
    everything.release()
    assert free(tmp_path, 7)


def test_within_one_process_the_second_taker_is_refused_and_the_first_keeps_its_lock(tmp_path: Path) -> None:
    first, second = DirectoryLock(tmp_path, 0), DirectoryLock(tmp_path, 0)
    first.acquire()
    for taker in (second, DirectoryLock(tmp_path, ALL_RANKS)):
        with pytest.raises(AnotherJobError, match="this very process"):
            taker.acquire()
    second.release()  # not held: nothing happens, above all nothing to the first
    assert not free(tmp_path, 0)
    first.release()
    second.acquire()
    assert not free(tmp_path, 0)
    second.release()
    assert free(tmp_path, 0)


def test_giving_one_byte_back_keeps_the_others(tmp_path: Path) -> None:
    first, second = DirectoryLock(tmp_path, 0), DirectoryLock(tmp_path, 1)
    first.acquire()
    second.acquire()
    first.release()
    assert (free(tmp_path, 0), free(tmp_path, 1)) == (True, False)
    second.release()


def test_a_failed_attempt_does_not_drop_what_this_process_holds(tmp_path: Path) -> None:
    mine = DirectoryLock(tmp_path, 0)
    with another_process(holds(tmp_path, 1)):
        mine.acquire()
        with pytest.raises(AnotherJobError):
            DirectoryLock(tmp_path, 1).acquire()
        assert not free(tmp_path, 0)
    mine.release()


def test_a_link_in_the_place_of_the_lock_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").touch()
    (tmp_path / "lock").symlink_to("elsewhere")
    with pytest.raises(UnsafePathError):
        DirectoryLock(tmp_path, 0).acquire()


def test_looking_who_holds_it_takes_and_drops_nothing(tmp_path: Path) -> None:
    assert DirectoryLock(tmp_path, 0).holder() is None
    assert not (tmp_path / "lock").exists()
    mine = DirectoryLock(tmp_path, 0)
    mine.acquire()
    assert DirectoryLock(tmp_path, ALL_RANKS).holder() == os.getpid()
    assert not free(tmp_path, 0)
    mine.release()
