"""Every rank gets every shard it needs: from its own node where that has it, else spread over the holders."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.errors import SourceUnavailableError
from resilience.planning.decision import Candidate, Decision, Strike
from resilience.planning.inventory import Inventory, NodeSave, Tier
from resilience.planning.retrieval import RetrievalPlan, plan_retrieval
from tests.planning.world import RUN, digest_of, node_save, pair, save, sources

WHICH = save(40)


def elected(tier: Tier = "in_memory") -> Decision:
    return Decision("", 2, Candidate(WHICH, tier, "node", "", RUN, 0))


def plan(
    copies: list[NodeSave],
    nodes: list[str],
    needs: dict[str, list[int]] | None = None,
    strikes: list[Strike] | None = None,
) -> RetrievalPlan:
    return plan_retrieval(elected(), sources(*copies), nodes=nodes, needs=needs, strikes=strikes or [])


def test_a_node_that_kept_its_copies_fetches_nothing() -> None:
    made = plan(list(pair(WHICH, world=4)), ["n0", "n1", "n2", "n3"])
    assert made.fetches == ()
    assert [(copy.node, copy.owner) for copy in made.local] == [("n0", 0), ("n1", 1), ("n2", 2), ("n3", 3)]


def test_a_spare_that_came_empty_fetches_from_the_holder_of_the_replica() -> None:
    survivors = [each for each in pair(WHICH, world=4) if each.node_id != "n1"]
    made = plan(survivors, ["n0", "spare", "n2", "n3"])
    (fetch,) = made.fetches
    assert (fetch.owner, fetch.from_node, fetch.from_rank, fetch.to_node, fetch.to_rank) == (1, "n2", 2, "spare", 1)
    assert fetch.digest == digest_of(1, WHICH)


def test_ranks_that_moved_find_their_shards_by_owner_and_not_by_place() -> None:
    made = plan(list(pair(WHICH, world=2)), ["n1", "n0"])
    assert made.fetches == ()
    assert [(copy.node, copy.owner) for copy in made.local] == [("n0", 1), ("n1", 0)]


def test_a_directory_left_by_an_earlier_name_of_the_node_is_read_in_place() -> None:
    old = [node_save("old-name", WHICH, [0], own=[0], world=1)]
    made = plan_retrieval(elected(), [Inventory("new-name", tuple(old))], nodes=["new-name"])
    assert [(copy.node, copy.node_dir) for copy in made.local] == [("new-name", "old-name")]


def test_the_cheaper_tier_of_the_own_node_is_read() -> None:
    on_disk = node_save("n0", WHICH, [0], own=[0], world=1, tier="local")
    in_memory = node_save("old-name", WHICH, [0], own=[0], world=1, tier="in_memory")
    made = plan_retrieval(elected(), [Inventory("n0", (on_disk, in_memory))], nodes=["n0"])
    assert [(copy.tier, copy.node_dir) for copy in made.local] == [("in_memory", "old-name")]


def test_a_struck_copy_is_neither_read_nor_sent() -> None:
    strikes = [Strike("n0", "in_memory", WHICH, 0)]
    (fetch,) = plan(list(pair(WHICH, world=2)), ["n0", "n1"], strikes=strikes).fetches
    assert (fetch.from_node, fetch.to_node) == ("n1", "n0")


def test_many_missing_shards_are_spread_over_all_holders_and_all_ranks() -> None:
    """Eight shards are missing on one node, and four nodes hold all of them, with two ranks each."""
    holders = [node_save(f"n{i}", WHICH, range(8), world=16) for i in range(1, 5)]
    rest = [node_save(f"n{i}", WHICH, [6 + 2 * i, 7 + 2 * i], world=16) for i in range(1, 5)]
    nodes = ["n0"] * 8 + [f"n{i}" for i in range(1, 5) for _ in range(2)]
    made = plan([*holders, *rest], nodes)
    assert Counter(fetch.from_node for fetch in made.fetches) == dict.fromkeys(("n1", "n2", "n3", "n4"), 2)
    assert Counter(fetch.from_rank for fetch in made.fetches) == dict.fromkeys(range(8, 16), 1)
    assert sorted(fetch.to_rank for fetch in made.fetches) == list(range(8))


def test_a_shard_that_several_ranks_of_a_node_need_is_fetched_once() -> None:
    copies = [node_save("n0", WHICH, [0, 1], own=[0, 1], world=4), node_save("n1", WHICH, [2, 3], own=[2, 3], world=4)]
    needs = {"n0": [0, 1, 2, 3], "n1": [0, 1, 2, 3]}
    made = plan(copies, ["n0", "n0", "n1", "n1"], needs)
    assert sorted((fetch.owner, fetch.to_node) for fetch in made.fetches) == [
        (0, "n1"),
        (1, "n1"),
        (2, "n0"),
        (3, "n0"),
    ]
    assert Counter(each.rank for each in made.verify) == dict.fromkeys(range(4), 2)


def test_a_rank_that_fetches_is_given_less_to_verify() -> None:
    copies = [node_save("n0", WHICH, [2], world=4), node_save("n1", WHICH, [0, 1, 2, 3], world=4)]
    made = plan(copies, ["n0", "n0", "n1", "n1"], needs={"n0": [0, 2]})
    assert [(each.owner, each.rank) for each in made.verify] == [(0, 0), (2, 1)]


def test_a_shard_held_only_where_no_rank_runs_cannot_be_fetched() -> None:
    with pytest.raises(SourceUnavailableError, match="rank 1"):
        plan(list(pair(WHICH, world=2)), ["n0", "n0"], needs={"n0": [1]}, strikes=[Strike("n0", "in_memory", WHICH, 1)])


def test_nothing_is_planned_for_a_fresh_start_or_a_shared_folder() -> None:
    assert plan_retrieval(Decision("", 1, fresh=True), [], nodes=["n0"]) == RetrievalPlan()
    folder = Decision("", 1, Candidate(WHICH, "persistent", "shared", "save", RUN, 0))
    assert plan_retrieval(folder, [], nodes=["n0"]) == RetrievalPlan()


@st.composite
def clusters(draw: st.DrawFn) -> tuple[list[NodeSave], list[str], dict[str, list[int]]]:
    """A complete save, spread at random over the nodes, and random needs."""
    world = draw(st.integers(1, 8))
    names = [f"n{i}" for i in range(draw(st.integers(1, world)))]
    nodes = [*names, *draw(st.lists(st.sampled_from(names), min_size=world - len(names), max_size=world - len(names)))]
    held: dict[str, set[int]] = {name: set() for name in names}
    for owner in range(world):
        for name in draw(st.sets(st.sampled_from(names), min_size=1)):
            held[name].add(owner)
    copies = [node_save(name, WHICH, sorted(owners), world=world) for name, owners in held.items() if owners]
    needs = {name: sorted(draw(st.sets(st.integers(0, world - 1)))) for name in names}
    return copies, nodes, needs


@given(clusters())
def test_every_need_is_met_once_by_a_holder_and_verified_once_on_the_node_that_uses_it(
    cluster: tuple[list[NodeSave], list[str], dict[str, list[int]]],
) -> None:
    copies, nodes, needs = cluster
    made = plan(copies, nodes, needs)
    holds = {(each.node_id, owner) for each in copies for owner in each.owners}
    met = [(copy.node, copy.owner) for copy in made.local] + [(fetch.to_node, fetch.owner) for fetch in made.fetches]
    wanted = sorted((node, owner) for node, owners in needs.items() for owner in owners)
    assert sorted(met) == wanted
    assert sorted((each.node, each.owner) for each in made.verify) == wanted
    assert all(nodes[each.rank] == each.node for each in made.verify)
    for copy in made.local:
        assert (copy.node_dir, copy.owner) in holds
    for fetch in made.fetches:
        assert (fetch.from_node, fetch.owner) in holds
        assert (fetch.to_node, fetch.owner) not in holds
        assert (nodes[fetch.from_rank], nodes[fetch.to_rank]) == (fetch.from_node, fetch.to_node)


@given(clusters(), st.integers())
def test_the_plan_does_not_depend_on_the_order_of_its_inputs(
    cluster: tuple[list[NodeSave], list[str], dict[str, list[int]]], seed: int
) -> None:
    copies, nodes, needs = cluster
    shuffled = list(copies)
    random.Random(seed).shuffle(shuffled)
    turned = {node: needs[node][::-1] for node in reversed(needs)}
    assert plan(copies, nodes, needs) == plan(shuffled, nodes, turned)
