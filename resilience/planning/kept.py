"""What stands after an election: which saves stay on the nodes, and what the elected one lacks to be protected."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from resilience.planning.copies import CopyTable, copy_table, holdings_of
from resilience.planning.decision import Decision, Strike
from resilience.planning.history import abandoned_saves, read_history
from resilience.planning.inventory import Inventory, SaveId
from resilience.planning.retrieval import Fetch
from resilience.planning.topology import Topology

__all__ = ["Standing", "standing_of", "without_copies"]


@dataclass(frozen=True)
class Standing:
    """`kept`: complete saves that count, oldest first, the elected one last if it lies on nodes. `digests`: of the
    elected save, by owner. `lacking`: (owner, rank) pairs: that rank should hold a replica of the owner's shard and
    does not. `lacking_parity`: ranks that should hold their clique's parity and do not.
    """

    kept: tuple[SaveId, ...] = ()
    digests: tuple[str, ...] = ()
    lacking: tuple[tuple[int, int], ...] = ()
    lacking_parity: tuple[int, ...] = ()

    @property
    def whole(self) -> bool:
        """Whether nothing must be sent again before the elected save is protected."""
        return not self.lacking and not self.lacking_parity

    def lacks_any(self, clique: Sequence[int]) -> bool:
        """Whether the clique's members must exchange the elected save again."""
        return any(owner in clique for owner, _ in self.lacking) or any(rank in clique for rank in self.lacking_parity)

    def is_sent(self, rank: int, clique: Sequence[int]) -> bool:
        """Whether they need the shard of `rank` for it: parity is made of all of them."""
        return any(owner == rank for owner, _ in self.lacking) or any(each in clique for each in self.lacking_parity)


def without_copies(
    standing: Standing, topology: Topology, refused: Mapping[int, Sequence[tuple[int, str]]]
) -> Standing:
    """`standing` where ranks do not hold what was to arrive: `refused` has the owners by rank, and where they lie."""
    gone = {(owner, rank) for rank, told in refused.items() for owner, _ in told if rank in topology.holders[owner]}
    return replace(standing, lacking=tuple(sorted({*standing.lacking, *gone})))


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
    return Standing(tuple(kept), table.digests, lacking, _lacking_parity(table, strikes, nodes, topology))


def _lacking_parity(
    table: CopyTable, strikes: Collection[Strike], nodes: Sequence[str], topology: Topology
) -> tuple[int, ...]:
    """Ranks whose node does not have, in its own directory, what the rank keeps of its clique's parity: of today's

    clique and scheme, made of the shards that were elected.
    """
    if not topology.parities:
        return ()
    struck = {(strike.where, strike.owner) for strike in strikes if strike.save == table.save and strike.parity}
    clique_of = {rank: clique for clique in topology.cliques for rank in clique}
    held = {
        (holding.source, each.keeper)
        for holding in table.holdings
        if holding.source == holding.copies.node_id
        for each in holding.copies.parity
        if (holding.source, each.keeper) not in struck
        and each.cover.parities == topology.parities
        and each.cover.members == clique_of[each.keeper]
        and each.cover.digests == tuple(table.digests[member] for member in each.cover.members)
    }
    return tuple(
        rank for rank, clique in sorted(clique_of.items()) if len(clique) > 1 and (nodes[rank], rank) not in held
    )
