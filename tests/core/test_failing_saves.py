"""Promise 5: a failed save does not stop training, is counted, and leaves nothing that can be elected."""

from __future__ import annotations

import errno
import functools
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import resilience.controller
from resilience.errors import StoreError
from resilience.stores.filesystem import MappedFile, PosixFileSystem
from resilience.stores.trackers import TEXT_TRACKER
from tests.core.training import Act, Training, World, die, reference
from tests.ranks import values


class FullMount(PosixFileSystem):
    """A disk that has no room while `full` is set."""

    full: bool | str = False

    def _refuse(self, path: Path) -> None:
        if self.full is True or (self.full == "records" and path.suffix == ".json"):
            refused = StoreError(f"cannot write {path}: no space is left.")
            refused.errno = errno.ENOSPC
            raise refused

    def create_mapping(self, path: Path, nbytes: int, *options: Any, **named: Any) -> MappedFile:
        self._refuse(path)
        return super().create_mapping(path, nbytes, *options, **named)

    def write_file(self, path: Path, chunks: Iterator[memoryview]) -> None:
        self._refuse(path)
        super().write_file(path, chunks)

    def write_atomic(self, path: Path, content: bytes, *, durable: bool = True) -> None:
        if path.name.startswith("rank_"):
            self._refuse(path)
        super().write_atomic(path, content, durable=durable)


def on_a_mount_that_fills_up(training: Training) -> None:
    resilience.controller.PosixFileSystem = FullMount  # of this process, which is about to end


def fill_up(training: Training) -> None:
    training.trainer._controller._fs.full = True


def refuse_records(training: Training) -> None:
    """Files may be made, but not their records."""
    training.trainer._controller._fs.full = "records"


def free_up(training: Training) -> None:
    training.trainer._controller._fs.full = False


def large_model(training: Training) -> None:
    """Several parts to compare: the rotating share is two megabytes."""
    on_a_mount_that_fills_up(training)
    torch.manual_seed(0)
    training.model.add_module("large", nn.Linear(600, 600))
    training.optimizer.add_param_group({"params": list(training.model.large.parameters())})
    for parameter in training.model.large.parameters():
        parameter.grad = torch.zeros_like(parameter)


@pytest.mark.parametrize("kind", ["local", "disk"])
def test_a_full_mount_on_one_node_costs_one_save_and_no_training(world: World, kind: str) -> None:
    plan = world.plan(
        "a", "b", kind=kind, settle=(4, 8), make=on_a_mount_that_fills_up, acts=(Act(4, fill_up, 1), Act(8, free_up, 1))
    )
    results = values(world.run(plan))
    assert tuple(ran.digest for ran in results) == reference(2)
    assert [ran.status["failed_saves"] for ran in results] == [1, 1], "all ranks count it"
    told = world.events("save_failed", iteration=6, rank=1)
    assert "no space is left" in told[0]["error"]
    for node in "ab":
        assert set(world.copies(node, kind)) == {9, 12}, "nothing of the failed save is left, and saves go on"
        assert world.copies(node, kind)[12] == {0 + (node == "b"): "primary", 1 - (node == "b"): "replica"}


@pytest.mark.parametrize("in_background", [False, True])
def test_a_persistent_save_that_fails_on_one_rank_leaves_the_one_before_the_newest(
    world: World, in_background: bool
) -> None:
    plan = world.plan(
        "a", "b", kind=None, save=True, settle=(4, 7), make=on_a_mount_that_fills_up,
        acts=(Act(4, fill_up, 1), Act(7, note_newest), Act(7, free_up, 1)),
        checkpoint={"save_interval": 3, "async_save": in_background},
    )  # fmt: skip
    results = values(world.run(plan))
    assert tuple(ran.digest for ran in results) == reference(2)
    assert [ran.status["failed_saves"] for ran in results] == [1, 1], "all ranks count it"
    assert [ran.notes for ran in results] == [(("3", ["iter_0000003"]),)] * 2, "nothing of it is visible"
    told = world.events("save_failed", iteration=6, rank=1)
    assert "no space is left" in told[0]["error"]
    assert (world.disk / "save" / TEXT_TRACKER).read_text() == "12"
    assert {path.name for path in (world.disk / "save").glob("*iter_*")} == {f"iter_{n:07d}" for n in (3, 9, 12)}


def note_newest(training: Training) -> None:
    save = Path(training.checkpoint.save)
    training.notes.append(((save / TEXT_TRACKER).read_text(), [path.name for path in save.glob("iter_*")]))


def test_saves_succeed_again_after_one_failed_on_one_rank_only_however_large_the_model(world: World) -> None:
    """All ranks go on comparing the same share of what they have in common."""
    plan = world.plan(
        "a", "b", steps=18, settle=(4, 7), make=large_model, acts=(Act(4, fill_up, 1), Act(7, free_up, 1))
    )
    results = values(world.run(plan))
    assert [ran.status["failed_saves"] for ran in results] == [1, 1]
    assert set(world.copies("a")) == {15, 18}


def test_a_record_that_cannot_be_written_spoils_neither_the_buffer_nor_later_saves(world: World) -> None:
    plan = world.plan(
        "a", "b", settle=(2, 4), make=on_a_mount_that_fills_up, acts=(Act(2, refuse_records, 1), Act(4, free_up, 1))
    )
    results = values(world.run(plan))
    assert [ran.status["failed_saves"] for ran in results] == [1, 1]
    assert world.events("save_failed", iteration=3)
    assert set(world.copies("a")) == set(world.copies("b")) == {9, 12}


def test_a_real_full_mount_is_an_error_and_never_a_bus_error(world: World) -> None:
    mount = world.memory / "a"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=216k", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        (ran,) = values(world.run(world.plan("a", make=without_a_budget)))
        assert (ran.digest,) == reference(1)
        assert ran.status["failed_saves"] >= 1
        held = set(world.copies("a"))
        assert held, "what fitted is still there"
        (again,) = values(world.run(world.plan("a", seed=1, make=without_a_budget)))
        assert again.resumed.iteration == max(held)
    finally:
        subprocess.run(["umount", mount], check=True)


def without_a_budget(training: Training) -> None:
    """As if something else had filled the mount after the budget was checked."""
    import resilience.saving.budget

    resilience.saving.budget.check = lambda budget, available, again: ""


def test_a_node_that_cannot_hold_its_saves_is_refused_with_the_sum(world: World) -> None:
    outcomes = world.run(world.plan("a", "b", make=on_a_tiny_mount))
    assert {outcome.error for outcome in outcomes} == {"MemoryBudgetError"}, "the same on all ranks"
    other, refused = outcomes
    assert other.message.startswith("rank 1 could not start: ")
    for word in ("(estimated)", "shared memory needed", "2.0 KiB free", "arenas of 1 ranks", "slots for 1 replicas"):
        assert word in refused.message
    assert not world.events("snapshot"), "before the first step"


def test_a_sum_that_was_estimated_too_low_is_refused_when_the_first_save_is_planned(world: World) -> None:
    outcomes = world.run(world.plan("a", "b", make=on_a_small_mount))
    assert [outcome.error for outcome in outcomes] == ["MemoryBudgetError", "MemoryBudgetError"]
    assert "(estimated)" not in outcomes[1].message
    told = [event["what"] for event in world.events("memory", rank=0)]
    assert ["(estimated)" in what for what in told] == [True, False]


class TinyMount(PosixFileSystem):
    def free_bytes(self, path: Path) -> int:
        return self.nbytes

    nbytes = 2 << 10


class SmallMount(TinyMount):
    nbytes = 100 << 10  # the tensors would fit; headers and values do not


def on_a_tiny_mount(training: Training) -> None:
    if training.rank == 1:
        resilience.controller.PosixFileSystem = TinyMount


def on_a_small_mount(training: Training) -> None:
    if training.rank == 1:
        resilience.controller.PosixFileSystem = SmallMount


def test_with_raise_a_failed_save_ends_training_on_all_ranks(world: World) -> None:
    plan = world.plan(
        "a", "b", make=on_a_mount_that_fills_up, acts=(Act(4, fill_up, 1),), resiliency={"on_save_failure": "raise"}
    )
    outcomes = world.run(plan)
    assert [outcome.error for outcome in outcomes] == ["SaveFailedError", "SaveFailedError"]
    assert "no space is left" in outcomes[1].message


def test_a_save_with_an_unhealthy_rank_never_becomes_complete(world: World) -> None:
    plan = world.plan("a", "b", make=unhealthy_at_six)
    results = values(world.run(plan))
    assert tuple(ran.digest for ran in results) == reference(2)
    assert results[0].status["failed_saves"] == 1
    assert "not healthy" in world.events("save_failed", iteration=6, rank=1)[0]["error"]
    assert not world.events("complete", iteration=6)
    assert not world.events("committed", iteration=6), "nobody commits before the group has agreed"
    assert set(world.copies("a")) == set(world.copies("b")) == {9, 12}


def unhealthy_at_six(training: Training) -> None:
    training.healthy = lambda: training.rank == 0 or training.trainer.iteration != 6


def test_an_unsupported_piece_of_state_is_refused_at_the_first_save_by_name(world: World) -> None:
    outcomes = world.run(world.plan("a", "b", make=with_an_object_on_rank_1))
    assert [outcome.error for outcome in outcomes] == ["DivergedRanksError", "UnsupportedStateError"]
    assert "extra/odd" in outcomes[1].message
    assert "another rank" in outcomes[0].message


class Odd:
    def __init__(self, state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state["value"]


def with_an_object_on_rank_1(training: Training) -> None:
    training.extra["odd"] = Odd(object() if training.rank == 1 else 1)


def test_values_that_outgrow_their_room_get_a_larger_file_and_come_back_whole(world: World) -> None:
    plan = world.plan("a", "b", make=with_a_list, acts=(Act(4, grow, 0), Act(9, die)), resiliency={"keep_last": 3})
    world.run(replace(plan, settle=(9,)))
    assert len(world.shard("a", 6, 0).read_bytes()) > len(world.shard("a", 3, 0).read_bytes())
    results = values(world.run(replace(plan, acts=(Act(9, note_length),), seed=1)))
    assert results[0].resumed.iteration == 9
    assert results[0].status["failed_saves"] == 0
    assert [ran.notes for ran in results] == [(300_000,), (1,)]


def with_a_list(training: Training) -> None:
    training.extra["odd"] = Odd([0])


def grow(training: Training) -> None:
    training.extra["odd"].state = [1.5] * 300_000


def note_length(training: Training) -> None:
    training.notes.append(len(training.extra["odd"].state))


def test_optimizer_state_that_appears_late_costs_one_save_and_is_in_the_next(world: World) -> None:
    plan = world.plan("a", "b", make=freeze_first, acts=(Act(4, unfreeze), Act(10, die)), settle=(8, 9))
    world.run(plan)
    results = values(world.run(replace(plan, acts=(), settle=(), seed=1, make=unfrozen_from_the_start)))
    assert results[0].resumed.iteration == 9
    told = world.events("save_failed", rank=0)
    assert {event["iteration"] for event in told} == {6}
    assert "structure of the training state changed" in told[0]["error"]


def freeze_first(training: Training) -> None:
    for parameter in training.model.up.parameters():
        parameter.requires_grad_(False)


def unfreeze(training: Training) -> None:
    for parameter in training.model.up.parameters():
        parameter.requires_grad_(True)


def unfrozen_from_the_start(training: Training) -> None:
    unfreeze(training)


def test_a_parameter_moved_to_other_memory_is_saved_from_where_it_is_now(world: World) -> None:
    plan = world.plan("a", acts=(Act(4, move_everything),), make=functools.partial(no_op), settle=(6,))
    (moved,) = values(world.run(replace(plan, steps=7)))
    (again,) = values(world.run(replace(plan, acts=(), seed=1, steps=7)))
    assert again.resumed.iteration == 6
    assert again.digest == moved.digest


def no_op(training: Training) -> None:
    return


def move_everything(training: Training) -> None:
    for parameter in training.model.parameters():
        parameter.data = parameter.data.clone()
    for state in training.optimizer.state.values():
        for value in state.values():
            value.data = value.data.clone()
