"""Buffers made ahead: all of them, a full mount told and tried again, an end in the middle that leaves nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from resilience.errors import StoreError
from resilience.runtime.worker import Lane
from resilience.saving.reservation import Buffers, Reservation
from resilience.stores.filesystem import MappedFile, PosixFileSystem
from resilience.stores.keeper import ShardKeeper
from resilience.stores.node_store import NodeStore
from resilience.stores.pages import HUGE_BYTES, always

SIZE = 4096


class Mount(PosixFileSystem):
    """Has room for `room` files; with `hold`, the making of one takes until it is no longer wanted."""

    room = 100
    hold = False
    begun = threading.Event()

    def create_mapping(self, path: Path, nbytes: int, wanted: Callable[[], bool] = always) -> MappedFile:
        if self.room == 0:
            raise StoreError(f"cannot reserve {nbytes} bytes for {path}: no space is left.")
        self.room -= 1
        while self.hold and wanted():
            self.begun.set()
        return super().create_mapping(path, nbytes, wanted)


class Node:
    """One rank's keeper with a reservation in a lane; what it told is in `told`."""

    def __init__(self, base: Path) -> None:
        self.fs = Mount()
        self.fs.begun = threading.Event()
        store = NodeStore(base, "run", "a", "local", self.fs)
        store.prepare()
        self.keeper = ShardKeeper(store, store.arenas, self.fs, 0, 2, lambda: 1.5)
        self.told: list[dict[str, Any]] = []
        self.errors: list[Exception] = []
        self.lane = Lane("reserve", lambda what, error: self.errors.append(error))
        self.reservation = Reservation(self.keeper, self.lane, lambda event, **fields: self.told.append(fields))

    def reserve(self) -> list[str]:
        """Go on, wait for it; for whom buffers are there then."""
        self.reservation.go_on()
        assert self.lane.wait(30)
        assert self.errors == []
        return self.owners()

    def owners(self) -> list[str]:
        return sorted(path.name[15:20] for path in self.keeper.arena_dir.iterdir())


@pytest.fixture
def node(memory_mount: Path) -> Iterator[Node]:
    node = Node(memory_mount)
    node.reservation.want([Buffers(0, SIZE, 3), Buffers(1, 2 * SIZE, 2)])
    yield node
    node.reservation.stop()
    assert node.lane.close(30)
    node.keeper.close()


def test_all_buffers_are_made_once(node: Node) -> None:
    assert node.reserve() == ["00000"] * 3 + ["00001"] * 2
    assert node.reserve() == ["00000"] * 3 + ["00001"] * 2
    assert node.fs.room == 100 - 5
    assert node.told == []


def test_a_full_mount_is_told_and_tried_again_at_the_next_save(node: Node) -> None:
    node.fs.room = 2
    assert node.reserve() == ["00000"] * 2
    (told,) = node.told
    assert "no space is left" in told["what"]
    node.fs.room = 10
    assert node.reserve() == ["00000"] * 3 + ["00001"] * 2
    assert len(node.told) == 1


def test_nothing_is_made_ahead_while_what_earlier_attempts_left_is_still_there(node: Node) -> None:
    node.reservation.hold_back(True)
    assert node.reserve() == []
    node.reservation.hold_back(False)
    assert len(node.reserve()) == 5


def test_a_layout_that_has_grown_gets_buffers_of_its_own(node: Node) -> None:
    node.reserve()
    node.reservation.want([Buffers(0, 3 * SIZE, 3), Buffers(1, 2 * SIZE, 2)])
    assert node.reserve() == ["00000"] * 3 + ["00001"] * 2
    sizes = sorted(path.stat().st_size for path in node.keeper.arena_dir.iterdir())
    assert sizes == [2 * SIZE] * 2 + [3 * SIZE] * 3


def test_buffers_made_ahead_and_what_a_restore_brought_are_asked_into_huge_pages(node: Node) -> None:
    landed = node.keeper.slot(1, 3 * HUGE_BYTES)
    landed.mapped.view[:2] = b"it"
    node.reservation.enlarge()
    assert node.lane.wait(30)
    assert landed.mapped.huge_bytes in (0, 3 * HUGE_BYTES), "as the kernel can"
    assert landed.mapped.view[:2] == b"it"
    node.reservation.want([Buffers(0, HUGE_BYTES, 1)])
    node.reserve()
    assert node.keeper.slot(0, HUGE_BYTES).mapped.huge_bytes in (0, HUGE_BYTES)


def test_an_end_in_the_middle_of_it_leaves_nothing_and_is_no_problem(node: Node) -> None:
    node.fs.hold = True
    node.reservation.go_on()
    assert node.fs.begun.wait(30)
    node.reservation.stop()
    assert node.lane.close(30, drop=True)
    assert node.owners() == []
    assert node.told == []
    assert node.errors == []
    node.reservation.go_on()
    assert node.owners() == []
