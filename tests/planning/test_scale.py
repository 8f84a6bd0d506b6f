"""Planning stays linear in the number of ranks; the seconds are printed (`pytest -s`)."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from types import FrameType
from typing import Any
from xml.etree import ElementTree

from benchmarks.scale import footprint, table
from benchmarks.scale_chart import chart
from resilience.foresight.exposure import exposure_of
from resilience.planning.election import ElectionPolicy, elect
from resilience.planning.fan_in import WIDEST, fan_in
from resilience.planning.restore_plan import plan_restore
from resilience.planning.retrieval import plan_retrieval
from resilience.planning.schemes import Replicas
from resilience.planning.topology import make_topology
from resilience.planning.wire import inventories_from_json, inventories_to_json
from tests.planning.big import RANKS_PER_NODE, cluster


def plan_seconds(ranks: int) -> float:
    """Best of two: election, retrieval plan and cliques for 3 saves of 8 ranks per node, two copies each."""
    inventories, nodes = cluster(ranks)
    best = float("inf")
    for _ in range(2):
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


# Counted, not timed: bytecodes are the same on any machine


def bytecodes(work: Callable[[], object]) -> int:
    """How many bytecodes of Python `work` runs, in this package's own code and the standard library's."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Callable[..., Any]:
        nonlocal count
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        count += event == "opcode"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def everything(ranks: int) -> dict[str, Callable[[], object]]:
    """What is decided at a start and a boundary of a job of so many ranks, each by itself."""
    inventories, nodes = cluster(ranks)
    payloads = [inventories_to_json([each]) for each in inventories]
    topology = make_topology(ranks, nodes, jump=None, factor=2, domains=None, restart=True)
    two_a_rack = {f"node{index:05d}": f"rack{index // 2}" for index in range(len(inventories))}
    return {
        "records": lambda: [inventories_from_json(payload) for payload in payloads],
        "plan": lambda: plan_restore(
            inventories, run_id="run", nodes=nodes, coordinates=[(rank, 0) for rank in range(ranks)],
            topology=topology, strikes=frozenset(), policy=ElectionPolicy(),
        ),
        "topology": lambda: make_topology(ranks, nodes, jump=None, factor=2, domains=None, restart=True),
        "topology by domain": lambda: make_topology(
            ranks, nodes, jump=None, factor=3, domains=two_a_rack, restart=True
        ),
        "fan-in": lambda: fan_in(range(ranks), nodes),
        "exposure": lambda: exposure_of(topology, [rank // RANKS_PER_NODE for rank in range(ranks)], Replicas()),
    }  # fmt: skip


def test_four_times_the_ranks_take_four_times_the_bytecodes_and_hardly_more() -> None:
    few, many = everything(256), everything(1024)
    for name, work in few.items():
        growth = bytecodes(many[name]) / bytecodes(work)
        assert growth < 4.8, f"{name} grows {growth:.1f} times: n log n would be 5, quadratic 16"


def test_what_a_rank_has_to_do_with_others_stays_as_it_is_while_the_job_grows() -> None:
    small, large = footprint(512, repeat=1), footprint(2048, repeat=1)
    assert large.records_of_node <= 1.1 * small.records_of_node, "a node tells of itself only"
    assert small.words_of_others == large.words_of_others == 2
    assert large.talks_to_median == small.talks_to_median == WIDEST - 1
    assert large.talks_to_most <= 4 * WIDEST
    assert large.exchanges_median == small.exchanges_median == 2
    assert large.exchanges_most <= small.exchanges_most + 2
    assert large.partners_most == small.partners_most == 1
    assert 3.6 < large.records / small.records < 4.4
    assert 3.6 < large.plan_bytes / small.plan_bytes < 4.4
    assert large.plan_memory < 8 * small.plan_memory


def test_the_growth_can_be_printed_and_drawn() -> None:
    found = [footprint(64, repeat=1), footprint(128, repeat=1)]
    assert [line.split(" | ")[0] for line in table(found).splitlines()[2:]] == ["| 64", "| 128"]
    drawn = chart([asdict(each) for each in found])
    assert drawn.count("<polyline") == 8
    assert "nan" not in drawn
    ElementTree.fromstring(drawn)
