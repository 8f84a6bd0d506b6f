"""`replicas_from="live"`: what ranks have in common does not travel, and the digest decides whether they have it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.core.training import Act, Training, World, die, reference
from tests.ranks import killed, values

LIVE = {"replicas_from": "live"}
STEPS = 18


def large(training: Training) -> None:
    """A model of some megabytes, beside which headers, counters and random state are little."""
    torch.manual_seed(7)
    training.model.add_module("large", nn.Linear(700, 700))
    training.optimizer.add_param_group({"params": list(training.model.large.parameters())})
    torch.manual_seed(1000 * training.plan.seed + training.rank)


def traffic(world: World, rank: int) -> dict[int, tuple[int, int]]:
    """By iteration: what a rank sent of its shard, and what it need not send."""
    told = world.events("protected", rank=rank)
    return {each["iteration"]: (each["sent_bytes"], each["spared_bytes"]) for each in told if "sent_bytes" in each}


@pytest.mark.parametrize("kind", ["local", "disk"])
@pytest.mark.parametrize("algorithm", ["fully_parallel", "atomic"])
def test_a_data_parallel_job_s_saves_cost_no_network_and_a_lost_node_comes_back(
    world: World, kind: str, algorithm: str
) -> None:
    options = {"non_persistent_local_ckpt_algo": algorithm}
    plan = world.plan("a", "b", kind=kind, steps=STEPS, make=large, resiliency=LIVE, checkpoint=options)
    outcomes = world.run(replace(plan, settle=(15,), acts=(Act(16, die),)))
    assert all(map(killed, outcomes)), outcomes
    for rank in (0, 1):
        moved = traffic(world, rank)
        nbytes = world.shard("ab"[rank], 15, rank, kind).stat().st_size
        assert moved[3] == (nbytes, 0), "the first shard comes whole, and shows how those to come are laid out"
        for sent, spared in list(moved.values())[1:]:
            assert sent + spared == nbytes
            assert sent < nbytes / 10
        assert len(moved) == 5
    world.lose("b")
    results = values(world.run(replace(plan, seed=1)))
    assert [ran.resumed.iteration for ran in results] == [15, 15]
    assert tuple(ran.digest for ran in results) == reference(2, STEPS, large)


def test_replicas_of_three_ranks_are_composed_on_both_other_nodes(world: World) -> None:
    options = {"replication_factor": 3}
    plan = world.plan("a", "b", "c", steps=STEPS, make=large, resiliency=LIVE, checkpoint=options)
    outcomes = world.run(replace(plan, settle=(15,), acts=(Act(16, die),)))
    assert all(map(killed, outcomes)), outcomes
    sent, spared = traffic(world, 2)[15]
    assert sent < (sent + spared) / 5
    world.lose("a")
    world.lose("c")
    results = values(world.run(replace(plan, seed=1)))
    assert {ran.resumed.iteration for ran in results} == {15}
    assert tuple(ran.digest for ran in results) == reference(3, STEPS, large)


def drift(training: Training) -> None:
    """A weight that all ranks are said to have in common is another one here from now on."""
    with torch.no_grad():
        training.model.large.weight[650, 650] += 1.0


def test_a_difference_is_found_by_digest_fails_the_next_save_and_is_stored_per_rank_from_then_on(world: World) -> None:
    plan = world.plan(
        "a", "b", steps=STEPS, make=large, resiliency=LIVE, settle=(6, 9, 12, 15), acts=(Act(7, drift, 1),)
    )
    results = values(world.run(plan))
    failed = {each["iteration"] for each in world.events("save_failed")}
    assert failed <= {9, 12}
    assert failed, "one save does not count"
    assert not [each for each in world.events("protected") if each["iteration"] in {9} | failed]
    (told,) = {tuple(each["keys"]) for each in world.events("unequal_items")}
    assert any("large.weight" in key for key in told)
    assert world.events("protected", iteration=18, rank=1), "and saves go on"
    again = values(world.run(replace(plan, seed=1, acts=(), settle=())))
    assert [ran.resumed.iteration for ran in again] == [18, 18]
    assert [ran.digest for ran in again] == [ran.digest for ran in results], "each rank has its own again"


def grow(training: Training) -> None:
    """The layout changes: a parameter is new."""
    torch.manual_seed(9)
    training.model.add_module("more", nn.Linear(300, 300))
    training.optimizer.add_param_group({"params": list(training.model.more.parameters())})


def test_shards_of_a_new_layout_come_whole_until_it_is_known_and_has_slots(world: World) -> None:
    plan = world.plan("a", "b", steps=STEPS, make=large, resiliency=LIVE, settle=(6, 9, 12, 15), acts=(Act(7, grow),))
    values(world.run(plan))
    moved: dict[int, Any] = traffic(world, 0)
    whole = [iteration for iteration, (_, spared) in moved.items() if spared == 0]
    assert whole[0] == 3
    assert whole[1:] in ([12], [12, 15]), f"once for the layout, perhaps once for a slot: {moved}"
    assert moved[18][1] > moved[18][0]
