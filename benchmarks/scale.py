"""How what a job costs grows with its ranks, from 64 to 16,384: what is measured, as a table and as a picture.

    python -m benchmarks.scale docs/scale.svg

Nothing is run with so many processes. The leader's work is done for real, on the records that so many nodes would send;
who talks to whom comes from the functions that open the groups.
"""

from __future__ import annotations

import json
import sys
import time
import tracemalloc
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.scale_chart import chart
from resilience.planning.decision import ElectionPolicy
from resilience.planning.fan_in import fan_in
from resilience.planning.topology import Topology, make_topology
from resilience.planning.wire import inventories_from_json, inventories_to_json
from resilience.restore import plan_restore
from tests.planning.big import cluster

__all__ = ["WORLDS", "Footprint", "footprint", "table"]

WORLDS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16_384)


@dataclass(frozen=True)
class Footprint:
    """Of one size. Seconds are of one core's processor time, the least of a few; sizes are bytes.

    `records`: of all nodes, `records_of_node`: of the node that says most, `words_of_others`: of a rank that leads no
    node. `talks_to`: connections for agreements and control, `exchanges`: group operations that a rank takes part in at
    a boundary; `partners`: ranks that it sends replicas to or receives them from.
    """

    ranks: int
    nodes: int
    records: int
    records_of_node: int
    words_of_others: int
    decode_s: float
    plan_s: float
    plan_memory: int
    plan_bytes: int
    talks_to_most: int
    talks_to_median: float
    exchanges_most: int
    exchanges_median: float
    partners_most: int


def footprint(ranks: int, repeat: int = 3) -> Footprint:
    """Three saves of `ranks` ranks, 8 a node, in two copies; two nodes lost."""
    inventories, nodes = cluster(ranks)
    payloads = [inventories_to_json([each]) for each in inventories]
    decode_s = plan_s = float("inf")
    for _ in range(repeat):
        began = time.process_time()
        decoded = [each for payload in payloads for each in inventories_from_json(payload)]
        decode_s = min(decode_s, time.process_time() - began)
        began = time.process_time()
        plan, topology = _plan(decoded, nodes)
        plan_s = min(plan_s, time.process_time() - began)
    tracemalloc.start()
    _plan(decoded, nodes)
    memory = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    talks_to, exchanges = _talk(nodes)
    return Footprint(
        ranks=ranks,
        nodes=len(inventories),
        records=sum(map(len, payloads)),
        records_of_node=max(map(len, payloads)),
        words_of_others=len(inventories_to_json([])),
        decode_s=decode_s,
        plan_s=plan_s,
        plan_memory=memory,
        plan_bytes=len(json.dumps(asdict(plan), separators=(",", ":"))),
        talks_to_most=max(talks_to),
        talks_to_median=median(talks_to),
        exchanges_most=max(exchanges),
        exchanges_median=median(exchanges),
        partners_most=_partners(topology),
    )


def _plan(inventories: Sequence[Any], nodes: Sequence[str]) -> tuple[Any, Topology]:
    topology = make_topology(len(nodes), nodes, jump=None, factor=2, domains=None, restart=True)
    plan = plan_restore(
        inventories,
        run_id="run",
        nodes=nodes,
        coordinates=[(rank, 0) for rank in range(len(nodes))],
        topology=topology,
        strikes=frozenset(),
        policy=ElectionPolicy(),
    )
    if plan.decision.chosen is None or not plan.retrieval.fetches:
        raise RuntimeError("the plan of the benchmark's cluster resumes from nothing")
    return plan, topology


def _talk(nodes: Sequence[str]) -> tuple[list[int], list[int]]:
    """Of each rank: distinct ranks that it is connected to by the two trees, and its operations at a boundary."""
    peers: list[set[int]] = [set() for _ in nodes]
    stages: Counter[int] = Counter()
    ranks = range(len(nodes))
    control = fan_in(ranks, nodes)
    for levels in (control, fan_in(ranks)):
        for level in levels:
            for group in level:
                for rank in group:
                    peers[rank].update(group)
                    stages[rank] += levels is control
    last = {rank for group in control[-1] for rank in group}
    return [len(each) - 1 for each in peers], [2 * stages[rank] - (rank in last) for rank in ranks]


def _partners(topology: Topology) -> int:
    held = topology.held()
    return max(len({*to, *of}) for to, of in zip(topology.holders, held, strict=True))


def table(found: Sequence[Footprint]) -> str:
    """For a page in Markdown."""
    lines = [
        "| ranks | nodes | records | of a node | decode | plan | memory for it | plan told | a rank talks to "
        "| operations at a boundary | partners |",
        "| --- " * 11 + "|",
    ]
    for each in found:
        cells = (
            f"{each.ranks:,}",
            f"{each.nodes:,}",
            f"{each.records / 1e6:.2f} MB",
            f"{each.records_of_node / 1e3:.1f} kB",
            f"{1e3 * each.decode_s:.3g} ms",
            f"{1e3 * each.plan_s:.3g} ms",
            f"{each.plan_memory / 1e6:.3g} MB",
            f"{each.plan_bytes / 1e6:.3g} MB",
            f"{each.talks_to_median:.0f}, at most {each.talks_to_most}",
            f"{each.exchanges_median:.0f}, at most {each.exchanges_most}",
            f"{each.partners_most}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    found = [footprint(ranks) for ranks in WORLDS]
    print(table(found))
    if arguments:
        Path(arguments[0]).write_text(chart([asdict(each) for each in found]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
