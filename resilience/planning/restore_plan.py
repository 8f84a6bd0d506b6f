"""Everything about a restart that is decided before a byte moves: the election, who reads what from where, what stands.

The restore and the command line's `explain` call the same function, so that what is told is what will happen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from resilience.errors import SourceUnavailableError
from resilience.planning.assembly import Assembly, plan_missing, plan_showing
from resilience.planning.decision import Candidate, Decision, ElectionPolicy, Strike
from resilience.planning.election import elect
from resilience.planning.inventory import Inventory
from resilience.planning.kept import Standing, standing_of
from resilience.planning.retrieval import RetrievalPlan, plan_retrieval
from resilience.planning.topology import Topology

__all__ = ["Plan", "needed_owners", "plan_restore"]


@dataclass(frozen=True)
class Plan:
    """What the leader decided, as every rank received it."""

    decision: Decision
    retrieval: RetrievalPlan = field(default_factory=RetrievalPlan)
    standing: Standing = field(default_factory=Standing)
    split: bool = False
    notes: tuple[str, ...] = ()
    assembly: Assembly | None = None  # of a save on nodes that another number of ranks took; no retrieval then


def plan_restore(
    inventories: Sequence[Inventory],
    *,
    run_id: str,
    nodes: Sequence[str],
    coordinates: Sequence[tuple[int, int]],
    topology: Topology,
    strikes: frozenset[Strike],
    policy: ElectionPolicy,
) -> Plan:
    """Elect, plan the retrieval, and say what is kept. Pure: equal inputs give equal plans, on every rank."""
    decision = elect(inventories, run_id=run_id, world_size=len(nodes), strikes=strikes, policy=policy)
    notes = tuple(note for each in inventories for note in each.notes)
    if decision.chosen is None or decision.chosen.kind != "node":
        return Plan(decision, notes=notes)
    if decision.chosen.world_size != len(nodes):
        return _plan_another_world(decision, decision.chosen, inventories, nodes, strikes, notes)
    save = decision.chosen.save
    split = any(held.split for each in inventories for held in each.node_saves if held.save == save)
    needs = needed_owners(nodes, coordinates, split)
    try:
        retrieval = plan_retrieval(decision, inventories, nodes=nodes, needs=needs, strikes=strikes)
    except SourceUnavailableError as error:
        return Plan(replace(decision, chosen=None, error=("SourceUnavailable", str(error), "")), notes=notes)
    standing = standing_of(
        decision,
        inventories,
        strikes,
        run_id=run_id,
        nodes=nodes,
        topology=topology,
        fetches=(*retrieval.fetches, *retrieval.spread),
    )
    return Plan(decision, retrieval, standing, split, notes)


def _plan_another_world(
    decision: Decision,
    chosen: Candidate,
    inventories: Sequence[Inventory],
    nodes: Sequence[str],
    strikes: frozenset[Strike],
    notes: tuple[str, ...],
) -> Plan:
    """Nothing of it is kept beyond the first protected save of this attempt: no shard is one of this world's.

    As long as shards are to be rebuilt, the plan is only that; then it is made again.
    """
    try:
        rebuilds = plan_missing(chosen, inventories, nodes=nodes, strikes=strikes)
        if rebuilds:
            return Plan(decision, RetrievalPlan(rebuilds=rebuilds), notes=notes)
        assembly = plan_showing(chosen, inventories, nodes=nodes, strikes=strikes)
    except SourceUnavailableError as error:
        return Plan(replace(decision, chosen=None, error=("SourceUnavailable", str(error), "")), notes=notes)
    return Plan(decision, notes=notes, assembly=assembly)


def needed_owners(
    nodes: Sequence[str], coordinates: Sequence[tuple[int, int]], split: bool
) -> Mapping[str, tuple[int, ...]]:
    """Whose shards each node must read: its ranks' own and, where replicated items were split, their groups'."""
    groups: dict[tuple[int, int], list[int]] = {}
    for rank, place in enumerate(coordinates):
        groups.setdefault(place, []).append(rank)
    needs: dict[str, set[int]] = {}
    whole_groups: dict[str, set[tuple[int, int]]] = {}
    for rank, node in enumerate(nodes):
        needs.setdefault(node, set()).add(rank)
        seen = whole_groups.setdefault(node, set())
        if split and coordinates[rank] not in seen:
            seen.add(coordinates[rank])
            needs[node].update(groups[coordinates[rank]])
    return {node: tuple(sorted(wanted)) for node, wanted in needs.items()}
