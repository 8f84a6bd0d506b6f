"""What a job survives, on real ranks: after each of these the run ends with the bits of an undisturbed one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.core.training import Act, Plan, Ran, Training, World, die, reference
from tests.ranks import killed, values

KILL_ALL_AT_8 = (Act(8, die),)


def interrupted(world: World, plan: Plan, acts: tuple[Act, ...] = KILL_ALL_AT_8) -> Plan:
    """Run until every process is killed; iteration 6 is settled by then. The plan for the next attempt."""
    outcomes = world.run(replace(plan, settle=(6,), acts=acts))
    assert all(killed(outcome) for outcome in outcomes), outcomes
    return replace(plan, seed=plan.seed + 1)  # what is not restored differs


def ends_as_undisturbed(results: Sequence[Ran]) -> bool:
    return tuple(ran.digest for ran in results) == reference(len(results))


@pytest.mark.parametrize(("kind", "tier"), [("local", "local"), ("disk", "local"), ("in_memory", "in_memory")])
def test_a_job_of_one_process_that_is_killed_resumes_bit_for_bit(world: World, kind: str, tier: str) -> None:
    again = interrupted(world, world.plan("a", kind=kind))
    (ran,) = values(world.run(again))
    assert (ran.resumed.iteration, ran.resumed.tier, ran.resumed.generation) == (6, tier, 1)
    assert ends_as_undisturbed([ran])


def test_a_save_on_a_disk_survives_the_reboot_of_its_node(world: World) -> None:
    again = interrupted(world, world.plan("a", kind="disk"))
    shutil.rmtree(world.memory)  # what a reboot takes: arenas, and whatever else lay in memory
    (ran,) = values(world.run(again))
    assert (ran.resumed.iteration, ran.resumed.tier) == (6, "local")
    assert ends_as_undisturbed([ran])


def test_a_process_without_torch_distributed_resumes_as_well(world: World) -> None:
    again = interrupted(world, world.plan("a"))
    (ran,) = values(world.run(again, distributed=False))
    assert ran.resumed.iteration == 6
    assert ends_as_undisturbed([ran])


@pytest.mark.parametrize("kind", ["local", "disk", "in_memory"])
@pytest.mark.parametrize("algorithm", ["fully_parallel", "atomic"])
def test_a_lost_node_is_recovered_from_its_peer_and_protected_again(world: World, kind: str, algorithm: str) -> None:
    plan = world.plan("a", "b", kind=kind, checkpoint={"non_persistent_local_ckpt_algo": algorithm})
    again = interrupted(world, plan)
    assert world.copies("b", kind)[6] == {0: "replica", 1: "primary"}
    world.lose("b")
    first, second = values(world.run(replace(again, steps=7)))  # no save is made: what is there was brought back
    assert first.resumed.iteration == second.resumed.iteration == 6
    assert first.resumed.retrieved_bytes > 0
    assert world.copies("b", kind)[6] == {0: "replica", 1: "primary"}, "the node that came empty is protected again"
    world.lose("a")
    assert ends_as_undisturbed(values(world.run(again)))


def test_ranks_that_moved_to_other_nodes_find_their_shards(world: World) -> None:
    again = interrupted(world, world.plan("a", "b"))
    results = values(world.run(replace(again, nodes=("b", "a"))))
    assert [ran.resumed.iteration for ran in results] == [6, 6]
    assert results[0].resumed.retrieved_bytes == 0, "each node holds a replica of what its new rank needs"
    assert ends_as_undisturbed(results)


def test_a_spare_takes_the_place_of_a_lost_node(world: World) -> None:
    again = interrupted(world, world.plan("a", "b"))
    world.lose("a")
    results = values(world.run(replace(again, nodes=("c", "b"))))
    assert results[0].resumed.iteration == 6
    assert world.copies("c")[12] == {0: "primary", 1: "replica"}
    assert ends_as_undisturbed(results)


def test_four_ranks_on_two_nodes_survive_the_loss_of_one(world: World) -> None:
    plan = world.plan("a", "a", "b", "b", checkpoint={"replication_jump": 2})
    again = interrupted(world, plan)
    assert world.copies("a")[6] == {0: "primary", 1: "primary", 2: "replica", 3: "replica"}
    world.lose("a")
    results = values(world.run(again))
    assert {ran.resumed.iteration for ran in results} == {6}
    assert ends_as_undisturbed(results)


def test_with_factor_three_two_of_three_nodes_may_be_lost(world: World) -> None:
    again = interrupted(world, world.plan("a", "b", "c", checkpoint={"replication_factor": 3}))
    world.lose("a")
    world.lose("c")
    results = values(world.run(again))
    assert {ran.resumed.iteration for ran in results} == {6}
    assert ends_as_undisturbed(results)


def test_two_faults_in_a_row_are_survived(world: World) -> None:
    again = interrupted(world, world.plan("a", "b", steps=18))
    world.lose("b")
    outcomes = world.run(replace(again, settle=(12,), acts=(Act(13, die),)))
    assert all(killed(outcome) for outcome in outcomes)
    world.lose("a")
    results = values(world.run(replace(again, seed=2)))
    assert (results[0].resumed.iteration, results[0].resumed.generation) == (12, 2)
    assert tuple(ran.digest for ran in results) == reference(2, 18)


def test_ranks_that_killed_one_peer_end_within_a_bound_and_resume(world: World) -> None:
    plan = world.plan("a", "b", settle=(6,), acts=(Act(8, die, rank=1),))
    first, second = world.run(plan)
    assert killed(second)
    assert first.error not in ("", "TimeoutError"), "a rank cannot go on alone, and ends by itself"
    results = values(world.run(replace(plan, settle=(), acts=(), seed=1)))
    assert results[0].resumed.iteration == 6
    assert ends_as_undisturbed(results)


@pytest.mark.parametrize("kind", ["global", None])
def test_saves_on_shared_storage_are_resumed_from(world: World, kind: str | None) -> None:
    options = {} if kind else {"save_interval": 3}
    again = interrupted(world, world.plan("a", "b", kind=kind, save=True, checkpoint=options))
    world.lose("a")
    world.lose("b")
    results = values(world.run(again))
    assert (results[0].resumed.iteration, results[0].resumed.tier) == (6, "global" if kind else "persistent")
    assert ends_as_undisturbed(results)
    assert (world.disk / "save" / "iter_0000012").is_dir(), "the last persistent save is made when the loop completes"


def test_persistent_and_local_due_together_share_one_snapshot(world: World) -> None:
    plan = world.plan("a", "b", save=True, checkpoint={"save_interval": 6})
    again = interrupted(world, plan)
    snapshots = [event for event in world.events("snapshot", rank=0) if event["iteration"] == 6]
    assert [(event["kind"], event["tiers"]) for event in snapshots] == [("both", ["local", "persistent"])]
    world.lose("a")
    world.lose("b")
    results = values(world.run(again))
    assert (results[0].resumed.iteration, results[0].resumed.tier) == (6, "persistent")
    assert ends_as_undisturbed(results)


@pytest.mark.parametrize(("before", "after"), [("disk", "off disk"), ("off disk", "disk")])
@pytest.mark.parametrize("lost", ["", "b"])
def test_saves_of_the_type_that_was_configured_before_are_found(
    world: World, before: str, after: str, lost: str
) -> None:
    again = interrupted(world, world.plan("a", "b", kind=before))
    if lost:
        world.lose(lost)
    results = values(world.run(replace(again, kind=after)))
    assert (results[0].resumed.iteration, results[0].resumed.tier) == (6, "local" if before == "disk" else "in_memory")
    assert ends_as_undisturbed(results)
    kind, gone = ("disk", "in_memory") if after == "disk" else ("in_memory", "disk")
    assert set(world.copies("a", kind)) == {9, 12}
    assert set(world.copies("a", gone)) == set(), "what the type before left goes when there are newer saves"


def test_a_node_that_goes_by_another_name_now_finds_what_it_wrote_under_the_old_one(world: World) -> None:
    again = interrupted(world, world.plan("a", "b"))
    (world.memory / "a").rename(world.memory / "renamed")
    results = values(world.run(replace(again, nodes=("renamed", "b"))))
    assert results[0].resumed.iteration == 6
    assert ends_as_undisturbed(results)
    assert list((world.memory / "renamed" / "run" / "a").glob("iter_*")) == [], "nobody else will ever delete it"


# -- the ways in which people train ------------------------------------------------------------------------------------


def with_ddp(training: Training) -> None:
    """As it is: hooks average the gradients. `find_unused_parameters` keeps its buckets, and so the order of sums."""
    training.model = nn.parallel.DistributedDataParallel(training.model, find_unused_parameters=True)
    training.plan = replace(training.plan, nodes=(training.node,))  # nothing to average by hand


def with_fsdp(training: Training) -> None:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Dropout(0.2), nn.Linear(9, 1))
    fully_shard(model[0])
    training.model = fully_shard(model)
    training.optimizer = torch.optim.AdamW(training.model.parameters(), lr=0.05)
    training.scheduler = torch.optim.lr_scheduler.StepLR(training.optimizer, 5, 0.5)
    training.plan = replace(training.plan, nodes=(training.node,))


def with_two_optimizers_and_no_loader(training: Training) -> None:
    up, down = training.model.up.parameters(), training.model.down.parameters()
    training.optimizer = [torch.optim.SGD(up, 0.1, momentum=0.9), torch.optim.Adam(down, 0.1)]
    training.scheduler, training.loader = None, None

    def step(number: int) -> None:
        batch = torch.randn(5, 6, generator=torch.Generator().manual_seed(number))
        training.model(batch).square().mean().backward()
        for optimizer in training.optimizer:
            optimizer.step()
            optimizer.zero_grad()

    training.step = step  # type: ignore[assignment, method-assign]


@pytest.mark.parametrize("make", [with_ddp, with_fsdp, with_two_optimizers_and_no_loader])
def test_every_way_of_training_survives_the_loss_of_a_node(world: World, make: Callable[[Training], None]) -> None:
    again = interrupted(world, world.plan("a", "b", make=make))
    world.lose("a")
    results = values(world.run(again))
    assert [ran.resumed.iteration for ran in results] == [6, 6]
    assert tuple(ran.digest for ran in results) == reference(2, 12, make)
