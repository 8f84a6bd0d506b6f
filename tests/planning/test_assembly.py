"""Who shows which shard of another world size, and which segments go where: spread, and each once to a node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.errors import SourceUnavailableError
from resilience.planning.assembly import Assembly, plan_moves, plan_showing, readers
from resilience.planning.decision import Candidate, ElectionPolicy, Strike
from resilience.planning.inventory import Inventory, NodeSave
from resilience.planning.restore_plan import Plan, plan_restore
from resilience.planning.topology import make_topology
from tests.planning.world import RUN, node_save, pair, save, sources

SAVE = save(40)


def assembly_of(held: Sequence[NodeSave], nodes: Sequence[str], world: int, strikes: Sequence[Strike] = ()) -> Assembly:
    chosen = Candidate(SAVE, "in_memory", "node", "", RUN, 0, world_size=world)
    return plan_showing(chosen, sources(*held, empty=list(nodes)), nodes=nodes, strikes=strikes)


def plan_of(inventories: Sequence[Inventory], nodes: Sequence[str], **policy: bool) -> Plan:
    return plan_restore(
        inventories,
        run_id=RUN,
        nodes=nodes,
        coordinates=[(0, 0)] * len(nodes),
        topology=make_topology(len(nodes), nodes, jump=None, factor=2, domains=None, restart=True),
        strikes=frozenset(),
        policy=ElectionPolicy(**policy),
    )


worlds = st.integers(2, 9)


@st.composite
def survivors(draw: st.DrawFn) -> tuple[list[NodeSave], list[str], int]:
    """Copies of a save of some ranks on some nodes, every shard somewhere, and the nodes of the next start."""
    world, count = draw(worlds), draw(st.integers(1, 6))
    names = [f"n{index}" for index in range(count)]
    owners: dict[str, set[int]] = {name: draw(st.sets(st.integers(0, world - 1))) for name in names}
    for owner in range(world):
        owners[draw(st.sampled_from(names))].add(owner)
    held = [node_save(name, SAVE, sorted(mine), world=world) for name, mine in owners.items() if mine]
    nodes = draw(st.lists(st.sampled_from([*names, "new"]), max_size=6)) + names
    return held, draw(st.permutations(nodes)), world


@given(survivors(), st.randoms())
def test_every_shard_is_shown_once_by_a_rank_of_a_node_that_holds_it(
    world: tuple[list[NodeSave], list[str], int], random: object
) -> None:
    held, nodes, size = world
    plan = assembly_of(held, nodes, size)
    assert [shown.owner for shown in plan.shown] == list(range(size))
    holds = {each.node_id: set(each.owners) for each in held}
    assert all(shown.owner in holds[shown.node] for shown in plan.shown)
    assert all(nodes[shown.rank] == shown.node for shown in plan.shown)
    random.shuffle(held)  # type: ignore[attr-defined]
    assert assembly_of(held, nodes, size) == plan, "whoever answered first"


@given(survivors(), st.data())
def test_a_segment_goes_once_to_each_node_that_lacks_it_and_is_wanted_there(
    world: tuple[list[NodeSave], list[str], int], data: st.DataObject
) -> None:
    held, nodes, size = world
    plan = assembly_of(held, nodes, size)
    wanted = [
        data.draw(st.dictionaries(st.integers(0, size - 1), st.sets(st.integers(0, 4), min_size=1))) for _ in nodes
    ]
    moves = plan_moves(plan, nodes, wanted)
    holds = {(each.node_id, owner) for each in held for owner in each.owners}
    assert len({(move.to_node, move.owner) for move in moves}) == len(moves), "once to a node"
    brought = {(move.to_node, move.owner): set(move.segments) for move in moves}
    for rank, owners in enumerate(wanted):
        for owner, numbers in owners.items():
            place = nodes[rank], owner
            assert place in holds or numbers <= brought[place]
    asked = Counter(
        (nodes[rank], owner, number)
        for rank, owners in enumerate(wanted)
        for owner in owners
        for number in owners[owner]
    )
    assert all((move.to_node, move.owner, number) in asked for move in moves for number in move.segments)
    assert not any((move.to_node, move.owner) in holds for move in moves), "nothing that is there"
    assert all(nodes[move.to_rank] == move.to_node and nodes[move.from_rank] != move.to_node for move in moves)
    assert all(move.source.node == nodes[move.from_rank] for move in moves)
    assert all((move.source.node_dir, move.owner) in holds for move in moves)
    falls_to = readers(plan, nodes, [list(each) for each in wanted])
    assert falls_to.keys() == {(nodes[rank], owner) for rank, owners in enumerate(wanted) for owner in owners}


def test_showing_is_spread_over_the_holders() -> None:
    held = [node_save(f"n{index}", SAVE, range(12), world=12) for index in range(4)]
    nodes = ["n0", "n1", "n2", "n3", "n3"]
    shown = Counter(each.node for each in assembly_of(held, nodes, 12).shown)
    assert set(shown.values()) == {3}
    assert len({each.rank for each in assembly_of(held, nodes, 12).shown}) == 5, "and over the ranks of a node"


def test_what_many_nodes_need_comes_from_all_that_hold_it() -> None:
    held = [node_save(f"n{index}", SAVE, range(2), world=2) for index in range(2)]
    nodes = ["n0", "n1", *(f"new{index}" for index in range(8))]
    moves = plan_moves(assembly_of(held, nodes, 2), nodes, [{0: {0, 1}, 1: {0}}] * len(nodes))
    assert len(moves) == 16
    sent = Counter[str]()
    for move in moves:
        sent[move.source.node] += len(move.segments)
    assert sent == {"n0": 12, "n1": 12}


def test_a_struck_copy_is_not_shown_and_another_is() -> None:
    held = pair(SAVE, world=3)
    first = assembly_of(held, ["n0", "n1"], 3).shown[0]
    again = assembly_of(held, ["n0", "n1"], 3, [Strike(first.node_dir, first.tier, SAVE, 0)]).shown[0]
    assert again.node != first.node
    with pytest.raises(SourceUnavailableError, match="shard of rank 2 is held by no node"):
        assembly_of(held[:2], ["n1"], 3, [Strike("n0", "in_memory", SAVE, 2)])


@given(worlds, worlds)
def test_a_plan_puts_together_exactly_where_the_world_size_differs(saved: int, now: int) -> None:
    nodes = [f"n{rank}" for rank in range(now)]
    inventories = sources(*pair(SAVE, world=saved), empty=nodes)
    plan = plan_of(inventories, nodes)
    if now < saved - 1:  # two neighbours are gone: with them all copies of one shard
        inventories = [each for each in inventories if not each.node_saves or each.source in nodes]
        assert plan_of(inventories, nodes).decision.chosen is None
        return
    assert plan.decision.chosen is not None
    assert (plan.assembly is None) == (saved == now)
    assert bool(plan.retrieval.local) == (saved == now)
    assert plan.standing.kept == ((SAVE,) if saved == now else ())
    if saved != now:
        assert plan_of(inventories, nodes, elastic=False).assembly is None
