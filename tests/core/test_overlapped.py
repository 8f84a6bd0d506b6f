"""`snapshot_mode="overlapped"` on real ranks: copies come late, and jobs end in the bits of undisturbed ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from resilience.snapshot import copying, overlap
from tests.core.elastic import divided
from tests.core.test_survive import with_ddp, with_fsdp, with_two_optimizers_and_no_loader
from tests.core.training import Act, Plan, Training, World, die, fail, reference, stop
from tests.ranks import killed, values

OVERLAPPED = {"snapshot_mode": "overlapped"}
LATE_S = 0.15


def late(training: Training, late_s: float = LATE_S) -> None:
    """Each overlapped copy begins so late that whoever does not wait for it is seen; nothing is too small for it."""
    overlap._SMALL_BYTES = 1  # type: ignore[misc]
    copy = copying._copy_host

    def slowly(*given: Any, **named: Any) -> None:
        if threading.current_thread().name == "resilience-copy":
            time.sleep(late_s)
        copy(*given, **named)

    copying._copy_host = slowly


def late_ddp(training: Training) -> None:
    late(training)
    with_ddp(training)


def late_fsdp(training: Training) -> None:
    late(training)
    with_fsdp(training)


def late_several(training: Training) -> None:
    late(training)
    with_two_optimizers_and_no_loader(training)


def late_distributed_optimizer(training: Training) -> None:
    late(training)
    divided(training)


def overlapped(world: World, *nodes: str, make: Callable[[Training], None] = late, **fields: Any) -> Plan:
    given = {"resiliency": OVERLAPPED | fields.pop("resiliency", {}), "make": make, "paced": False}
    return world.plan(*nodes, **given | fields)


def killed_at_8(world: World, plan: Plan) -> Plan:
    outcomes = world.run(replace(plan, settle=(6,), acts=(Act(8, die),)))
    assert all(killed(outcome) for outcome in outcomes), outcomes
    return replace(plan, seed=1)


@pytest.mark.parametrize("kind", ["local", "disk", "in_memory"])
@pytest.mark.parametrize("algorithm", ["fully_parallel", "atomic"])
def test_a_lost_node_is_recovered_from_its_peer(world: World, kind: str, algorithm: str) -> None:
    plan = overlapped(world, "a", "b", kind=kind, checkpoint={"non_persistent_local_ckpt_algo": algorithm})
    again = killed_at_8(world, plan)
    world.lose("b")
    results = values(world.run(again))
    assert [ran.resumed.iteration for ran in results] == [6, 6]
    assert tuple(ran.digest for ran in results) == reference(2)
    assert [ran.status["failed_saves"] for ran in results] == [0, 0]


@pytest.mark.parametrize("make", [late_ddp, late_fsdp, late_several, late_distributed_optimizer])
def test_whatever_steps_waits_for_the_copy(world: World, make: Callable[[Training], None]) -> None:
    plan = overlapped(world, "a", "b", make=make, every=1)
    again = killed_at_8(world, plan)
    world.lose("a")
    results = values(world.run(again))
    assert all(ran.resumed.iteration >= 6 for ran in results)
    assert tuple(ran.digest for ran in results) == reference(2, 12, make)
    assert [ran.status["failed_saves"] for ran in results] == [0, 0]


@pytest.mark.parametrize("options", [{"replicas_from": "live"}, {"redundancy": "xor"}])
def test_replicas_that_are_composed_and_parity_are_of_the_boundary_too(world: World, options: dict[str, str]) -> None:
    factor = {"checkpoint": {"replication_factor": 3}}
    plan = overlapped(world, "a", "b", "c", resiliency=options, **factor)
    again = killed_at_8(world, plan)
    world.lose("c")
    results = values(world.run(again))
    assert [ran.resumed.iteration for ran in results] == [6, 6, 6]
    assert tuple(ran.digest for ran in results) == reference(3)


def test_one_late_copy_serves_a_save_on_the_nodes_and_one_on_shared_storage(world: World) -> None:
    options = {"save_interval": 3, "async_save": True}
    plan = replace(overlapped(world, "a", "b", save=True, checkpoint=options), paced=True)  # else saves may slide
    again = killed_at_8(world, plan)
    world.lose("a")
    world.lose("b")
    results = values(world.run(again))
    assert [(ran.resumed.iteration, ran.resumed.tier) for ran in results] == [(6, "persistent")] * 2
    assert tuple(ran.digest for ran in results) == reference(2)


@pytest.mark.parametrize("kind", ["global", None])
def test_saves_that_are_waited_for_are_eager(world: World, kind: str | None) -> None:
    plan = overlapped(world, "a", "b", kind=kind, save=True, checkpoint={"save_interval": 3})
    again = killed_at_8(world, plan)
    results = values(world.run(again))
    assert [ran.resumed.iteration for ran in results] == [6, 6]
    assert tuple(ran.digest for ran in results) == reference(2)
    assert world.events("joined") == []


def very_late(training: Training) -> None:
    late(training, 1.0)


def test_training_is_told_to_have_waited_where_it_did(world: World) -> None:
    (first, _) = values(world.run(overlapped(world, "a", "b", make=very_late)))
    joined = world.events("joined", rank=0)
    assert [each["iteration"] for each in joined] == [3, 6, 9, 12]
    assert all(each["waited_s"] > 0.1 for each in joined), "a step takes no time beside the late copy"
    assert first.status["stall_s"][0] >= joined[0]["waited_s"]


def write_unseen(training: Training) -> None:
    for parameter in training.model.parameters():
        parameter.data.add_(1.0)


def test_a_writer_that_no_hook_sees_costs_one_save_and_overlapping(world: World) -> None:
    whole = {"non_persistent_local_ckpt_algo": "atomic"}  # else each rank looks after the part that it stores
    plan = overlapped(world, "a", "b", every=2, checkpoint=whole, acts=(Act(2, write_unseen),))
    results = values(world.run(plan))
    assert [ran.status["failed_saves"] for ran in results] == [1, 1]
    assert [each["iteration"] for each in results[0].status["saves"]] == [10, 12]
    for rank in (0, 1):
        (failed,) = world.events("save_failed", rank=rank)
        assert "changed between the boundary and the optimizer's next step" in failed["error"]
        said = [each["what"] for each in world.events("warning", rank=rank)]
        assert sum("snapshots are eager from now on" in what for what in said) == 1


def test_a_requested_stop_and_a_failing_loop_end_in_order(world: World) -> None:
    plan = overlapped(world, "a", "b", every=1)
    outcomes = world.run(replace(plan, acts=(Act(4, stop, rank=0),)))
    assert {outcome.error for outcome in outcomes} == {"StoppedExit"}
    outcomes = world.run(replace(plan, acts=(Act(8, fail),), seed=1))
    assert {outcome.error for outcome in outcomes} == {"RuntimeError"}
    results = values(world.run(replace(plan, seed=2)))
    assert all(ran.resumed.iteration >= 6 for ran in results)
    assert tuple(ran.digest for ran in results) == reference(2)


def unhealthy_at_3(training: Training) -> None:
    late(training)
    training.healthy = lambda: training.trainer.iteration != 3 or training.rank != 1


def test_a_rank_that_is_not_healthy_fails_the_save_that_is_still_copied(world: World) -> None:
    results = values(world.run(overlapped(world, "a", "b", make=unhealthy_at_3)))
    assert [ran.status["failed_saves"] for ran in results] == [1, 1]
    assert [each["iteration"] for each in results[0].status["saves"]] == [9, 12]


def test_it_is_refused_where_nothing_steps(world: World) -> None:
    outcomes = world.run(overlapped(world, "a", make=without_optimizer))
    assert outcomes[0].error == "ConfigError"
    assert "needs an optimizer" in outcomes[0].message


def without_optimizer(training: Training) -> None:
    training.optimizer = training.scheduler = None
