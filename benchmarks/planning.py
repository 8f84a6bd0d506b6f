"""Election and retrieval plan for many ranks on one core, from the compact records that nodes send to the leader."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from resilience.planning.decision import ElectionPolicy
from resilience.planning.topology import make_topology
from resilience.planning.wire import inventories_from_json, inventories_to_json
from resilience.restore import Plan, plan_restore
from tests.planning.big import cluster

__all__ = ["plan_seconds"]


def plan_seconds(ranks: int, repeat: int = 3) -> dict[str, Any]:
    """CPU seconds, the least of `repeat`: `decode` the records of every node, `plan` (topology included).

    Three saves of `ranks` ranks in two copies each, two nodes lost.
    """
    inventories, nodes = cluster(ranks)
    payloads = [inventories_to_json([each]) for each in inventories]
    decode = plan = float("inf")
    for _ in range(repeat):
        began = time.process_time()
        decoded = [each for payload in payloads for each in inventories_from_json(payload)]
        decode = min(decode, time.process_time() - began)
        began = time.process_time()
        made = _plan(decoded, nodes)
        plan = min(plan, time.process_time() - began)
        if made.decision.chosen is None or not made.retrieval.fetches:
            raise RuntimeError("the plan of the benchmark's cluster resumes from nothing")
    return {"ranks": ranks, "record_bytes": sum(map(len, payloads)), "decode": decode, "plan": plan}


def _plan(inventories: Sequence[Any], nodes: Sequence[str]) -> Plan:
    topology = make_topology(len(nodes), nodes, jump=None, factor=2, domains=None, restart=True)
    return plan_restore(
        inventories,
        run_id="run",
        nodes=nodes,
        coordinates=[(rank, 0) for rank in range(len(nodes))],
        topology=topology,
        strikes=frozenset(),
        policy=ElectionPolicy(),
    )
