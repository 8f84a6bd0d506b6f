"""What the simulator found in the code, each with the mistake told in the test's name."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from resilience import CheckpointConfig, ResiliencyConfig
from resilience.controller import ResiliencyController
from resilience.drill.simulator.disk import SimFileSystem
from resilience.drill.simulator.schedule import Process, Scheduler
from resilience.drill.simulator.storage import Mount
from resilience.errors import StoreError
from resilience.planning.inventory import AttemptLog, SaveId
from resilience.runtime.memory import available_bytes
from resilience.state.training_state import TrainingState
from resilience.stores.digest import digest_of
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.healed import healed
from resilience.stores.keeper import ShardKeeper
from resilience.stores.node_store import NodeStore
from resilience.stores.records import ShardRecord
from resilience.stores.shared_store import SharedStore
from tests.core.shards import ATTEMPT

RUN = "run"


class Refusing(PosixFileSystem):
    """A disk that answers some calls with an I/O error while `refused` names them."""

    refused: frozenset[str] = frozenset()

    def _refuse(self, what: str, path: Path) -> None:
        if what in self.refused:
            raise StoreError(f"cannot {what} {path}: Input/output error.")

    def unlink(self, path: Path) -> bool:
        self._refuse("unlink", path)
        return super().unlink(path)

    def list_dir(self, path: Path) -> list[str]:
        self._refuse("list_dir", path)
        return super().list_dir(path)

    def free_bytes(self, path: Path) -> int:
        self._refuse("free_bytes", path)
        return super().free_bytes(path)


class Worst(random.Random):
    """A power failure that leaves nothing of what was not made durable."""

    def randint(self, low: int, high: int) -> int:
        return low

    def choice(self, seq: Sequence[Any]) -> Any:
        return seq[0]

    def random(self) -> float:
        return 0.0


def on_a_simulated_disk(act: Callable[[SimFileSystem], None], mount: Mount) -> None:
    scheduler = Scheduler(0, 0.0)
    fs = SimFileSystem(scheduler, Process("p"), {"disk": mount}, lambda path, inode: None)
    scheduler.run(lambda: act(fs))


def test_closing_beside_a_disk_that_refuses_does_not_end_in_an_error_that_keeps_the_locks(memory_mount: Path) -> None:
    fs = Refusing()
    store = NodeStore(memory_mount, RUN, "a", "in_memory", fs)
    store.prepare()
    keeper = ShardKeeper(store, store.arenas, fs, 0, 1, lambda: 1.5)
    keeper.unpin(keeper.take_arena(4096, 2, 1.0))
    fs.refused = frozenset({"unlink"})
    keeper.close()


def test_a_mount_that_does_not_say_how_much_is_free_refuses_nobody(tmp_path: Path, memory_mount: Path) -> None:
    """One rank alone raised, in the midst of an exchange for which the others waited."""
    fs = Refusing()
    fs.refused = frozenset({"free_bytes"})
    found = available_bytes(memory_mount, tmp_path, fs)
    assert (found["shared_memory"], found["disk"]) == (None, None)


def test_a_finished_run_whose_memory_cannot_be_freed_is_no_failed_one(tmp_path: Path, memory_mount: Path) -> None:
    fs, told = Refusing(), list[dict[str, Any]]()

    class Controller(ResiliencyController):
        def tell(self, event: str, **fields: Any) -> None:
            told.append({"event": event, **fields})

    checkpoint = CheckpointConfig(
        save=str(tmp_path / "save"), save_interval=2, non_persistent_ckpt_type="in_memory",
        non_persistent_save_interval=1,
    )  # fmt: skip
    resiliency = ResiliencyConfig(run_id=RUN, node_id="a", memory_dir=str(memory_mount))
    controller = Controller(TrainingState(torch.nn.Linear(2, 2)), checkpoint, resiliency, filesystem=fs)
    controller.restore()
    controller.after_step(1)
    controller.after_step(2, last=True)
    controller.wait_idle(30.0)
    fs.refused = frozenset({"list_dir"})
    controller.finish()
    fs.refused = frozenset()
    controller.close()
    assert any("is not freed" in str(each.get("what")) for each in told)


def test_a_mark_that_cannot_be_taken_away_again_ends_no_start(tmp_path: Path, memory_mount: Path) -> None:
    """One rank raised alone, after all had agreed that all is well, and the others waited for it."""

    class KeepsMarks(PosixFileSystem):
        def unlink(self, path: Path) -> bool:
            if path.name.startswith(".nonce-"):
                raise StoreError(f"cannot remove {path}: Input/output error.")
            return super().unlink(path)

    checkpoint = CheckpointConfig(save=str(tmp_path / "save"), save_interval=2)
    resiliency = ResiliencyConfig(run_id=RUN, node_id="a", memory_dir=str(memory_mount))
    state = TrainingState(torch.nn.Linear(2, 2))
    controller = ResiliencyController(state, checkpoint, resiliency, filesystem=KeepsMarks())
    assert controller.restore() is None
    controller.close()


def test_a_power_failure_does_not_take_the_node_s_directories_with_what_was_durable_in_them() -> None:
    mount, save = Mount("disk"), SaveId(3, 1, ATTEMPT)
    content = memoryview(bytearray(b"shard" * 100))
    record = ShardRecord(
        RUN, save, 0, 1, "primary", "local", "a", len(content), digest_of(content), created=1.0
    )  # fmt: skip
    log = AttemptLog(RUN, ATTEMPT, 1)

    def run(fs: SimFileSystem) -> None:
        store = NodeStore(Path("/disk/saves"), RUN, "a", "local", fs)
        store.prepare()
        store.write_attempt_log(log)
        store.commit_bytes(content, record)

    def look(fs: SimFileSystem) -> None:
        found = NodeStore(Path("/disk/saves"), RUN, "a", "local", fs).reader.inventory()
        assert [each.save for each in found.node_saves] == [save]
        assert found.attempts == (log,)

    on_a_simulated_disk(run, mount)
    mount.fail_power(Worst())
    on_a_simulated_disk(look, mount)


def test_a_power_failure_does_not_take_the_shared_directory_with_its_attempt_logs() -> None:
    mount = Mount("disk")
    log = AttemptLog(RUN, ATTEMPT, 1)

    def run(fs: SimFileSystem) -> None:
        store = SharedStore(Path("/disk/save"), fs, source="save")
        store.take_ownership(RUN, ATTEMPT, 1)
        store.write_attempt_log(log)

    def look(fs: SimFileSystem) -> None:
        store = SharedStore(Path("/disk/save"), fs, source="save")
        owner = store.owner()
        assert owner is not None
        assert owner.attempt == ATTEMPT
        assert store.attempt_logs() == (log,)

    on_a_simulated_disk(run, mount)
    mount.fail_power(Worst())
    on_a_simulated_disk(look, mount)


def test_a_directory_as_it_will_be_healed_is_looked_at_through_the_store_s_own_file_system(tmp_path: Path) -> None:
    fs = Refusing()
    view, _ = healed(SharedStore(tmp_path, fs, source="save"), lambda folder, fs: "")
    fs.refused = frozenset({"list_dir"})
    assert "Input/output error" in view.inventory(RUN).unknown
