"""What killed processes leave goes with the next start, and what live ones use stays."""

from __future__ import annotations

import os
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest

from resilience.errors import StoreError
from resilience.formats.convert import convert
from resilience.formats.load import load_checkpoint
from resilience.runtime import watchdog
from resilience.runtime.clock import SystemClock
from resilience.runtime.watchdog import Watchdog
from resilience.saving.lanes import Lanes
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.lock import ALL_RANKS, DirectoryLock
from resilience.stores.node_store import NodeStore
from resilience.stores.shared_store import SharedStore
from tests.core.training import RUN, World
from tests.core.unit.test_node_store import commit, found, keeper_on
from tests.faults.conversion import Conversion
from tests.faults.loop import Place
from tests.ranks import values

FS = PosixFileSystem()


def test_marks_of_starts_that_were_killed_are_removed_by_the_next_one(world: World) -> None:
    values(world.run(world.plan("a", steps=3)))
    run = world.memory / "a" / RUN
    for mark in (".nonce-0123456789abcdef", ".tmp-16594-0-030b99b8-.nonce-064ae604dd428b62"):
        (run / mark).write_bytes(b"")
    (run / "a" / "iter_0000002").mkdir()  # of a save that was deleted but for this
    values(world.run(world.plan("a", steps=4, seed=1)))
    assert [path.name for path in run.iterdir() if path.name.startswith(".")] == []
    assert not (run / "a" / "iter_0000002").exists()


def test_half_an_attempt_log_on_shared_storage_goes_with_the_next_start(tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()
    left = [tmp_path / "attempts" / ".tmp-1-2-abcd-g0001-3f9ac01b.json", tmp_path / ".tmp-1-3-abcd-resilience.json"]
    for path in left:
        path.write_bytes(b"{")
    store = SharedStore(tmp_path, FS, source="save")
    store.take_ownership("run", "a" * 32, 1)
    store.heal()
    assert not any(path.exists() for path in left)


def test_what_a_killed_conversion_left_goes_with_the_next_and_that_of_a_live_one_stays(tmp_path: Path) -> None:
    Conversion("zarr").prepare(Place(str(tmp_path), str(tmp_path)))
    killed, live = (tmp_path / f".made.converting-{name}" for name in ("dead", "live"))
    for folder in (killed, live):
        folder.mkdir()
        (folder / "half").write_bytes(b"of it")
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        DirectoryLock(live, ALL_RANKS).acquire()
        os.write(writer, b"x")
        while True:
            signal.pause()
    os.read(reader, 1)
    try:
        convert(tmp_path / "source", tmp_path / "made", "zarr", FS)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)
    assert not killed.exists()
    assert (live / "half").exists()
    assert not (tmp_path / "made" / "lock").exists()
    assert set(load_checkpoint(tmp_path / "made")) == {"w"}


class Model:
    """Something large that hears of lanes' troubles through a method of its own."""

    def tell(self, event: str, **fields: Any) -> None: ...


def test_lanes_that_have_ended_keep_nothing_alive_until_the_process_exits() -> None:
    model = Model()
    gone = weakref.ref(model)
    lanes = Lanes(model.tell)
    lanes.ask_to_end(failed=False)
    assert lanes.ended(failed=False)
    del model
    assert gone() is None, "else every restart in one process keeps a model"


def test_closing_a_watchdog_does_not_wait_for_its_next_look(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_LOOK_EVERY_S", 600.0)
    dog = Watchdog(
        SystemClock(), term_grace_s=1.0, hang_timeout_s=None, stop_at=None, request=lambda what: None,
        look=lambda: "", tell=lambda *_, **__: None,
    )  # fmt: skip
    dog.start()
    dog.close()
    assert not dog._thread.is_alive()


def test_folders_of_saves_that_never_had_a_record_are_swept(tmp_path: Path) -> None:
    store = NodeStore(tmp_path, "run", "a", "local", FS)
    store.prepare()
    empty = store.root / "iter_0000009" / "g0002-3f9ac01b"
    empty.mkdir(parents=True)
    orphan = store.root / "iter_0000012" / "g0002-3f9ac01b"
    orphan.mkdir(parents=True)
    (orphan / "rank_00000-of-00001.safetensors").write_bytes(b"half")
    certified = store.root / "iter_0000006" / "g0002-3f9ac01b"
    certified.mkdir(parents=True)
    (certified / "complete.json").write_bytes(b"{}")
    store.remover.sweep()
    assert not empty.parent.exists()
    assert not orphan.parent.exists()
    assert (certified / "complete.json").exists()


class DoesAndDenies(PosixFileSystem):
    """Renames that are carried out and reported as failed, as on a shared mount whose answer was lost."""

    denied = 0

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        if self.denied:
            self.denied -= 1
            raise StoreError("Input/output error.")


@pytest.mark.parametrize("denied", [1, 2, 3])
def test_a_buffer_whose_file_was_moved_and_denied_spoils_no_later_save(memory_mount: Path, denied: int) -> None:
    fs = DoesAndDenies()
    keeper = keeper_on(memory_mount / "base", memory_mount / "base" / "run" / "a" / ".arenas", fs)
    assert keeper.file_is_arena
    commit(keeper, 5)
    fs.denied = denied
    with pytest.raises(StoreError):
        commit(keeper, 10)
    fs.denied = 0
    for iteration in (15, 20, 25):
        commit(keeper, iteration)
    assert set(found(memory_mount / "base")) == {5, 15, 20, 25}
