"""Election, retrieval and placement with parity: what is left decides, and equal inputs give equal plans."""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.errors import ConfigError, SourceUnavailableError
from resilience.planning.copies import copy_table, holdings_of
from resilience.planning.decision import Decision, ElectionPolicy, Strike
from resilience.planning.erasure import Code
from resilience.planning.inventory import Inventory, NodeSave, ParityCopy, ParityCover, SaveId
from resilience.planning.kept import standing_of
from resilience.planning.parity_topology import make_parity_topology, tolerance
from resilience.planning.restore_plan import plan_restore
from resilience.planning.retrieval import plan_retrieval
from resilience.planning.schemes import SCHEMES
from resilience.planning.topology import Topology
from resilience.planning.wire import inventories_from_json, inventories_to_json
from tests.planning.world import RUN, decide, digest_of, node_save, save, sources

AT = save(40)
NODES = tuple(f"n{rank}" for rank in range(8))


def sizes_of(rank: int) -> int:
    return 1000 + 10 * rank


def clique_save(clique: tuple[int, ...], parities: int, which: SaveId = AT, world: int = 8) -> list[NodeSave]:
    """One rank per node: each node has its own shard and its parity of the clique."""
    nbytes = tuple(sizes_of(rank) for rank in clique)
    cover = ParityCover(parities, clique, nbytes, tuple(digest_of(rank, which) for rank in clique))
    size = Code(len(clique), parities).file_bytes(max(nbytes))
    return [
        dataclasses.replace(
            node_save(f"n{rank}", which, [rank], own=[rank], world=world, nbytes=sizes_of(rank)),
            parity=(ParityCopy(cover, index, size, f"parity-{which.iteration}-{rank}"),),
        )
        for index, rank in enumerate(clique)
    ]


def two_cliques(parities: int, which: SaveId = AT) -> list[NodeSave]:
    return [*clique_save((0, 2, 4, 6), parities, which), *clique_save((1, 3, 5, 7), parities, which)]


def on_nodes(held: list[NodeSave], nodes: tuple[str, ...] = NODES) -> list[Inventory]:
    there = sources(*held)
    return [*there, *(Inventory(node) for node in nodes if node not in {each.source for each in there})]


def elected(inventories: list[Inventory], strikes: tuple[Strike, ...] = ()) -> Decision:
    return decide(inventories, strikes=strikes, world=8)


@pytest.mark.parametrize("parities", [1, 2])
def test_a_save_is_complete_as_long_as_each_clique_lost_no_more_than_its_parity_makes_up_for(parities: int) -> None:
    held = two_cliques(parities)
    for count in range(1, 5):
        for lost in itertools.combinations(range(8), count):
            left = [each for each in held if each.owners[0] not in lost]
            worst = max(Counter(rank % 2 for rank in lost).values())
            assert (elected(on_nodes(left)).chosen is not None) == (worst <= parities), lost


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 2), st.integers(3, 8), st.data())
def test_what_is_rebuilt_comes_from_files_that_are_there_and_sums_up(
    parities: int, members: int, data: st.DataObject
) -> None:
    """Any part of a clique's shards and parities struck off: each plan uses what is left, and covers every byte."""
    clique = tuple(range(members))
    held = clique_save(clique, parities, world=members)
    nodes = NODES[:members]
    bad = data.draw(st.sets(st.tuples(st.integers(0, members - 1), st.booleans()), max_size=4))
    strikes = [Strike(f"n{rank}", "in_memory", AT, rank, parity) for rank, parity in sorted(bad)]
    decision = decide(on_nodes(held, nodes), strikes=strikes, world=members)
    lost = {rank for rank, parity in bad if not parity}
    shards = set(clique) - lost
    parity_left = set(clique) - {rank for rank, parity in bad if parity}
    code = Code(members, parities)
    solvable = all(code.recover(rank, shards, parity_left) is not None for rank in lost)
    assert (decision.chosen is not None) == solvable
    if decision.chosen is None:
        return
    plan = plan_retrieval(decision, on_nodes(held, nodes), nodes=nodes, strikes=strikes)
    assert {rebuild.owner for rebuild in plan.rebuilds} == lost
    for rebuild in plan.rebuilds:
        assert (rebuild.rank, rebuild.node) == (rebuild.owner, f"n{rebuild.owner}")
        assert not {(source.owner, source.parity) for source in rebuild.sources} & bad
        assert rebuild.digest == digest_of(rebuild.owner, AT)
        at = 0
        for piece in rebuild.pieces(64 * data.draw(st.integers(1, 4))):
            assert piece.start == at
            at = piece.stop
            for part in piece.parts:
                assert 0 <= part.start < part.stop <= rebuild.sources[part.source].nbytes
                assert part.stop - part.start <= piece.sum_bytes
        assert at == rebuild.nbytes == sizes_of(rebuild.owner)


def test_a_copy_is_taken_before_anything_is_rebuilt() -> None:
    held = two_cliques(2)
    held[1] = dataclasses.replace(held[1], **_with_replica(held[1], 0))
    held = [each for each in held if each.node_id != "n0"]
    inventories = on_nodes(held)
    plan = plan_retrieval(elected(inventories), inventories, nodes=NODES)
    assert plan.rebuilds == ()
    assert [(fetch.owner, fetch.from_node) for fetch in plan.fetches] == [(0, "n2")]


def _with_replica(held: NodeSave, owner: int) -> dict[str, object]:
    return {
        "owners": (owner, *held.owners),
        "digests": (digest_of(owner, AT), *held.digests),
        "nbytes": (sizes_of(owner), *held.nbytes),
        "roles": ("replica", *held.roles),
    }


def test_what_was_rebuilt_is_spread_to_the_other_nodes_that_need_it() -> None:
    """A split save: every node needs every shard of its data-parallel group."""
    held = [dataclasses.replace(each, split=True) for each in two_cliques(2) if each.owners[0] not in (2, 4)]
    inventories = on_nodes(held)
    topology = SCHEMES["rs"].place(NODES, jump=2, factor=4, domains=None, restart=True)
    plan = plan_restore(
        inventories, run_id=RUN, nodes=NODES, coordinates=[(0, 0)] * 8, topology=topology, strikes=frozenset(),
        policy=ElectionPolicy(),
    )  # fmt: skip
    assert [rebuild.owner for rebuild in plan.retrieval.rebuilds] == [2, 4]
    assert {(fetch.owner, fetch.from_node) for fetch in plan.retrieval.spread} == {(2, "n2"), (4, "n4")}
    assert len(plan.retrieval.spread) == 2 * 7
    assert plan.standing.lacking_parity == (2, 4)
    assert not plan.standing.whole


def test_equal_inputs_give_equal_plans_whatever_order_they_come_in() -> None:
    held = [each for each in two_cliques(2) if each.owners[0] not in (0, 6, 3)]
    inventories = on_nodes(held)
    plans = set()
    for seed in range(20):
        random.Random(seed).shuffle(inventories)
        plans.add(repr(plan_retrieval(elected(inventories), inventories, nodes=NODES)))
    assert len(plans) == 1


def test_what_could_not_be_rebuilt_is_told_as_the_reason() -> None:
    held = [each for each in two_cliques(1) if each.owners[0] not in (0, 2)]
    assert (
        "of rank 0 and 1 more, and too little that it could be rebuilt from"
        in elected(on_nodes(held)).passed_over[0].reason
    )


def test_parity_of_something_else_rebuilds_nothing() -> None:
    """A member's own record says another digest than the one the parity was made of."""
    held = two_cliques(1)
    other = dataclasses.replace(held[1], digests=("xxh3-128-32m:other",))
    left = [other if each is held[1] else each for each in held if each.owners != (0,)]
    assert elected(on_nodes(left)).chosen is None
    assert elected(on_nodes([each for each in held if each.owners != (0,)])).chosen is not None


def test_parity_that_disagrees_about_a_lost_shard_rebuilds_it_not_at_all() -> None:
    """Nobody can tell which is right."""
    held = two_cliques(1)
    cover = ParityCover(1, (0, 1), (sizes_of(0), sizes_of(1)), ("xxh3-128-32m:other", digest_of(1, AT)))
    lying = ParityCopy(cover, 1, 1, "parity")
    left = [
        dataclasses.replace(each, parity=(*each.parity, lying)) if each.owners == (1,) else each
        for each in held
        if each.owners != (0,)
    ]
    table = copy_table(AT, holdings_of(sources(*left), RUN, 8)[AT], 8)
    assert (table.missing, table.conflicting) == ((0,), (0,))


def test_parity_alone_is_a_save_only_where_there_is_as_much_of_it_as_of_shards() -> None:
    """`rs` over four members: a row is two stripes, P and Q."""
    for parities in (1, 2):
        held = [dataclasses.replace(each, owners=(), digests=(), nbytes=(), roles=()) for each in two_cliques(parities)]
        assert (elected(on_nodes(held)).chosen is not None) == (parities == 2)


def test_parity_that_lies_only_where_no_rank_runs_is_told() -> None:
    held = [each for each in two_cliques(1) if each.owners[0] != 0]
    inventories = on_nodes(held)
    decision = elected(inventories)
    nodes = tuple("n0" if node == "n2" else node for node in NODES)  # rank 2 moved, its node takes no part
    with pytest.raises(SourceUnavailableError):
        plan_retrieval(decision, inventories, nodes=nodes)


def test_inventories_with_parity_travel_as_json() -> None:
    inventories = on_nodes(two_cliques(2))
    assert inventories_from_json(inventories_to_json(inventories)) == inventories


# --- what stands after an election -----------------------------------------------------------------------------------


def standing(held: list[NodeSave], scheme: str, nodes: tuple[str, ...] = NODES, strikes: tuple[Strike, ...] = ()):  # type: ignore[no-untyped-def]
    topology = SCHEMES[scheme].place(nodes, jump=2, factor=4, domains=None, restart=True)
    inventories = on_nodes(held, nodes)
    return standing_of(
        elected(inventories, strikes), inventories, strikes, run_id=RUN, nodes=nodes, topology=topology, fetches=()
    )


def test_who_lacks_parity_is_who_has_none_of_todays_clique_in_a_directory_of_its_own() -> None:
    assert standing(two_cliques(2), "rs").whole
    assert standing([each for each in two_cliques(2) if each.owners[0] not in (1, 3)], "rs").lacking_parity == (1, 3)
    assert standing(two_cliques(1), "rs").lacking_parity == tuple(range(8)), "of another scheme"
    struck = (Strike("n5", "in_memory", AT, 5, parity=True),)
    assert standing(two_cliques(2), "rs", strikes=struck).lacking_parity == (5,)
    assert standing(two_cliques(2), "replica").lacking_parity == ()
    other = [*clique_save((0, 1, 4, 6), 2), *clique_save((2, 3, 5, 7), 2)]
    assert set(standing(other, "rs").lacking_parity) == set(range(8)), "of another clique"


def test_all_of_a_clique_send_again_if_one_of_it_lacks() -> None:
    lacking = standing([each for each in two_cliques(2) if each.owners[0] != 1], "rs")
    assert lacking.lacks_any((1, 3, 5, 7))
    assert all(lacking.is_sent(rank, (1, 3, 5, 7)) for rank in (1, 3, 5, 7))
    assert not lacking.lacks_any((0, 2, 4, 6))


# --- placement -------------------------------------------------------------------------------------------------------


def place(nodes: list[str], scheme: str, size: int, *, jump: int | None = None, restart: bool = False) -> Topology:
    return SCHEMES[scheme].place(nodes, jump=jump, factor=size, domains=None, restart=restart)


def test_cliques_are_the_documented_ones_where_the_size_divides() -> None:
    topology = place([f"n{rank // 2}" for rank in range(16)], "rs", 4)
    assert topology.cliques[:3] == ((0, 2, 4, 6), (1, 3, 5, 7), (8, 10, 12, 14))
    assert (topology.parities, topology.survives, topology.protected, topology.factor) == (2, 2, True, 1)
    assert topology.holders == ((),) * 16


@pytest.mark.parametrize("scheme", ["xor", "rs"])
@given(st.data())
def test_no_loss_of_as_many_domains_as_is_said_takes_more_than_parity_makes_up_for(
    scheme: str, data: st.DataObject
) -> None:
    """Uneven nodes, any jump and size, at a restart: `survives` is what the cliques survive, and everybody has one."""
    nodes = data.draw(st.lists(st.sampled_from("abcdefg"), min_size=2, max_size=24))
    size, jump = data.draw(st.integers(3, 6)), data.draw(st.none() | st.integers(1, 4))
    topology = place(nodes, scheme, size, jump=jump, restart=True)
    assert sorted(rank for clique in topology.cliques for rank in clique) == list(range(len(nodes)))
    for lost in itertools.combinations(sorted(set(nodes)), topology.survives):
        for clique in topology.cliques:
            gone = sum(nodes[rank] in lost for rank in clique)
            assert gone <= topology.parities
            assert gone < len(clique) or not gone
    full = SCHEMES[scheme].losses(size)
    assert topology.protected == (topology.survives == full)
    assert topology.protected or topology.notes


@given(st.integers(2, 7), st.integers(1, 4), st.sampled_from(["xor", "rs"]))
def test_a_first_start_on_even_nodes_is_fully_protected(count: int, per_node: int, scheme: str) -> None:
    size = min(count, 4)
    if size < SCHEMES[scheme].smallest_clique:
        return
    nodes = [f"n{rank // per_node}" for rank in range(count * per_node)]
    topology = place(nodes, scheme, size)
    assert topology.survives == SCHEMES[scheme].losses(size)
    assert all(size <= len(clique) < 2 * size for clique in topology.cliques)


def test_a_restart_on_fewer_nodes_survives_what_it_can_and_says_so() -> None:
    """Four ranks, three nodes left: xor makes two cliques of two, rs one of four that outlives one node."""
    nodes = ["a", "b", "c", "a"]
    xor, rs = (place(nodes, scheme, 4, restart=True) for scheme in ("xor", "rs"))
    assert (len(xor.cliques), xor.survives) == (2, 1)
    assert (rs.cliques, rs.survives, rs.protected) == (((0, 1, 2, 3),), 1, False)
    assert "survives the loss of 1 of 2" in rs.notes[-1]


def test_too_few_domains_are_refused_at_a_first_start_and_lowered_at_a_restart() -> None:
    nodes = ["a", "a", "b", "b"]
    with pytest.raises(ConfigError, match="needs 4 failure domains"):
        place(nodes, "rs", 4)
    assert place(nodes, "rs", 4, restart=True).survives == 1
    assert place(["a"] * 4, "rs", 4).notes[0].startswith("one node (a)")


def test_tolerance_counts_the_worst_domains_first() -> None:
    assert tolerance((0, 1, 2, 3), "aabc", 1) == 0
    assert tolerance((0, 1, 2, 3), "aabc", 2) == 1
    assert tolerance((0, 1, 2, 3), "abcd", 2) == 2
    assert tolerance((0, 1), "ab", 1) == 1
    assert tolerance((0, 1), "aa", 1) == 0


def test_thousands_of_ranks_are_placed_at_once() -> None:
    nodes = [f"n{rank // 8:04d}" for rank in range(16384)]
    topology = make_parity_topology(
        16384, nodes, scheme="rs", parities=2, jump=None, size=8, domains=None, restart=False
    )
    assert len(topology.cliques) == 2048
    assert topology.survives == 2
