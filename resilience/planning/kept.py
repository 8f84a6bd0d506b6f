"""What stands after an election: which saves stay on the nodes, and which replicas of the elected one are missing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from resilience.planning.copies import copy_table, holdings_of
from resilience.planning.decision import Decision, Strike
from resilience.planning.history import abandoned_saves, read_history
from resilience.planning.inventory import Inventory, SaveId
from resilience.planning.retrieval import Fetch
from resilience.planning.topology import Topology

__all__ = ["Standing", "standing_of"]


@dataclass(frozen=True)
class Standing:
    """`kept`: complete saves that count, oldest first, the elected one last if it lies on nodes. `digests`: of the
    elected save, by owner. `lacking`: (owner, rank) pairs: that rank should hold a replica of the owner's shard and
    does not.
    """

    kept: tuple[SaveId, ...] = ()
    digests: tuple[str, ...] = ()
    lacking: tuple[tuple[int, int], ...] = ()


def standing_of(
    decision: Decision,
    inventories: Sequence[Inventory],
    strikes: Collection[Strike],
    *,
    run_id: str,
    nodes: Sequence[str],
    topology: Topology,
    fetches: Sequence[Fetch],
) -> Standing:
    """For an elected save that lies on nodes; `fetches` are what its retrieval brings to which node."""
    chosen = decision.chosen
    if chosen is None or chosen.kind != "node":
        return Standing()
    world = len(nodes)
    holdings = holdings_of(inventories, run_id, world)
    left = abandoned_saves(list(holdings), read_history(inventories, run_id).attempts)
    kept = [
        save
        for save in sorted(holdings)
        if save <= chosen.save and save not in left and not copy_table(save, holdings[save], world, strikes).missing
    ]
    table = copy_table(chosen.save, holdings[chosen.save], world, strikes)
    # only a copy in the node's own directory stays: one in a directory of another name is read, not taken over
    held = {
        (table.holdings[i].source, owner)
        for owner, where in enumerate(table.held_in)
        for i in where
        if table.holdings[i].source == table.holdings[i].copies.node_id
    }
    arriving = {(fetch.to_rank, fetch.owner) for fetch in fetches}
    lacking = tuple(
        (owner, rank)
        for owner, holders in enumerate(topology.holders)
        for rank in holders
        if (nodes[rank], owner) not in held and (rank, owner) not in arriving
    )
    return Standing(tuple(kept), table.digests, lacking)
