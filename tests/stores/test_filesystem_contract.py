"""The contract that is published for file systems, kept by the real disk, by memory, and by the simulator's disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from hypothesis import given, settings

from resilience.drill.simulator.disk import SimFileSystem
from resilience.drill.simulator.schedule import Process, Scheduler
from resilience.drill.simulator.storage import Mount
from resilience.stores.filesystem import FileSystem, PosixFileSystem
from resilience.testing import FileSystemContract
from resilience.testing.strategies import FileOperation, file_operations, perform

Act = Callable[[FileSystem, Path], None]


class TestDisk(FileSystemContract):
    def on_disk(self, directory: Path, act: Act) -> None:
        act(PosixFileSystem(), directory)


class TestMemory(FileSystemContract):
    def on_disk(self, directory: Path, act: Act) -> None:
        with tempfile.TemporaryDirectory(prefix="resilience-test-", dir="/dev/shm") as place:
            act(PosixFileSystem(), Path(place))


class TestSimulatedDisk(FileSystemContract):
    def on_disk(self, directory: Path, act: Act) -> None:
        scheduler = Scheduler(0, 0.0)
        fs = SimFileSystem(scheduler, Process("p"), {"disk": Mount("disk")}, lambda path, inode: None)
        scheduler.run(lambda: act(fs, Path("/disk")))


@settings(max_examples=150, deadline=None)
@given(file_operations())
def test_the_simulators_disk_answers_as_the_real_one_does(operations: list[FileOperation]) -> None:
    simulated: list[object] = []
    with tempfile.TemporaryDirectory(prefix="resilience-test-", dir="/dev/shm") as place:
        real = perform(PosixFileSystem(), Path(place), operations)
    TestSimulatedDisk().on_disk(Path(), lambda fs, here: simulated.extend(perform(fs, here, operations)))
    assert simulated == real
