"""What a launcher gets to see: the exit status of real interpreters, also when they end with a transfer under way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.core.training import World
from tests.ranks import TIMEOUT_S


def start(world: World, repository: Path, rank: int, nodes: str, act: str, **env: str) -> subprocess.Popen[str]:
    arguments = [str(rank), nodes, str(world.memory / "store"), str(world.memory), str(world.disk), act]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.core.program", *arguments],
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **env},
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(*processes: subprocess.Popen[str]) -> list[tuple[int, str]]:
    """Exit status and last words of each."""
    told = []
    try:
        for process in processes:
            _, words = process.communicate(timeout=TIMEOUT_S)
            told.append((process.returncode, words))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return told


def test_a_requested_stop_is_75_and_0_under_an_elastic_agent(world: World, repository: Path) -> None:
    plain = start(world, repository, 0, "a", "stop")
    elastic = start(world, repository, 0, "b", "stop", TORCHELASTIC_RUN_ID="job")
    (first, words), (second, _) = ends(plain, elastic)
    assert (first, second) == (75, 0), words
    assert "stopped on request at iteration 7" in words


def test_a_hang_ends_the_process_and_its_last_words_are_where_every_thread_was(world: World, repository: Path) -> None:
    ((status, words),) = ends(start(world, repository, 0, "a", "hang"))
    assert status == 1, words
    assert "in stall_here" in words
    assert "resilience-watchdog" in words or words.count("Thread 0x") >= 2, "all threads' stacks"


@pytest.mark.drill
@pytest.mark.timeout(600)
def test_a_requested_stop_ends_a_real_elastic_agent_with_0_and_without_a_restart(
    tmp_path: Path, repository: Path
) -> None:
    job = tmp_path / "job.py"
    job.write_text(_STOPS_ITSELF.format(root=tmp_path), encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "2"]
    command += ["--standalone", "--local-addr", "127.0.0.1", str(job)]
    ran = subprocess.run(
        command, cwd=repository, capture_output=True, text=True, timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository), "GLOO_SOCKET_IFNAME": "lo"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "starts").read_text() == "..", "each of the two ranks was started once"
    told = subprocess.run(
        [sys.executable, "-m", "resilience.cli", "outcome", "--save", str(tmp_path / "ckpt"), "--json"],
        cwd=repository, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert told.returncode == 75, told.stdout + told.stderr
    assert json.loads(told.stdout)["outcome"] == "stopped"


_STOPS_ITSELF = """
import torch, torch.distributed as dist
from resilience import CheckpointConfig, ResiliencyConfig, ResilientTrainer
with open("{root}/starts", "a") as starts:
    starts.write(".")
dist.init_process_group("gloo")
model = torch.nn.Linear(3, 3)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
options = CheckpointConfig(save="{root}/ckpt", save_interval=100)
limits = ResiliencyConfig(memory_dir="{root}/mem")
with ResilientTrainer(model, optimizer, checkpoint=options, resiliency=limits) as trainer:
    for _ in trainer.iterations(50):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if trainer.iteration == 4 and dist.get_rank() == 1:
            trainer.request_stop()
raise AssertionError("it was to stop before")
"""


@pytest.mark.parametrize(("act", "statuses"), [("none", {0}), ("stop", {75}), ("fail", {1}), ("fail@1", {1})])
def test_no_end_aborts_the_interpreter(world: World, repository: Path, act: str, statuses: set[int]) -> None:
    """A thread left in gloo when the interpreter ends is SIGABRT."""
    found = ends(*(start(world, repository, rank, "a,b", act) for rank in (0, 1)))
    assert {status for status, _ in found} == statuses, found
    if act == "fail@1":
        assert "the user's own loop failed" in found[1][1]


@pytest.mark.parametrize(("act", "statuses"), [("none", {0}), ("stop", {75}), ("fail", {1}), ("fail@1", {1})])
def test_a_script_that_never_closes_its_trainer_ends_as_one_that_does(
    world: World, repository: Path, act: str, statuses: set[int]
) -> None:
    found = ends(*(start(world, repository, rank, "a,b", f"{act}+unclosed") for rank in (0, 1)))
    assert {status for status, _ in found} == statuses, found
    assert "terminate called" not in found[0][1] + found[1][1]
    told = {each["rank"] for each in world.events("exception", error="RuntimeError: the user's own loop failed")}
    assert told == {"fail": {0, 1}, "fail@1": {1}}.get(act, set())


def test_what_is_on_its_way_when_a_script_ends_that_never_closes_its_trainer_arrives(
    world: World, repository: Path
) -> None:
    found = ends(*(start(world, repository, rank, "a,b", "leave+unclosed") for rank in (0, 1)))
    assert [status for status, _ in found] == [0, 0], found
    kept = [world.copies(node)[4] for node in "ab"]
    assert kept == [{0: "primary", 1: "replica"}, {0: "replica", 1: "primary"}]


def test_a_start_that_fails_behind_what_was_fetched_ends_with_1(world: World, repository: Path) -> None:
    """The links that it came over are closed, and their threads wait for the other side a moment longer."""
    ends(*(start(world, repository, rank, "a,b", "none") for rank in (0, 1)))
    world.lose("b")
    (world.memory / "store").unlink(missing_ok=True)
    found = ends(*(start(world, repository, rank, "a,b", "refuse") for rank in (0, 1)))
    assert [status for status, _ in found] == [1, 1], found
    assert "this node takes nothing" in found[0][1]
