"""Which node reads which shard from where after an election: own copies first, the rest from whoever has least to send.

A shard that several ranks of a node need is fetched once, by one of them, and every copy is verified by exactly one
rank of the node that uses it. A shard of which there is no copy is rebuilt from parity, at home, and spread from there.
Equal inputs give equal plans, whatever order they come in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from resilience.errors import SourceUnavailableError
from resilience.planning.copies import CopyTable, copy_table, holdings_of
from resilience.planning.decision import Decision, Strike
from resilience.planning.inventory import TIERS, Inventory, Tier
from resilience.planning.rebuilding import Rebuild, plan_rebuilds


@dataclass(frozen=True)
class LocalCopy:
    """A shard that the node has itself, in the directory `node_dir` (its own, or one left by an earlier name)."""

    node: str
    owner: int
    node_dir: str
    tier: Tier
    nbytes: int
    digest: str


@dataclass(frozen=True)
class Fetch:
    """A shard that travels once between two nodes, between these two ranks."""

    owner: int
    from_node: str
    from_dir: str
    tier: Tier
    from_rank: int
    to_node: str
    to_rank: int
    nbytes: int
    digest: str


@dataclass(frozen=True)
class Verify:
    """`rank` of `node` hashes this owner's bytes before anybody on the node loads them."""

    node: str
    rank: int
    owner: int


@dataclass(frozen=True)
class RetrievalPlan:
    """All moves of one restore. For a save on shared storage, and for a fresh start, it is empty.

    `rebuilds` come after the fetches; `spread` are fetches of what was rebuilt, by nodes that need it too.
    """

    local: tuple[LocalCopy, ...] = ()
    fetches: tuple[Fetch, ...] = ()
    verify: tuple[Verify, ...] = ()
    rebuilds: tuple[Rebuild, ...] = ()
    spread: tuple[Fetch, ...] = ()


def plan_retrieval(
    decision: Decision,
    inventories: Sequence[Inventory],
    *,
    nodes: Sequence[str],
    needs: Mapping[str, Sequence[int]] | None = None,
    strikes: Collection[Strike] = (),
) -> RetrievalPlan:
    """Plan for the elected save. `nodes` names the node of each rank; `needs` the owners whose shards a node needs
    (default: each rank its own). Raises SourceUnavailableError if a shard is held only where no rank runs.
    """
    chosen = decision.chosen
    if chosen is None or chosen.kind != "node" or chosen.run_id is None:
        return RetrievalPlan()
    holdings = holdings_of(inventories, chosen.run_id, len(nodes)).get(chosen.save, ())
    table = copy_table(chosen.save, holdings, len(nodes), strikes)
    ranks_on: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks_on.setdefault(node, []).append(rank)
    local: list[LocalCopy] = []
    missing: list[tuple[str, int]] = []
    for node, owners in sorted((needs if needs is not None else ranks_on).items()):
        for owner in sorted(set(owners)):
            copy = _own_copy(table, node, owner)
            if copy is None:
                missing.append((node, owner))
            else:
                local.append(copy)
    lost = {owner for _, owner in missing if owner in table.rebuilt_from}
    rebuilds = plan_rebuilds(table, {owner: owner for owner in lost}, nodes, ranks_on)
    fetches = _fetches(table, [each for each in missing if each[1] not in lost], nodes, ranks_on)
    spread = _spread(rebuilds, [each for each in missing if each[1] in lost], chosen.tier, ranks_on)
    verify = _verifications(local, fetches, nodes, ranks_on)
    return RetrievalPlan(tuple(local), fetches, verify, rebuilds, spread)


def _own_copy(table: CopyTable, node: str, owner: int) -> LocalCopy | None:
    """The node's best copy: the cheapest tier, then the directory that bears its name."""
    own = [held.copies for held in (table.holdings[i] for i in table.held_in[owner]) if held.source == node]
    if not own:
        return None
    best = min(own, key=lambda copies: (TIERS.index(copies.tier), copies.node_id != node, copies.node_id))
    return LocalCopy(node, owner, best.node_id, best.tier, table.nbytes[owner], table.digests[owner])


def _fetches(
    table: CopyTable, missing: Sequence[tuple[str, int]], nodes: Sequence[str], ranks_on: Mapping[str, Sequence[int]]
) -> tuple[Fetch, ...]:
    """Spread the missing shards over their holders: those with least choice first, each from the least loaded."""
    choices = {owner: [i for i in table.held_in[owner] if table.holdings[i].source in ranks_on] for _, owner in missing}
    sent: Counter[str | int] = Counter()  # bytes per sending node and per sending rank
    received: Counter[int] = Counter()
    fetches: list[Fetch] = []
    for node, owner in sorted(missing, key=lambda each: (len(choices[each[1]]), -table.nbytes[each[1]], each[1], each)):
        if not choices[owner]:
            raise SourceUnavailableError(f"The shard of rank {owner} is held by no node that takes part in this start.")
        index = min(choices[owner], key=lambda i: (sent[table.holdings[i].source], i))
        holder = table.holdings[index]
        from_rank = min(ranks_on[holder.source], key=lambda rank: (sent[rank], rank))
        to_rank = owner if nodes[owner] == node else min(ranks_on[node], key=lambda rank: (received[rank], rank))
        nbytes = table.nbytes[owner]
        sent[holder.source] += nbytes
        sent[from_rank] += nbytes
        received[to_rank] += nbytes
        fetches.append(
            Fetch(
                owner,
                holder.source,
                holder.copies.node_id,
                holder.copies.tier,
                from_rank,
                node,
                to_rank,
                nbytes,
                table.digests[owner],
            )
        )
    return tuple(sorted(fetches, key=lambda fetch: (fetch.to_node, fetch.owner)))


def _spread(
    rebuilds: Sequence[Rebuild],
    missing: Sequence[tuple[str, int]],
    tier: Tier,
    ranks_on: Mapping[str, Sequence[int]],
) -> tuple[Fetch, ...]:
    """What was rebuilt, on its way to other nodes that need it."""
    made = {rebuild.owner: rebuild for rebuild in rebuilds}
    received: Counter[int] = Counter()
    fetches: list[Fetch] = []
    for node, owner in sorted(missing):
        rebuild = made[owner]
        if node == rebuild.node:
            continue
        to_rank = min(ranks_on[node], key=lambda rank: (received[rank], rank))
        received[to_rank] += rebuild.nbytes
        fetches.append(
            Fetch(owner, rebuild.node, rebuild.node, tier, rebuild.rank, node, to_rank, rebuild.nbytes, rebuild.digest)
        )
    return tuple(fetches)


def _verifications(
    local: Sequence[LocalCopy],
    fetches: Sequence[Fetch],
    nodes: Sequence[str],
    ranks_on: Mapping[str, Sequence[int]],
) -> tuple[Verify, ...]:
    """Who fetches a shard verifies it; a rank verifies its own; the rest goes to whoever on the node has least."""
    verify = [Verify(fetch.to_node, fetch.to_rank, fetch.owner) for fetch in fetches]
    hashed: Counter[int] = Counter()
    for fetch in fetches:
        hashed[fetch.to_rank] += fetch.nbytes
    others_last = sorted(local, key=lambda copy: (nodes[copy.owner] != copy.node, -copy.nbytes, copy.owner, copy.node))
    for copy in others_last:
        at_home = nodes[copy.owner] == copy.node
        rank = copy.owner if at_home else min(ranks_on[copy.node], key=lambda each: (hashed[each], each))
        hashed[rank] += copy.nbytes
        verify.append(Verify(copy.node, rank, copy.owner))
    return tuple(sorted(verify, key=lambda each: (each.node, each.owner)))
