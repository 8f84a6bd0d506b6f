"""Frozen weights travel once, not at every save, and a lost node comes back from what was put together: real ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from resilience.replication.clique import CliqueExchange
from tests.core.test_replication import break_the_link
from tests.core.training import RUN, Act, Training, World, die, reference
from tests.ranks import killed, values

STEPS = 24
SECRET = {"JOB_SECRET": "a secret of this job's ranks alone"}


def frozen(training: Training) -> None:
    """A large part that is not trained, as the base of an adapter, beside one of megabytes that is."""
    torch.manual_seed(7)
    base = nn.Linear(700, 700).requires_grad_(False)
    training.model.add_module("base", base)
    torch.manual_seed(1000 * training.plan.seed + training.rank)


def thaw(training: Training) -> None:
    with torch.no_grad():
        training.model.base.weight[3] += 1.0


def traffic(world: World, rank: int) -> dict[int, tuple[int, int]]:
    """By iteration: what a rank sent of its shard, and what it need not send."""
    told = world.events("protected", rank=rank)
    return {each["iteration"]: (each["sent_bytes"], each["spared_bytes"]) for each in told if "sent_bytes" in each}


CASES: list[Any] = [
    pytest.param("local", ("a", "b"), {}, {}, id="memory"),
    pytest.param("disk", ("a", "b"), {}, {}, id="disk"),
    pytest.param("local", ("a", "b"), {"snapshot_mode": "overlapped"}, {}, id="overlapped"),
    pytest.param("local", ("a", "b"), {"secret_env": "JOB_SECRET"}, {}, id="keyed"),
    pytest.param("local", ("a", "b", "c"), {}, {"replication_factor": 3}, id="three copies"),
    pytest.param("local", ("a", "b"), {}, {"non_persistent_local_ckpt_algo": "atomic"}, id="atomic"),
]


@pytest.mark.parametrize(("kind", "nodes", "resiliency", "checkpoint"), CASES)
def test_frozen_weights_are_not_sent_again_and_a_lost_node_comes_back_with_them(
    world: World, kind: str, nodes: tuple[str, ...], resiliency: dict[str, Any], checkpoint: dict[str, Any]
) -> None:
    plan = world.plan(*nodes, kind=kind, steps=STEPS, make=frozen, resiliency=resiliency, checkpoint=checkpoint)
    outcomes = world.run(replace(plan, settle=(21,), acts=(Act(22, die),)), env=SECRET)
    assert all(map(killed, outcomes)), outcomes
    for rank, node in enumerate(nodes):
        moved, nbytes = traffic(world, rank), world.shard(node, 21, rank, kind).stat().st_size
        copies = len(nodes) - 1
        assert moved[3] == (copies * nbytes, 0), "nobody has anything yet"
        sent, spared = moved[21]
        assert sent + spared == copies * nbytes
        assert spared > 0.8 * copies * nbytes, moved
    for node in nodes[1:]:
        world.lose(node)
    results = values(world.run(replace(plan, seed=1), env=SECRET))
    assert {ran.resumed.iteration for ran in results} == {21}
    assert tuple(ran.digest for ran in results) == reference(len(nodes), STEPS, frozen)


def test_what_is_not_frozen_after_all_is_sent_and_comes_back(world: World) -> None:
    plan = world.plan("a", "b", steps=27, make=frozen)
    outcomes = world.run(replace(plan, settle=(24,), acts=(Act(22, thaw), Act(25, die))))
    assert all(map(killed, outcomes)), outcomes
    moved = traffic(world, 0)
    assert moved[21][1] > 4 * moved[21][0]
    assert moved[24][0] > 4 * moved[21][0], "the half of the base that this rank stores was sent again"
    world.lose("b")
    results = values(world.run(replace(plan, seed=1)))
    assert {ran.resumed.iteration for ran in results} == {24}
    assert len({ran.digest for ran in results}) == 2  # each has its own batches
    undisturbed = world.plan("a", "b", kind=None, steps=27, make=frozen, acts=(Act(22, thaw),))
    alone = values(world.run(replace(undisturbed, resiliency={"events": None, "run_id": "alone"})))
    assert [ran.digest for ran in results] == [ran.digest for ran in alone]


def spoil_buffers(training: Training) -> None:
    """Flip a bit of the tensors in every buffer of this node that waits for the peer's next shard."""
    base = Path(training.plan.memory) / training.node / RUN
    spoiled = 0
    for path in (each for each in base.rglob("*.arena") if f"for_{1 - training.rank:05d}" in each.name):
        with path.open("r+b") as file:
            size = int.from_bytes(file.read(8), "little")
            if size == 0:
                continue  # never used
            header = json.loads(file.read(size))
            at = 8 + size + header["model/0/base.weight"]["data_offsets"][0] + 1000
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1]))
            spoiled += 1
    assert spoiled


def test_a_buffer_that_was_altered_costs_one_replica_and_is_filled_whole_the_next_time(world: World) -> None:
    plan = world.plan("a", "b", steps=36, make=frozen, settle=(21, 24, 27, 30, 33))
    values(world.run(replace(plan, acts=(Act(22, spoil_buffers, 1),))))
    protected = {each["iteration"] for each in world.events("protected", rank=1)}
    refused = [each for each in world.events("warning", rank=1) if "kept of iteration" in str(each["what"])]
    lacking = {each["iteration"] for each in world.events("complete", rank=0)} - protected
    assert refused, "what was altered was found"
    assert lacking, "and did not count"
    assert len(lacking) <= 3  # as many as there were buffers
    assert 36 in protected


def die_in_the_exchange_of_24(training: Training) -> None:
    """Rank 1 is gone when all that had to be sent of its shard was sent, and before it said what it is."""
    frozen(training)
    if training.rank == 0:
        return
    run = CliqueExchange.run

    def dying(self: CliqueExchange, offer: Any, inbox: Any) -> Any:
        if offer.save.iteration == 24:
            offer = replace(offer, digest=lambda: die(training))
        return run(self, offer, inbox)

    CliqueExchange.run = dying  # type: ignore[method-assign]


def test_a_peer_that_dies_while_little_is_sent_leaves_no_half_replica(world: World) -> None:
    settings = {"exchange_timeout_s": 5.0}
    plan = world.plan("a", "b", steps=27, make=die_in_the_exchange_of_24, settle=(23,), resiliency=settings)
    first, second = world.run(plan)
    assert killed(second)
    assert first.error in ("PeerLostError", "RuntimeError"), "whichever collective notices first"
    assert traffic(world, 1)[21][1] > 0, "it was under way by then"
    assert world.copies("a").get(24, {}).get(1) is None, "no replica of what was not announced"
    world.lose("b")
    results = values(world.run(replace(plan, make=frozen, settle=(), seed=1)))
    assert [ran.resumed.iteration for ran in results] == [21, 21]
    assert tuple(ran.digest for ran in results) == reference(2, 27, frozen)


def test_after_a_link_broke_shards_come_whole_once_more_and_then_little_again(world: World) -> None:
    acts = (Act(22, break_the_link, 0),)
    plan = world.plan("a", "b", steps=48, make=frozen, settle=(22, 24, 25, 26, 27, 30), acts=acts)
    results = values(world.run(plan))
    assert tuple(ran.digest for ran in results) == reference(2, 48, frozen)
    moved = traffic(world, 0)
    after = [iteration for iteration in moved if iteration > 24]
    assert moved[21][1] > 0
    assert moved[after[0]][1] == 0, "the new epoch's owner does not know what its older shards were like"
    assert moved[48][1] > moved[48][0]
