"""A tmpfs that is really full, to the last page or nearly so: no signal, one lost save at most, and the next works."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import resilience.saving.budget
from tests.core.training import Training
from tests.faults.loop import Place, full_loop
from tests.faults.operations import Restore, Save, small
from tests.faults.pair import Replication
from tests.ranks import run_ranks, values

ROOM = 8 << 20  # of the mount
BOUND_S = 900.0

#: Pages that are left. With none, not even a name can be given to a file; with many nothing fails.
LEFT = (0, 1, 2, 5, 12, 40, 120)


def of_no_budget(training: Training) -> None:
    """As if something else had filled the mount after the room for saves was checked: else the job is refused."""
    resilience.saving.budget.check = lambda budget, available, again: ""  # of this process, which is about to end


def small_of_no_budget(training: Training) -> None:
    of_no_budget(training)
    small(training)


SHARED = {"kind": None, "save": True, "make": small_of_no_budget, "checkpoint": {"save_interval": 3}}
OPERATIONS: dict[str, Any] = {
    "save in memory": Save({"kind": "local", "make": of_no_budget}, steps=9),
    "save on a disk": Save({"kind": "disk", "make": of_no_budget}, steps=9),
    "delete in memory": Save(
        {"kind": "local", "make": of_no_budget, "resiliency": {"keep_last": 1}}, steps=12, begins=6, ends=10
    ),
    "restore from memory": Restore({"kind": "local", "make": of_no_budget}, steps=6),
    "persistent save": Save({**SHARED, "resiliency": {"keep_persistent": 1}}, steps=9),
    "persistent restore": Restore(SHARED, steps=6),
    "replicate": Replication({"kind": "local", "make": of_no_budget}, victim=1),
}


@pytest.fixture
def mount(memory_mount: Path) -> Iterator[Path]:
    place = memory_mount / "mount"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", place], capture_output=True)
    if made.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {made.stderr.decode().strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", place], check=True)


class Filler:
    """Takes the place of `Edge`: while it is armed, the mount has `left` bytes of room and no more."""

    def __init__(self, mount: str, left: int) -> None:
        self.seen: list[str] = []
        self.struck = f"{left // mmap.PAGESIZE} pages left"
        self._file = Path(mount, "filler")
        self._left = left
        self._armed = False

    def install(self) -> Filler:
        return self

    @property
    def armed(self) -> bool:
        return self._armed

    @armed.setter
    def armed(self, armed: bool) -> None:
        if armed and not self._armed:
            found = os.statvfs(self._file.parent)
            with self._file.open("wb") as stream:
                os.posix_fallocate(stream.fileno(), 0, max(1, found.f_bavail * found.f_frsize - self._left))
        if not armed:
            self._file.unlink(missing_ok=True)
        self._armed = armed


def fill(rank: int, operation: Any, mount: str) -> list[str]:
    home = Place(f"{mount}/memory", f"{mount}/disk")
    fillers = [Filler(mount, pages * mmap.PAGESIZE) for pages in LEFT]
    return full_loop(operation.ready(home), home, fillers)


@pytest.mark.long
@pytest.mark.timeout(2 * BOUND_S)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_full_mount_costs_one_save_at_most_and_never_the_process(
    name: str, mount: Path, record_property: Any
) -> None:
    (defects,) = values(run_ranks(1, fill, OPERATIONS[name], str(mount), distributed=False, timeout_s=BOUND_S))
    record_property("tried: fault points", len(LEFT))
    assert not defects, "\n\n".join(defects)
