"""`outcome` and `request`: what is known of a job from outside, and how it is asked."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from resilience import CheckpointConfig, ResiliencyConfig, ResilientTrainer
from resilience.planning.inventory import AttemptLog
from resilience.stores.lock import ALL_RANKS, DirectoryLock
from tests.cli.stores import RUN, World, ask, ask_json, attempt_id, save_id
from tests.stores.test_shared_store import owned


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path, ranks=2)


class Job:
    """A real job of one process on a node of its own."""

    def __init__(self, root: Path) -> None:
        self.disk, self.memory = root / "disk", root / "memory"
        self.model = torch.nn.Linear(4, 4)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)

    def trainer(self) -> ResilientTrainer:
        return ResilientTrainer(
            self.model,
            self.optimizer,
            checkpoint=CheckpointConfig(
                non_persistent_ckpt_type="local",
                non_persistent_save_interval=5,
                non_persistent_local_ckpt_dir=self.disk,
            ),
            resiliency=ResiliencyConfig(run_id=RUN, node_id="n", memory_dir=self.memory),
        )

    def step(self) -> None:
        self.model(torch.ones(2, 4)).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def local(self) -> tuple[object, ...]:
        return ("--local", self.disk, "--local", self.memory)


def test_a_job_is_running_while_it_lives_and_finished_afterwards(capsys: Any, memory_mount: Path) -> None:
    job = Job(memory_mount)
    with job.trainer() as trainer:
        for _ in trainer.iterations(7):
            if trainer.iteration == 6:
                running = ask_json(capsys, "outcome", *job.local, status=3)
            job.step()
    assert running["outcome"] == "running"
    document = ask_json(capsys, "outcome", *job.local)
    assert (document["outcome"], document["iteration"], document["run_id"]) == ("finished", 7, RUN)


def test_a_job_that_is_asked_to_stop_saves_and_stops(capsys: Any, memory_mount: Path) -> None:
    job = Job(memory_mount)
    asked: dict[str, Any] = {}

    def train() -> None:
        with job.trainer() as trainer:
            for _ in trainer.iterations(100_000):
                if trainer.iteration == 3:
                    asked.update(ask_json(capsys, "request", "stop", *job.local))
                job.step()

    with pytest.raises(SystemExit) as leaving:
        train()
    assert leaving.value.code == 75
    assert asked["requested"] == "stop"
    (told,) = asked["asked"]
    assert (told["run_id"], told["node"]) == (RUN, "n")
    document = ask_json(capsys, "outcome", *job.local, status=75)
    assert document["outcome"] == "stopped"
    saves = ask_json(capsys, "ls", *job.local)["saves"]
    assert document["iteration"] == saves[0]["iteration"]


def test_a_job_that_is_asked_to_save_takes_one_save_and_goes_on(capsys: Any, memory_mount: Path) -> None:
    job = Job(memory_mount)
    with job.trainer() as trainer:
        for _ in trainer.iterations(4):
            if trainer.iteration == 2:
                trainer._watchdog._look = lambda: ""  # the trainer's own thread would take it first
                ask_json(capsys, "request", "save", *job.local)
                assert trainer._controller.asked_from_outside() == "save"
                assert trainer._controller.asked_from_outside() == "", "it is asked once, though it has two directories"
            job.step()


def test_looking_at_a_live_job_does_not_take_its_lock_away(capsys: Any, memory_mount: Path) -> None:
    """Record locks go when any descriptor of the file is closed in their process, and here the job is this process."""
    job = Job(memory_mount)
    with job.trainer() as trainer:
        for _ in trainer.iterations(2):
            ask_json(capsys, "outcome", *job.local, status=3)
            job.step()
        probe = (
            "import sys; from pathlib import Path; from resilience.stores.lock import *\n"
            "print(DirectoryLock(Path(sys.argv[1]), ALL_RANKS).holder())"
        )
        words = [sys.executable, "-c", probe, str(job.disk / RUN / "n")]
        done = subprocess.run(words, capture_output=True, text=True, timeout=200, check=True)
        assert done.stdout.strip().isdecimal()


def test_nobody_holds_a_directory_without_a_lock_or_with_a_dead_owner(tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path, ALL_RANKS)
    assert lock.holder() is None
    assert not (tmp_path / "lock").exists(), "looking leaves nothing behind"
    lock.acquire()
    assert DirectoryLock(tmp_path, 3).holder() is not None
    lock.release()
    assert lock.holder() is None


def test_a_request_to_nobody_could_not_be_done(capsys: Any, world: World) -> None:
    world.save(10)
    error = ask_json(capsys, "request", "stop", *world.local, status=3)["error"]
    assert "no live process holds" in error["message"]
    assert not list(world.root.rglob("request-*"))


def test_an_attempt_without_an_end_and_without_a_process_failed_at_its_newest_save(capsys: Any, world: World) -> None:
    world.save(10)
    world.log(1, completed=save_id(10))
    document = ask_json(capsys, "outcome", *world.local, status=1)
    assert (document["outcome"], document["iteration"]) == ("failed", 10)
    assert "was killed" in ask(capsys, "outcome", *world.local).out


@pytest.mark.parametrize(("end", "status"), [("finished", 0), ("stopped", 75), ("failed", 1)])
def test_the_newest_attempt_counts(capsys: Any, world: World, end: str, status: int) -> None:
    world.log(1, end="finished", end_iteration=5)
    world.log(2, base=save_id(5), end=end, end_iteration=12)
    document = ask_json(capsys, "outcome", *world.local, status=status)
    assert (document["outcome"], document["iteration"], document["generation"]) == (end, 12, 2)


def test_an_attempt_that_completed_nothing_stands_where_it_began(capsys: Any, world: World) -> None:
    world.log(1, completed=save_id(5), end="stopped", end_iteration=5)
    world.log(2, base=save_id(5))
    assert ask_json(capsys, "outcome", *world.local, status=1)["iteration"] == 5


def test_from_shared_storage_alone_the_log_is_all_there_is(capsys: Any, tmp_path: Path) -> None:
    store = owned(tmp_path)
    log = AttemptLog(store.owner().run_id, attempt_id(1), 1, end="stopped", end_iteration=9)  # type: ignore[union-attr]
    store.write_attempt_log(log)
    document = ask_json(capsys, "outcome", "--save", tmp_path, status=75)
    assert (document["outcome"], document["iteration"]) == ("stopped", 9)


def test_without_any_attempt_there_is_no_outcome(capsys: Any, tmp_path: Path) -> None:
    assert "No attempt" in ask_json(capsys, "outcome", "--local", tmp_path, status=2)["error"]["message"]


def test_of_several_runs_one_has_to_be_chosen(capsys: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        World(tmp_path, ranks=1, run_id=name).log(1, end="finished", end_iteration=3)
    local = World(tmp_path, ranks=1).local
    assert "one, two" in ask_json(capsys, "outcome", *local, status=2)["error"]["message"]
    assert ask_json(capsys, "outcome", *local, "--run-id", "two")["outcome"] == "finished"
