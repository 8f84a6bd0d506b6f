"""Restarts without a new process, and restarts beside what the killed process left running."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.core.training import Act, Plan, Training, World, die, fail, reference
from tests.faults.leaks import Held
from tests.ranks import run_ranks, values

ROUNDS = 10  # restarts in one process; each resumes one save later than the one before


def start_over_and_over(rank: int, plan: Plan) -> tuple[list[int], list[str], str]:
    """The loop fails, the trainer is closed, the next one goes on in the same process. What the last ones left open."""
    resumed: list[int] = []
    held: Held | None = None
    for turn in range(ROUNDS):
        fails = Act(3 * turn + 4, fail)
        training = Training(rank, replace(plan, seed=turn, acts=(fails,), settle=(3 * turn + 3,)))
        with pytest.raises(RuntimeError, match="the user's own loop failed"):
            training.run()
        resumed.append(training.trainer.resumed_from.iteration if training.trainer.resumed_from else 0)
        del training
        if turn == 2:  # what is made once and kept is there by now
            held = Held((plan.memory, plan.disk))
    assert held is not None
    leaks = held.leaks()
    gc.collect()
    last = Training(rank, replace(plan, seed=99))
    return resumed, leaks, last.run().digest


@pytest.mark.parametrize("nodes", [("a",), ("a", "b")], ids=["one rank", "two ranks"])
def test_a_job_restarts_in_one_process_as_often_as_need_be_and_nothing_piles_up(
    world: World, nodes: tuple[str, ...]
) -> None:
    plan = world.plan(*nodes, steps=3 * ROUNDS + 6)
    for rank, (resumed, leaks, digest) in enumerate(values(run_ranks(len(nodes), start_over_and_over, plan))):
        assert resumed == [3 * turn for turn in range(ROUNDS)]
        assert leaks == []
        assert digest == reference(len(nodes), 3 * ROUNDS + 6)[rank]


# -- workers that outlive their rank ---------------------------------------------------------------------------------


class Samples(torch.utils.data.Dataset[torch.Tensor]):
    """Each worker notes its process; from a certain item on, it is busy for long and does not look for its parent."""

    def __init__(self, notes: Path, rank: int, busy_from: int) -> None:
        self._data = torch.randn(400, 6, generator=torch.Generator().manual_seed(rank))
        self._notes = notes / str(rank)
        self._notes.mkdir(parents=True, exist_ok=True)
        self._busy_from = busy_from

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> torch.Tensor:
        (self._notes / str(os.getpid())).touch()
        if index >= self._busy_from:
            time.sleep(600)
        return self._data[index]


def with_workers(training: Training, busy_from: int) -> None:
    """Forked, as data loaders do: they hold every descriptor that the rank has."""
    multiprocessing.current_process()._config["daemon"] = False  # type: ignore[attr-defined]
    training.plan = replace(training.plan, nodes=(training.node,))  # no collective of the training's own
    data = Samples(Path(training.plan.disk, "workers"), training.rank, busy_from if training.rank == 1 else 400)
    torch.manual_seed(training.rank)
    training.loader = torch.utils.data.DataLoader(
        data, 4, num_workers=1, prefetch_factor=8, multiprocessing_context="fork"
    )


def busy_workers(training: Training) -> None:
    with_workers(training, 40)  # ten batches on: asked for ahead of time


def idle_workers(training: Training) -> None:
    with_workers(training, 400)


def die_when_the_worker_is_busy(training: Training) -> None:
    time.sleep(0.5)
    die(training)


@contextmanager
def workers_of(world: World) -> Iterator[list[int]]:
    """Those that are left are ended."""
    left: list[int] = []
    try:
        yield left
    finally:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_workers_that_outlive_a_killed_rank_hide_its_death_from_nobody_and_hold_up_no_restart(world: World) -> None:
    plan = world.plan(
        "a", "b", steps=12, settle=(6,), make=busy_workers, acts=(Act(7, die_when_the_worker_is_busy, 1),),
        resiliency={"exchange_timeout_s": 2.0},
    )  # fmt: skip
    with workers_of(world) as left:
        survivor, dead = world.run(plan, until=(0,))  # a worker of rank 1 has its end of the test's pipe as well
        assert dead.status == -signal.SIGKILL
        assert survivor.error == "PeerLostError", "its sockets stay open, its heart does not beat"
        assert "[1]" in survivor.message
        left += [int(note.name) for note in (world.disk / "workers" / "1").iterdir() if alive(int(note.name))]
        assert left, "a worker lives on"
        results = values(world.run(replace(plan, make=idle_workers, acts=(), settle=(), seed=1)))
        assert [ran.resumed.iteration for ran in results] == [6, 6]
        assert [ran.iteration for ran in results] == [12, 12]
        assert all(map(alive, left)), "and it still did when the job had long gone on"
