"""A start: who may begin, what counts as nothing there, and that no live tensor changes before every rank can go on."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import resilience.controller
import resilience.restore
from resilience import CheckpointConfig, ResilientTrainer
from resilience.errors import AnotherJobError, ConfigError, StoreError
from resilience.stores.filesystem import MappedFile, PosixFileSystem
from tests.core.training import RUN, Act, Plan, Training, World, die, fail, reference, train
from tests.ranks import TIMEOUT_S, killed, run_ranks, values


def with_saves_at_3_and_6(world: World, **fields: Any) -> Plan:
    plan = world.plan("a", "b", **fields)
    outcomes = world.run(replace(plan, settle=(6,), acts=(Act(8, die),)))
    assert all(map(killed, outcomes)), outcomes
    return replace(plan, seed=1)


# -- two-phase load ---------------------------------------------------------------------------------------------------


def test_a_launcher_s_ranks_that_did_not_meet_are_refused_and_do_not_train_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    model = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"WORLD_SIZE is 4, but torch\.distributed is not initialised"):
        ResilientTrainer(model, checkpoint=CheckpointConfig(save=str(tmp_path / "ckpt"), save_interval=1))
    assert not (tmp_path / "ckpt").exists()


def test_a_restore_that_fails_on_one_rank_leaves_no_live_tensor_changed_on_any(world: World) -> None:
    again = with_saves_at_3_and_6(world)
    outcomes = run_ranks(2, restore_and_compare, replace(again, make=another_model_on_rank_1))
    first, second = values(outcomes)
    assert (first["error"], second["error"]) == ("LayoutMismatchError", "LayoutMismatchError")
    assert "another rank" in first["message"]
    assert "up.weight" in second["message"], "the difference is named"
    assert first["unchanged"]
    assert second["unchanged"]
    results = values(world.run(again))
    assert results[0].resumed.iteration == 6, "and nothing on the nodes was harmed"


def another_model_on_rank_1(training: Training) -> None:
    if training.rank == 1:
        training.model.up = nn.Linear(6, 9)  # type: ignore[assignment]


def restore_and_compare(rank: int, plan: Plan) -> dict[str, Any]:
    training = Training(rank, plan)
    before = [tensor.clone() for tensor in training.model.state_dict().values()]
    random = torch.get_rng_state()
    try:
        training.start()
    except Exception as error:  # noqa: BLE001 - reported as it is
        told = {"error": type(error).__name__, "message": str(error)}
    else:
        told = {"error": "", "message": ""}
    after = training.model.state_dict().values()
    same = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    return {**told, "unchanged": same and torch.equal(random, torch.get_rng_state()) and not training.optimizer.state}


def test_without_room_for_what_must_be_fetched_all_ranks_hear_why(world: World) -> None:
    again = with_saves_at_3_and_6(world)
    world.lose("b")
    outcomes = run_ranks(2, restore_and_compare, replace(again, make=no_room_on_rank_1))
    first, second = values(outcomes)
    assert second["error"] == "StoreError"
    assert "no space is left" in second["message"]
    assert first["error"] in ("ResilienceError", "PeerLostError")
    assert "no space is left" in first["message"] or "link" in first["message"]
    assert first["unchanged"]
    assert second["unchanged"]


class NoRoom(PosixFileSystem):
    def reserve(self, mapped: MappedFile, stop: int, wanted: Callable[[], bool]) -> None:
        refused = StoreError(f"cannot reserve {mapped.nbytes} bytes for {mapped.path}: no space is left.")
        refused.errno = errno.ENOSPC
        raise refused


def no_room_on_rank_1(training: Training) -> None:
    if training.rank == 1:
        resilience.controller.PosixFileSystem = NoRoom


# -- what could not be looked at ---------------------------------------------------------------------------------------


class BrokenDisk(PosixFileSystem):
    """Listing a node's directory of the run is an I/O error."""

    def list_dir(self, path: Path) -> list[str]:
        if path.name == RUN or path.parent.name == RUN or path.name == "save":
            raise StoreError(f"cannot list {path}: Input/output error.")
        return super().list_dir(path)


def broken_disk_on_rank_1(training: Training) -> None:
    resilience.restore._RETRY_UNKNOWN_S = 1.5
    resilience.assembly._refuse_shared_directories = lambda *_: None
    if training.rank == 1:
        resilience.controller.PosixFileSystem = BrokenDisk


def test_an_unreadable_source_is_not_an_empty_one(world: World) -> None:
    """One of two nodes cannot read its directory, the other was lost: a fresh start would throw the run away."""
    again = with_saves_at_3_and_6(world)
    world.lose("a")
    outcomes = world.run(replace(again, make=broken_disk_on_rank_1))
    assert [outcome.error for outcome in outcomes] == ["SourceUnavailableError"] * 2
    assert "Input/output error" in outcomes[0].message
    assert world.events("warning", rank=0), "it was tried again first"


def test_a_first_start_with_an_unreadable_source_does_not_begin_afresh(world: World) -> None:
    outcomes = world.run(world.plan("a", "b", make=broken_disk_on_rank_1))
    assert [outcome.error for outcome in outcomes] == ["SourceUnavailableError"] * 2


def test_with_an_unreadable_source_a_save_as_new_as_any_known_is_good_enough(world: World) -> None:
    again = with_saves_at_3_and_6(world)
    results = values(world.run(replace(again, make=broken_disk_on_rank_1)))
    assert [ran.resumed.iteration for ran in results] == [6, 6]
    assert tuple(ran.digest for ran in results) == reference(2)


def test_an_unreadable_source_that_answers_at_last_is_waited_for(world: World) -> None:
    again = with_saves_at_3_and_6(world)
    world.lose("a")
    results = values(world.run(replace(again, make=slow_disk_on_rank_1)))
    assert [ran.resumed.iteration for ran in results] == [6, 6]


class SlowDisk(BrokenDisk):
    calls = 0

    def list_dir(self, path: Path) -> list[str]:
        SlowDisk.calls += 1
        return super().list_dir(path) if SlowDisk.calls < 6 else PosixFileSystem.list_dir(self, path)


def slow_disk_on_rank_1(training: Training) -> None:
    broken_disk_on_rank_1(training)
    resilience.restore._RETRY_UNKNOWN_S = 60.0
    if training.rank == 1:
        resilience.controller.PosixFileSystem = SlowDisk


def test_shared_storage_that_does_not_answer_is_waited_for_and_not_claimed_meanwhile(world: World) -> None:
    plan = world.plan("a", "b", kind=None, save=True, checkpoint={"save_interval": 3})
    outcomes = world.run(replace(plan, acts=(Act(7, die),)))
    assert all(map(killed, outcomes))
    owner = (world.disk / "save" / "resilience.json").read_bytes()
    outcomes = world.run(replace(plan, make=broken_save))
    assert [outcome.error for outcome in outcomes] == ["SourceUnavailableError"] * 2
    assert (world.disk / "save" / "resilience.json").read_bytes() == owner
    assert values(world.run(plan))[0].resumed.iteration == 6


class BrokenSave(PosixFileSystem):
    def list_dir(self, path: Path) -> list[str]:
        if path.name == "save":
            raise StoreError(f"cannot list {path}: Input/output error.")
        return super().list_dir(path)

    def make_dir(self, path: Path) -> None:
        if path.name == "save":
            raise StoreError(f"cannot make the directory {path}: Input/output error.")
        super().make_dir(path)


def broken_save(training: Training) -> None:
    resilience.restore._RETRY_UNKNOWN_S = 1.5
    resilience.controller.PosixFileSystem = BrokenSave


# -- what counts as nothing --------------------------------------------------------------------------------------------


def test_when_a_completed_save_is_gone_the_job_stops_unless_told_to_begin_afresh(world: World) -> None:
    again = with_saves_at_3_and_6(world)
    for node in "ab":
        for path in (world.memory / node / RUN / node).glob("iter_*/*/rank_*"):
            path.unlink()
    outcomes = world.run(again)
    assert [outcome.error for outcome in outcomes] == ["NoUsableSaveError"] * 2
    assert "once completed iteration 6" in outcomes[0].message
    results = values(world.run(replace(again, seed=0, resiliency={"on_no_usable_save": "fresh"})))
    assert results[0].resumed is None
    assert tuple(ran.digest for ran in results) == reference(2)


def test_leftovers_of_a_save_that_was_never_complete_do_not_count(world: World) -> None:
    plan = world.plan("a", "b", make=fail_to_commit_on_rank_1, acts=(Act(8, die),), settle=(6,))
    assert all(map(killed, world.run(plan)))
    results = values(world.run(replace(plan, make=None, acts=(), settle=())))
    assert results[0].resumed is None
    assert "none shows that run" in world.events("fresh", rank=0)[-1]["reason"]


class NoRecords(PosixFileSystem):
    def write_atomic(self, path: Path, content: bytes, *, durable: bool = True) -> None:
        if path.name.startswith("rank_"):
            raise StoreError(f"cannot write {path}: no space is left.")
        super().write_atomic(path, content, durable=durable)


def fail_to_commit_on_rank_1(training: Training) -> None:
    if training.rank == 1:
        resilience.controller.PosixFileSystem = NoRecords


def test_stale_buffers_temporary_files_and_shards_without_a_record_are_swept(world: World) -> None:
    again = with_saves_at_3_and_6(world)
    root = world.memory / "a" / RUN / "a"
    arenas = [root / ".arenas" / "rank_00000-for_00001-7.arena"]
    arenas[0].write_bytes(b"a buffer of a killed process")
    orphan = world.shard("a", 6, 0).with_name("rank_00007-of-00009.safetensors")
    shutil.copyfile(world.shard("a", 6, 0), orphan)
    temporary = [orphan.with_name(".tmp-1-2-x"), root / "attempts" / ".tmp-1-2-y", root / ".tmp-1-2-z"]
    for path in temporary:
        path.write_bytes(b"half of it")
    values(world.run(replace(again, steps=7)))
    left = [path for path in (*arenas, orphan, *temporary) if path.exists()]
    assert left == []


# -- who may begin -----------------------------------------------------------------------------------------------------


def test_a_second_live_job_is_refused_and_admitted_when_the_first_was_killed(world: World) -> None:
    plan = world.plan("a", make=locks_are_not_waited_for)
    (outcome,) = run_ranks(1, start_twice, plan)
    assert outcome.value == (AnotherJobError.__name__, True), outcome
    (ran,) = values(world.run(replace(plan, seed=1)))
    assert ran.resumed.iteration == 3


def locks_are_not_waited_for(training: Training) -> None:
    resilience.assembly._LOCK_WAIT_S = 0.3


def start_twice(rank: int, plan: Plan) -> tuple[str, bool]:
    """A job whose second copy is started while it lives; then it is killed, and a data-loader worker of it lives on."""
    reader, writer = os.pipe()
    first = os.fork()
    if first == 0:
        run_until_told(plan, writer)
    os.read(reader, 1)
    try:
        Training(rank, plan).start()
    except Exception as error:  # noqa: BLE001 - reported as it is
        refused = type(error).__name__
    os.kill(first, 9)
    os.waitpid(first, 0)
    return refused, wait_for_lock(plan)


def run_until_told(plan: Plan, writer: int) -> None:
    training = Training(0, plan)
    with training.start() as trainer:
        for batch in trainer.iterations(12):
            training.step(batch)
            if trainer.iteration == 4:
                trainer.wait()
                if os.fork() == 0:  # holds the descriptors of its parent, and outlives it
                    time.sleep(5)
                    os._exit(0)
                os.write(writer, b"x")
                time.sleep(TIMEOUT_S)
    os._exit(0)


def wait_for_lock(plan: Plan) -> bool:
    """Whether the directory can be locked now, although a forked worker of the killed process lives on."""
    from resilience.stores.lock import DirectoryLock

    lock = DirectoryLock(Path(plan.memory) / "a" / RUN / "a", 0)
    lock.acquire()
    lock.release()
    return True


def test_a_directory_that_two_nodes_see_is_refused_as_local(world: World) -> None:
    shared = {"non_persistent_local_ckpt_dir": str(world.memory / "one")}
    outcomes = world.run(world.plan("a", "b", checkpoint=shared, resiliency={"memory_dir": str(world.memory / "one")}))
    assert {outcome.error for outcome in outcomes} == {"ConfigError"}
    assert "more than one node" in outcomes[0].message
    assert not list((world.memory / "one" / RUN).glob(".nonce-*")), "no mark is left behind"


def test_a_start_that_was_refused_can_be_made_again_in_the_same_process(world: World) -> None:
    outcomes = run_ranks(2, start_after_a_refusal, world.plan("a", "b"))
    assert values(outcomes) == [("ConfigError", 12), ("ConfigError", 12)]


def start_after_a_refusal(rank: int, plan: Plan) -> tuple[str, int]:
    everywhere = str(Path(plan.memory) / "one")
    wrong = replace(
        plan, checkpoint={"non_persistent_local_ckpt_dir": everywhere}, resiliency={"memory_dir": everywhere}
    )
    try:
        Training(rank, wrong).start()
    except Exception as error:  # noqa: BLE001 - reported as it is
        refused = type(error).__name__
    return refused, train(rank, plan).iteration


def test_settings_that_differ_between_ranks_are_refused_on_all(world: World) -> None:
    outcomes = world.run(world.plan("a", "b", make=another_interval_on_rank_1))
    assert [outcome.error for outcome in outcomes] == ["ConfigError"] * 2
    assert "non_persistent_save_interval is 3 on rank 0 and 4 on rank 1" in outcomes[0].message


def another_interval_on_rank_1(training: Training) -> None:
    if training.rank == 1:
        training.checkpoint = replace(training.checkpoint, non_persistent_save_interval=4)


def test_two_copies_in_one_failure_domain_are_refused_at_a_first_start_only(world: World) -> None:
    """At a restart the factor is lowered, and that is said; one node alone is never refused."""
    rack = world.plan("a", "b", resiliency={"failure_domain": "rack"})
    outcomes = world.run(rack)
    assert [outcome.error for outcome in outcomes] == ["ConfigError"] * 2
    assert "failure domain" in outcomes[0].message
    again = with_saves_at_3_and_6(world)
    results = values(world.run(replace(again, resiliency={"failure_domain": "rack"})))
    assert results[0].resumed.iteration == 6
    assert any("not fully protected" in event["what"] for event in world.events("warning"))


@pytest.mark.parametrize("world_size", [1, 3])
def test_without_elastic_saves_of_another_world_size_are_passed_over_with_the_reason(
    world: World, world_size: int
) -> None:
    again = replace(with_saves_at_3_and_6(world), resiliency={"elastic": False})
    outcomes = world.run(replace(again, nodes=("a", "b", "c")[:world_size]))
    assert {outcome.error for outcome in outcomes} == {"NoUsableSaveError"}
    assert f"saved by 2 ranks, and this start has {world_size}" in outcomes[0].message


def test_a_run_without_a_name_that_a_restart_would_know_is_refused(world: World) -> None:
    outcomes = world.run(world.plan("a", resiliency={"run_id": None}))
    assert outcomes[0].error == "ConfigError"
    assert "run_id" in outcomes[0].message


def test_a_run_with_a_save_directory_draws_its_name_once_and_keeps_it_there(world: World) -> None:
    plan = world.plan("a", save=True, resiliency={"run_id": None}, settle=(6,), acts=(Act(8, fail),))
    world.run(plan)
    values(world.run(replace(plan, acts=(), settle=())))
    assert len({event["run_id"] for event in world.events("start")}) == 1
    assert world.events("resume")[0]["iteration"] == 6
