"""Promises 1 and 4: never resume from a wrong state, and a bad copy is never the end."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from resilience.stores.digest import digest_of
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.node_store import NodeStore
from resilience.stores.records import encode_record
from tests.core.training import RUN, Act, Plan, World, die, reference, train
from tests.ranks import killed, run_ranks, values

BOTH_AT_8 = (Act(8, die),)


def two_nodes_with_saves_at_3_and_6(world: World, **fields: object) -> Plan:
    plan = world.plan("a", "b", **fields)
    outcomes = world.run(replace(plan, settle=(6,), acts=BOTH_AT_8))
    assert all(map(killed, outcomes)), outcomes
    assert set(world.copies("a")) == set(world.copies("b")) == {3, 6}
    return replace(plan, seed=1)


def test_a_corrupted_primary_is_replaced_by_its_replica(world: World) -> None:
    again = two_nodes_with_saves_at_3_and_6(world)
    world.damage("b", 6, owner=1)
    results = values(world.run(replace(again, steps=7)))
    assert results[1].resumed.iteration == 6
    assert results[1].resumed.retrieved_bytes > 0, "it came from the other node"
    intact = world.shard("a", 6, owner=1)
    assert world.shard("b", 6, owner=1).read_bytes() == intact.read_bytes(), "the bad copy was replaced"
    assert tuple(ran.digest for ran in values(world.run(again))) == reference(2)


def test_with_primary_and_replica_corrupted_the_older_save_is_taken_and_the_reason_told(world: World) -> None:
    again = two_nodes_with_saves_at_3_and_6(world)
    world.damage("b", 6, owner=1)
    world.damage("a", 6, owner=1)
    results = values(world.run(again))
    assert [ran.resumed.iteration for ran in results] == [3, 3]
    (passed,) = (each for each in results[0].resumed.passed_over if each.iteration == 6)
    assert "failed to read or verify" in passed.reason
    assert tuple(ran.digest for ran in results) == reference(2)


def test_a_shard_of_one_save_is_never_mixed_with_those_of_another(world: World) -> None:
    """Every copy of one owner's newest shard is gone, an older one lies in its place: the whole older save is taken."""
    again = two_nodes_with_saves_at_3_and_6(world)
    for node in "ab":
        shutil.copyfile(world.shard(node, 3, owner=1), world.shard(node, 6, owner=1))
    results = values(world.run(again))
    assert [ran.resumed.iteration for ran in results] == [3, 3]
    assert tuple(ran.digest for ran in results) == reference(2)


@pytest.mark.parametrize("what", ["record", "truncated", "missing", "header"])
def test_a_torn_copy_is_passed_over(world: World, what: str) -> None:
    again = two_nodes_with_saves_at_3_and_6(world)
    shard = world.shard("b", 6, owner=1)
    if what == "record":
        record = shard.with_suffix(".json")
        record.write_bytes(record.read_bytes()[:-20])
    elif what == "truncated":
        shard.write_bytes(shard.read_bytes()[:-4096])
    elif what == "missing":
        shard.unlink()
    else:
        content = bytearray(shard.read_bytes())
        content[8:16] = b"[[[[[[[["
        shard.write_bytes(content)
    results = values(world.run(replace(again, steps=7)))
    assert results[1].resumed.iteration == 6
    assert results[1].resumed.retrieved_bytes > 0


def test_attempts_of_one_generation_number_never_mix(world: World) -> None:
    """Two starts that knew nothing of each other (each saw half of the nodes) both called themselves generation 1."""
    values(world.run(world.plan("a", "b", steps=6)))
    other = World(world.memory / "elsewhere", world.disk / "elsewhere")
    values(other.run(other.plan("a", "b", steps=6, seed=5)))
    first, second = world.saves("a")[-1], other.saves("a")[-1]
    assert (first.iteration, first.generation) == (second.iteration, second.generation) == (6, 1)
    assert first.attempt != second.attempt
    world.lose("b")
    # node a keeps the first attempt's shards of rank 0, node b has the second attempt's of rank 1
    _keep_owner(world.memory / "a", "a", owner=0)
    shutil.copytree(other.memory / "b", world.memory / "b")
    _keep_owner(world.memory / "b", "b", owner=1)
    outcomes = run_ranks(2, train, world.plan("a", "b", seed=1))
    assert [outcome.error for outcome in outcomes] == ["NoUsableSaveError", "NoUsableSaveError"]


def _keep_owner(base: Path, node: str, owner: int) -> None:
    for path in (base / RUN / node).glob("iter_*/*/rank_*"):
        if not path.name.startswith(f"rank_{owner:05d}-"):
            path.unlink()


def test_a_replica_whose_record_was_made_to_fit_altered_bytes_is_no_copy(world: World) -> None:
    """The owner's digest decides, also when the owner's own bytes turn out to be bad."""
    again = two_nodes_with_saves_at_3_and_6(world)
    world.damage("a", 6, owner=1)
    store = NodeStore(world.memory / "a", RUN, "a", "local", PosixFileSystem())
    location = store.reader.locate(store.reader.inventory(["a"]).node_saves[-1].save, 1, 2, "a")
    forged = replace(location.record, digest=digest_of(location.path.read_bytes()))
    location.path.with_suffix(".json").write_bytes(encode_record(forged))
    world.damage("b", 6, owner=1)
    results = values(world.run(again))
    assert [ran.resumed.iteration for ran in results] == [3, 3]
    assert tuple(ran.digest for ran in results) == reference(2)


def test_leftovers_of_another_run_with_a_higher_iteration_are_never_elected(world: World) -> None:
    values(world.run(world.plan("a", "b", steps=18, resiliency={"run_id": "other"})))
    assert (world.memory / "a" / "other" / "a" / "iter_0000018").is_dir()
    again = two_nodes_with_saves_at_3_and_6(world)
    results = values(world.run(again))
    assert [ran.resumed.iteration for ran in results] == [6, 6]
    assert (world.memory / "a" / "other" / "a" / "iter_0000018").is_dir(), "nor deleted"


def test_a_rolled_back_run_does_not_go_forward_to_what_it_left(world: World) -> None:
    """A fork to iteration 3, killed before it saved anything, restarts from 3 and not from the abandoned 9."""
    plan = world.plan("a", "b", save=True, checkpoint={"save_interval": 3})
    outcomes = world.run(replace(plan, settle=(9,), acts=(Act(10, die),)))
    assert all(map(killed, outcomes))
    fork = replace(
        plan,
        seed=1,
        checkpoint={**plan.checkpoint, "load": f"{world.disk}/save", "ckpt_step": 3},
        resiliency={"fork_id": "back-to-3"},
    )
    outcomes = world.run(replace(fork, acts=(Act(4, die),)))
    assert all(map(killed, outcomes))
    results = values(world.run(fork))
    assert results[0].resumed.iteration == 3
    assert "abandoned" in str(results[0].resumed.passed_over)
    assert tuple(ran.digest for ran in results) == reference(2)


def test_a_save_that_not_every_rank_committed_is_not_elected(world: World) -> None:
    again = two_nodes_with_saves_at_3_and_6(world)
    for node in "ab":
        shard = world.shard(node, 6, owner=1)
        shard.with_suffix(".json").unlink()
    results = values(world.run(again))
    assert [ran.resumed.iteration for ran in results] == [3, 3]
    assert {(save.iteration, save.generation) for save in world.saves("a")} == {(9, 2), (12, 2)}, "it goes, once left"
