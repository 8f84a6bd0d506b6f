"""Promise 7: the training thread pays for the copy; all else happens in the background."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import resilience.controller
from resilience.stores import digest
from resilience.stores.filesystem import MappedFile, PosixFileSystem
from resilience.stores.pages import always
from tests.core.training import Act, Training, World, reference
from tests.ranks import values


class Counted(PosixFileSystem):
    """Notes which thread makes which file."""

    made: list[tuple[bool, str]] = []  # of this process, which has one of these

    def create_mapping(self, path: Path, nbytes: int, wanted: Callable[[], bool] = always) -> MappedFile:
        self.made.append((threading.current_thread() is threading.main_thread(), path.name.split("-")[1]))
        return super().create_mapping(path, nbytes, wanted)


def counted(training: Training) -> None:
    resilience.controller.PosixFileSystem = Counted  # of this process, which is about to end


class Watched(PosixFileSystem):
    """Notes what is written, renamed, deleted or made durable, by which thread."""

    done: list[tuple[bool, str]] = []  # of this process, which has one of these
    armed = False

    @classmethod
    def note(cls, what: str) -> None:
        if cls.armed:
            cls.done.append((threading.current_thread() is threading.main_thread(), what))

    def write_file(self, path: Path, chunks: Iterator[memoryview]) -> None:
        self.note("write_file")
        super().write_file(path, chunks)

    def write_atomic(self, path: Path, content: bytes, *, durable: bool = True) -> None:
        self.note("write_atomic")
        super().write_atomic(path, content, durable=durable)

    def rename(self, source: Path, target: Path) -> None:
        self.note("rename")
        super().rename(source, target)

    def unlink(self, path: Path) -> bool:
        self.note("unlink")
        return super().unlink(path)

    def fsync_dir(self, path: Path) -> None:
        self.note("fsync_dir")
        super().fsync_dir(path)


def watched(training: Training) -> None:
    resilience.controller.PosixFileSystem = Watched  # of this process, which is about to end
    add = digest.SegmentedDigest.add

    def noted(self: digest.SegmentedDigest, segment: memoryview) -> None:
        Watched.note("hash")
        add(self, segment)

    digest.SegmentedDigest.add = noted  # type: ignore[method-assign]


def arm(training: Training) -> None:
    Watched.armed = True


def note_done(training: Training) -> None:
    settle(training)
    Watched.armed = False
    training.notes.append(tuple(Watched.done))


@pytest.mark.parametrize(
    ("kind", "done"),
    [("local", {"hash", "rename", "write_atomic", "unlink"}), ("disk", {"hash", "write_file", "fsync_dir"})],
)
def test_the_training_thread_hashes_writes_and_deletes_nothing(world: World, kind: str, done: set[str]) -> None:
    plan = world.plan("a", "b", kind=kind, steps=24, make=watched, acts=(Act(4, arm), Act(23, note_done)))
    for ran in values(world.run(plan)):
        (noted,) = ran.notes
        assert done <= {what for _, what in noted}, "it is seen"
        assert [what for by_training, what in noted if by_training] == []


def settle(training: Training) -> None:
    training.trainer._controller.wait_idle(60.0)


def note_made(training: Training) -> None:
    settle(training)
    training.notes.append(tuple(Counted.made))


def test_after_the_first_save_no_buffer_is_made_by_the_training_thread(world: World) -> None:
    plan = world.plan("a", "b", steps=24, make=counted, acts=(Act(3, note_made), Act(23, note_made)))
    results = values(world.run(plan))
    assert tuple(ran.digest for ran in results) == reference(2, 24)
    for rank, ran in enumerate(results):
        after_first, at_last = ran.notes
        assert sum(by_training for by_training, _ in at_last) <= 1
        # keep_last 2, one in work, one more since saves are three steps apart
        assert sorted(what for _, what in after_first) == ["for_00000"] * 4 + ["for_00001"] * 4
        assert at_last == after_first, f"rank {rank}: they are all there ever are"


def test_on_a_disk_two_arenas_are_all_there_ever_are(world: World) -> None:
    results = values(world.run(world.plan("a", "b", kind="disk", make=counted, acts=(Act(11, note_made),))))
    for rank, ran in enumerate(results):
        made = [what for _, what in ran.notes[0]]
        assert made.count(f"for_{rank:05d}") == 2
        assert made.count(f"for_{1 - rank:05d}") == 1
        assert sum(by_training for by_training, _ in ran.notes[0]) <= 1


def test_a_job_that_ends_while_buffers_are_made_leaves_none(world: World) -> None:
    values(world.run(world.plan("a", "b", steps=3)))
    for node in "ab":
        assert list(world.store(node).arenas.iterdir()) == []
