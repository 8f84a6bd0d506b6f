"""Planning stays linear in the number of ranks; the seconds are printed (`pytest -s`)."""

from __future__ import annotations

import gc
import time

from resilience.planning.election import ElectionPolicy, elect
from resilience.planning.retrieval import plan_retrieval
from resilience.planning.topology import make_topology
from tests.planning.big import RANKS_PER_NODE, cluster


def plan_seconds(ranks: int) -> float:
    """Best of five: election, retrieval plan and cliques for 3 saves of 8 ranks per node, two copies each."""
    inventories, nodes = cluster(ranks)
    best = float("inf")
    for _ in range(5):
        gc.collect()
        start = time.process_time()
        decision = elect(inventories, run_id="run", world_size=ranks, strikes=frozenset(), policy=ElectionPolicy())
        plan = plan_retrieval(decision, inventories, nodes=nodes)
        make_topology(ranks, nodes, jump=None, factor=2, domains=None, restart=True)
        best = min(best, time.process_time() - start)
        assert decision.chosen is not None
        assert len(plan.fetches) == 2 * RANKS_PER_NODE
        assert len(plan.local) + len(plan.fetches) == ranks
    return best


def test_electing_and_planning_for_four_times_the_ranks_takes_far_less_than_sixteen_times_as_long() -> None:
    tries = []
    while not tries or (tries[-1] > 8 and len(tries) < 5):  # a busy machine spoils one measurement, not all
        seconds = {ranks: plan_seconds(ranks) for ranks in (4_096, 16_384)}
        print({ranks: round(each, 3) for ranks, each in seconds.items()})
        tries.append(seconds[16_384] / seconds[4_096])
    assert min(tries) <= 8, "linear is 4, quadratic 16"
