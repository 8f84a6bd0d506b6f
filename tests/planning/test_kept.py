"""After an election: what stays on the nodes, and which replicas of the elected save must be made again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from resilience.planning.decision import ElectionPolicy
from resilience.planning.inventory import Inventory
from resilience.planning.kept import Standing
from resilience.planning.restore_plan import Plan, plan_restore
from resilience.planning.topology import make_topology
from tests.planning.world import RUN, node_save, save, sources

WORLD = 4
NODES = [f"n{rank}" for rank in range(WORLD)]
TOPOLOGY = make_topology(WORLD, NODES, jump=None, factor=2, domains=None, restart=False)


def plan(inventories: list[Inventory]) -> Plan:
    return plan_restore(
        inventories, run_id=RUN, nodes=NODES, coordinates=[(0, 0)] * WORLD, topology=TOPOLOGY, strikes=frozenset(),
        policy=ElectionPolicy(),
    )  # fmt: skip


#: By iteration, which (node, owner) copies are there.
HELD = st.dictionaries(
    st.sampled_from([10, 20, 30]), st.sets(st.tuples(st.integers(0, WORLD - 1), st.integers(0, WORLD - 1))), max_size=3
)


@given(HELD)
def test_the_elected_save_stays_with_all_older_whole_ones_and_what_it_lacks_is_named(
    held: dict[int, set[tuple[int, int]]],
) -> None:
    copies = [
        node_save(f"n{node}", save(iteration), sorted(o for n, o in pairs if n == node), own=(node,), world=WORLD)
        for iteration, pairs in held.items()
        for node in sorted({n for n, _ in pairs})
    ]
    made = plan(sources(*copies, empty=NODES))
    whole = sorted(save(i) for i, pairs in held.items() if {owner for _, owner in pairs} == set(range(WORLD)))
    if not whole:
        assert made.standing == Standing()
        return
    assert made.decision.chosen is not None
    elected = made.decision.chosen.save
    assert elected == whole[-1]
    assert list(made.standing.kept) == whole
    there = held[elected.iteration]
    brought = {(fetch.to_rank, fetch.owner) for fetch in made.retrieval.fetches}
    wanted = {(owner, rank) for owner, ranks in enumerate(TOPOLOGY.holders) for rank in ranks}
    lacking = set(made.standing.lacking)
    assert lacking == {(owner, rank) for owner, rank in wanted if (rank, owner) not in there | brought}
