"""Waits for saves: as long as anything moves on any rank, and no longer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import resilience.controller
from resilience.planning.book import Book, unsettled
from resilience.planning.control import ControlReport, decode, encode, merge
from resilience.planning.inventory import SaveId
from resilience.saving.progress import Stillness
from resilience.stores.filesystem import PosixFileSystem
from tests.core.training import Act, Plan, Training, World
from tests.ranks import run_ranks, values


class HangingStorage(PosixFileSystem):
    """Shared storage that takes files and never answers again."""

    def write_file(self, path: Path, chunks: Iterator[memoryview]) -> None:
        if ".saving-" in str(path):
            threading.Event().wait()
        super().write_file(path, chunks)


def wait_for_storage(rank: int, plan: Plan) -> str:
    resilience.controller.PosixFileSystem = HangingStorage  # of this process, which is about to end
    training = Training(rank, plan)
    trainer = training.start()
    for batch in trainer.iterations(plan.steps):
        training.step(batch)
        if trainer.iteration == 4:
            break
    try:
        trainer.wait()
    finally:
        trainer.close(failed=True)
    return "settled"


def test_a_wait_for_storage_that_hangs_ends_and_says_what_it_waited_for(world: World) -> None:
    plan = world.plan(
        "a", kind=None, save=True, checkpoint={"save_interval": 3, "async_save": True},
        resiliency={"exchange_timeout_s": 0.25},
    )  # fmt: skip
    (outcome,) = run_ranks(1, wait_for_storage, plan)
    assert outcome.error == "SaveStuckError"
    assert "No save moved for 3 s: that of iteration 3 waits for shared storage" in outcome.message
    assert "under way on this rank: 'drain 3'" in outcome.message


def test_something_moves_while_it_moves_on_any_rank() -> None:
    vectors = [encode(ControlReport(7, idle_us=idle_us), []) for idle_us in (5_000_000, 40, 9)]
    assert decode(merge(vectors)).idle_us == 9


def test_a_wait_is_in_vain_only_after_the_mark_stood_still() -> None:
    now = [100.0]
    stillness = Stillness(lambda: now[0])
    assert stillness.seconds("a") == 0
    now[0] = 107.0
    assert stillness.seconds("a") == 7
    assert stillness.seconds("b") == 0
    now[0] = 108.0
    assert stillness.seconds("b") == 1


def test_bytes_move_while_a_large_file_is_written(tmp_path: Path) -> None:
    fs = PosixFileSystem()
    seen: list[int] = []

    def chunks() -> Iterator[memoryview]:
        for _ in range(3):
            seen.append(fs.moved_bytes)
            yield memoryview(bytes(1000))

    fs.write_file(tmp_path / "file", chunks())
    assert [*seen, fs.moved_bytes] == [0, 1000, 2000, 3000]


def test_what_is_waited_for_is_told_by_save() -> None:
    replicated, drained = SaveId(3, 1, "a" * 32), SaveId(6, 1, "a" * 32)
    book = Book().begin(replicated, non_persistent=True, drain=False).begin(drained, non_persistent=True, drain=True)
    told = unsettled(book, [])
    assert "iteration 3 waits for its commit on every node" in told
    assert "iteration 6 waits for shared storage" in told
    assert "another rank is behind" in told


@pytest.mark.parametrize("kind", [None, "global"])
def test_what_should_be_equal_is_compared_in_saves_on_shared_storage_too(world: World, kind: str | None) -> None:
    interval = {"save_interval": 3} if kind is None else {}
    plan = world.plan("a", "b", kind=kind, save=True, checkpoint=interval, settle=(5, 8), acts=(Act(4, alter, 1),))
    results = values(world.run(plan))
    assert [ran.status["failed_saves"] for ran in results] == [1, 1]
    (told,) = world.events("save_failed", rank=0)
    assert told["iteration"] == 6
    assert "should be equal on all data-parallel ranks differs" in told["error"]
    assert world.events("unequal_items"), "the next one stores them per rank"


def alter(training: Training) -> None:
    with torch.no_grad():
        training.model.up.weight += 1.0
