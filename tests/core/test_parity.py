"""Parity instead of replicas, on real ranks: what a clique loses is rebuilt bit for bit, and protected again."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resilience.planning.erasure import Code
from resilience.stores.digest import digest_of
from resilience.stores.records import decode_record, encode_record
from tests.core.training import Act, Plan, Ran, World, die, reference
from tests.ranks import killed, values

NODES = ("a", "b", "c", "d")


def with_parity(world: World, scheme: str, *nodes: str, kind: str = "local", **checkpoint: Any) -> Plan:
    """A clique of one rank on each of four nodes, unless told otherwise."""
    given = {"replication_factor": 4, **checkpoint}
    return world.plan(*(nodes or NODES), kind=kind, checkpoint=given, resiliency={"redundancy": scheme})


def interrupted(world: World, plan: Plan) -> Plan:
    """Run until every process is killed; iteration 6 is settled by then. The plan for the next attempt."""
    outcomes = world.run(replace(plan, settle=(6,), acts=(Act(8, die),)))
    assert all(killed(outcome) for outcome in outcomes), outcomes
    return replace(plan, seed=plan.seed + 1)


def ends_as_undisturbed(results: Sequence[Ran]) -> bool:
    return tuple(ran.digest for ran in results) == reference(len(results))


def parity_files(world: World, node: str, kind: str = "local") -> dict[int, list[Path]]:
    """By iteration: the parity files with a record in the node's own directory."""
    base = (world.disk if kind == "disk" else world.memory) / node
    found: dict[int, list[Path]] = {}
    for record in sorted((base / "run" / node).glob("iter_*/*/parity_*.json")):
        found.setdefault(int(record.parent.parent.name.removeprefix("iter_")), []).append(
            record.with_suffix(".safetensors")
        )
    return found


def flip(path: Path) -> None:
    """One bit of its P."""
    content = bytearray(path.read_bytes())
    content[Code(4, 1).header_bytes + 100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("scheme", "lost", "kind", "algorithm"),
    [
        ("xor", "b", "disk", "fully_parallel"),
        ("rs", "bc", "local", "atomic"),
        pytest.param("xor", "a", "local", "atomic", marks=pytest.mark.long),
        pytest.param("rs", "ad", "disk", "fully_parallel", marks=pytest.mark.long),
        pytest.param("rs", "cd", "in_memory", "fully_parallel", marks=pytest.mark.long),
    ],
)
def test_lost_nodes_of_a_clique_are_rebuilt_bit_for_bit_and_the_run_is_protected_again(
    world: World, scheme: str, lost: str, kind: str, algorithm: str
) -> None:
    """Twice in a row, the second time other nodes: what the first restart brought back carries the second."""
    again = interrupted(world, with_parity(world, scheme, kind=kind, non_persistent_local_ckpt_algo=algorithm))
    for node in NODES:
        assert list(world.copies(node, kind)[6].values()) == ["primary"], "nobody holds replicas"
        assert len(parity_files(world, node, kind)[6]) == 1
    for node in lost:
        world.lose(node)
    results = values(world.run(replace(again, steps=7)))  # no save is made: what is there was brought back
    assert {ran.resumed.iteration for ran in results} == {6}
    resumed = results[0].resumed
    assert (resumed.own_copies + resumed.replica_copies > 0, resumed.rebuilt) == (True, len(lost))
    for node in NODES:
        assert list(world.copies(node, kind)[6].values()) == ["primary"], "what was fetched for the load only is gone"
        assert len(parity_files(world, node, kind)[6]) == 1
    others = [node for node in NODES if node not in lost][-len(lost) :]
    for node in others:
        world.lose(node)
    results = values(world.run(again))
    assert results[0].resumed.rebuilt == len(lost)
    assert ends_as_undisturbed(results)


@pytest.mark.long
def test_parity_is_deleted_with_its_save_and_its_buffers_are_used_again(world: World) -> None:
    plan = replace(with_parity(world, "rs"), steps=21)
    values(world.run(plan))
    for node in NODES:
        assert set(parity_files(world, node)) == set(world.copies(node)) == {18, 21}
        arenas = list((world.memory / node / "run" / node / ".arenas").iterdir())
        assert arenas == [], "free buffers go at the end, committed files stay"
    again = replace(plan, steps=30, seed=1)
    results = values(world.run(again))
    assert results[0].resumed.iteration == 21
    for node in NODES:
        assert set(parity_files(world, node)) == {27, 30}, "also what the earlier attempt left"
    used = [event for event in world.events("protected") if event.get("iteration")]
    assert {event["iteration"] for event in used} >= {3, 6, 9, 27, 30}


def test_a_bad_primary_on_a_node_that_lives_is_rebuilt_where_it_lies(world: World) -> None:
    again = interrupted(world, with_parity(world, "xor"))
    before = world.shard("c", 6, 2).read_bytes()
    world.damage("c", 6, 2)
    results = values(world.run(replace(again, steps=7)))
    assert {ran.resumed.iteration for ran in results} == {6}
    assert results[0].resumed.rebuilt == 1
    assert world.shard("c", 6, 2).read_bytes() == before


def consistent_lie(path: Path) -> None:
    """Other bytes, and a record that fits them: only the owner's digest tells that what it rebuilds is wrong."""
    flip(path)
    record = decode_record(path.with_suffix(".json").read_bytes())
    path.with_suffix(".json").write_bytes(encode_record(replace(record, digest=digest_of(path.read_bytes()))))


@pytest.mark.parametrize(
    ("scheme", "spoil", "iteration"),
    [
        ("rs", flip, 6),
        ("xor", consistent_lie, 3),
        pytest.param("xor", flip, 3, marks=pytest.mark.long),
        pytest.param("rs", consistent_lie, 3, marks=pytest.mark.long),
    ],
)
def test_bad_parity_is_struck_off_and_the_next_way_is_taken(
    world: World, scheme: str, spoil: Callable[[Path], None], iteration: int
) -> None:
    """Of `rs` the other parity, else an older save; never a wrong shard. And then there is good parity again.

    Where a sum is wrong although each file is what its record says, nobody knows which one lies: all parity in it goes.
    """
    again = interrupted(world, with_parity(world, scheme, kind="disk"))
    world.lose("b")
    (bad,) = parity_files(world, "d", "disk")[6]  # P of a row that has a stripe of b
    spoil(bad)
    results = values(world.run(replace(again, steps=7)))
    assert {ran.resumed.iteration for ran in results} == {iteration}
    assert results[0].resumed.rebuilt == 1
    again = replace(again, seed=2)
    world.lose("c")
    results = values(world.run(again))
    assert ends_as_undisturbed(results)


@pytest.mark.long
def test_two_ranks_a_node_and_a_spare_in_place_of_a_lost_one(world: World) -> None:
    nodes = ("a", "a", "b", "b", "c", "c")
    plan = with_parity(world, "rs", *nodes, replication_factor=3)
    again = interrupted(world, plan)
    assert len(parity_files(world, "b")[6]) == 2
    world.lose("a")
    world.lose("c")
    results = values(world.run(replace(again, nodes=("d", "d", "b", "b", "e", "e"))))
    assert {ran.resumed.iteration for ran in results} == {6}
    assert results[0].resumed.rebuilt == 4
    assert set(parity_files(world, "e")) == {9, 12}
    assert ends_as_undisturbed(results)


@pytest.mark.long
def test_with_fewer_nodes_left_the_cliques_change_and_what_they_survive_is_told(world: World) -> None:
    again = interrupted(world, with_parity(world, "rs"))
    world.lose("d")
    results = values(world.run(replace(again, nodes=("a", "b", "c", "c"), steps=10)))
    assert {ran.resumed.iteration for ran in results} == {6}
    warnings = [json.dumps(event) for event in world.events("warning")]
    assert any("survives the loss of 1 of 2" in text for text in warnings), warnings
    world.lose("c")
    results = values(world.run(replace(again, nodes=("a", "b", "e", "e"), seed=2)))
    assert {ran.resumed.iteration for ran in results} == {9}
    assert results[0].resumed.rebuilt == 2
    assert ends_as_undisturbed(results)


@pytest.mark.long
@pytest.mark.parametrize(("before", "after"), [("replica", "rs"), ("rs", "replica"), ("xor", "rs")])
def test_another_scheme_than_before_goes_on_from_what_is_there(world: World, before: str, after: str) -> None:
    again = interrupted(world, with_parity(world, before))
    world.lose("b")
    changed = replace(again, resiliency={"redundancy": after})
    results = values(world.run(replace(changed, steps=7)))
    assert {ran.resumed.iteration for ran in results} == {6}
    for node in "ac":
        world.lose(node)
    results = values(world.run(replace(changed, seed=2)))
    assert {ran.resumed.iteration for ran in results} == {6}, "protected as the new scheme does it, before any save"
    assert ends_as_undisturbed(results)
    for node in NODES:
        assert bool(parity_files(world, node)) == (after != "replica")
