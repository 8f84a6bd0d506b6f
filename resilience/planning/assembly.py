"""How shards of another world size are brought together: who shows which of them, and who sends which bytes to whom.

No rank of today stands where a rank of the save stood, so that which bytes a rank needs is known only once it has seen
what each shard holds. Hence two plans. `plan_showing`, from the inventories alone: one verified copy of every shard is
shown by one rank, spread over the holders. `plan_moves`, from what every rank then asks for: each segment of a shard
goes once to each node that needs it and has no copy of its own. Both are pure: equal inputs give equal plans.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from resilience.errors import SourceUnavailableError
from resilience.planning.copies import copy_table, holdings_of
from resilience.planning.decision import Candidate, Strike
from resilience.planning.inventory import TIERS, Inventory, Tier
from resilience.planning.rebuilding import Rebuild, plan_rebuilds
from resilience.planning.retrieval import LocalCopy

__all__ = ["Assembly", "Move", "Shown", "plan_missing", "plan_moves", "plan_showing", "readers"]


@dataclass(frozen=True)
class Shown:
    """The copy of `owner`'s shard that `rank` verifies, tells the others about, and sends from."""

    owner: int
    node: str
    node_dir: str
    tier: Tier
    rank: int
    nbytes: int
    digest: str


@dataclass(frozen=True)
class Assembly:
    """How a save of `world_size` ranks is read by another number of ranks.

    `shown`: one copy of every shard, by owner. `local`: all copies that nodes have themselves, the best one of each
    shard; a node reads these where it needs them, and verifies them first.
    """

    world_size: int
    shown: tuple[Shown, ...] = ()
    local: tuple[LocalCopy, ...] = ()


@dataclass(frozen=True)
class Move:
    """Segments of one shard that travel once between two nodes, between these two ranks; ascending numbers.

    They are read from the copy `source`, which nobody need have verified: each segment is held against its own digest.
    """

    source: LocalCopy
    from_rank: int
    to_rank: int
    to_node: str
    segments: tuple[int, ...]

    @property
    def owner(self) -> int:
        return self.source.owner


def plan_showing(
    chosen: Candidate, inventories: Sequence[Inventory], *, nodes: Sequence[str], strikes: Collection[Strike] = ()
) -> Assembly:
    """For an elected save on nodes. `nodes` names the node of each rank of this start.

    Shards with least choice first, each at the holder that has least to show. SourceUnavailableError if a shard is held
    only where no rank runs.
    """
    if chosen.run_id is None or chosen.world_size is None:
        raise ValueError("a save on nodes has a run and a world size")
    holdings = holdings_of(inventories, chosen.run_id, chosen.world_size).get(chosen.save, ())
    table = copy_table(chosen.save, holdings, chosen.world_size, strikes)
    ranks_on: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks_on.setdefault(node, []).append(rank)
    best: dict[tuple[str, int], LocalCopy] = {}
    for owner, held_in in enumerate(table.held_in):
        for held in (table.holdings[index] for index in held_in):
            node, copies = held.source, held.copies
            if node not in ranks_on:
                continue
            copy = LocalCopy(node, owner, copies.node_id, copies.tier, table.nbytes[owner], table.digests[owner])
            known = best.setdefault((node, owner), copy)
            if _order(copy) < _order(known):
                best[node, owner] = copy
    choices: dict[int, list[LocalCopy]] = {owner: [] for owner in range(chosen.world_size)}
    for (_, owner), copy in sorted(best.items()):
        choices[owner].append(copy)
    shown: list[Shown] = []
    load: Counter[str | int] = Counter()  # bytes by node and by rank
    for owner in sorted(choices, key=lambda each: (len(choices[each]), -table.nbytes[each], each)):
        if not choices[owner]:
            raise SourceUnavailableError(f"The shard of rank {owner} is held by no node that takes part in this start.")
        copy = min(choices[owner], key=lambda each: (TIERS.index(each.tier), load[each.node], each.node))
        rank = min(ranks_on[copy.node], key=lambda each: (load[each], each))
        load[copy.node] += copy.nbytes
        load[rank] += copy.nbytes
        shown.append(Shown(owner, copy.node, copy.node_dir, copy.tier, rank, copy.nbytes, copy.digest))
    return Assembly(
        chosen.world_size,
        tuple(sorted(shown, key=lambda each: each.owner)),
        tuple(best[key] for key in sorted(best)),
    )


def plan_missing(
    chosen: Candidate, inventories: Sequence[Inventory], *, nodes: Sequence[str], strikes: Collection[Strike] = ()
) -> tuple[Rebuild, ...]:
    """What has to be rebuilt from parity before the shards can be shown. Raises as `plan_showing`.

    One shard for each rank at most: the next round of the election sees these as copies, and plans for the rest.
    """
    if chosen.run_id is None or chosen.world_size is None:
        raise ValueError("a save on nodes has a run and a world size")
    holdings = holdings_of(inventories, chosen.run_id, chosen.world_size).get(chosen.save, ())
    table = copy_table(chosen.save, holdings, chosen.world_size, strikes)
    ranks_on: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks_on.setdefault(node, []).append(rank)
    homes = dict(zip(sorted(table.rebuilt_from), range(len(nodes)), strict=False))
    return plan_rebuilds(table, homes, nodes, ranks_on)


def _order(copy: LocalCopy) -> tuple[int, bool, str]:
    """The cheapest tier, then the directory that bears the node's name."""
    return TIERS.index(copy.tier), copy.node_dir != copy.node, copy.node_dir


def readers(assembly: Assembly, nodes: Sequence[str], wanted: Sequence[Collection[int]]) -> dict[tuple[str, int], int]:
    """Which rank of a node sees to a shard that ranks of the node want: (node, owner) → rank.

    `wanted`: owners, by rank. Who shows the very copy of the node, else whoever on the node has least to see to.
    """
    size = {shown.owner: shown.nbytes for shown in assembly.shown}
    shown_at = {(shown.node, shown.owner): shown.rank for shown in assembly.shown}
    load: Counter[int] = Counter()
    found: dict[tuple[str, int], int] = {}
    asked = sorted({(nodes[rank], owner) for rank, owners in enumerate(wanted) for owner in owners})
    ranks_on: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks_on.setdefault(node, []).append(rank)
    for node, owner in asked:
        if (node, owner) in shown_at:
            found[node, owner] = shown_at[node, owner]
            continue
        rank = min(ranks_on[node], key=lambda each: (load[each], each))
        load[rank] += size[owner]
        found[node, owner] = rank
    return found


def plan_moves(
    assembly: Assembly, nodes: Sequence[str], wanted: Sequence[Mapping[int, Collection[int]]]
) -> tuple[Move, ...]:
    """What travels. `wanted`: by rank, the segments of each owner's shard that it needs.

    From the holder that has least to send, as `plan_retrieval` spreads whole shards: those with least choice first.
    """
    holders: dict[int, list[LocalCopy]] = {}
    for copy in assembly.local:
        holders.setdefault(copy.owner, []).append(copy)
    here = {(copy.node, copy.owner) for copy in assembly.local}
    receiver = readers(assembly, nodes, [list(each) for each in wanted])
    needed: dict[tuple[str, int], set[int]] = {}
    ranks_on: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks_on.setdefault(node, []).append(rank)
        for owner, numbers in wanted[rank].items():
            if (node, owner) not in here and numbers:
                needed.setdefault((node, owner), set()).update(numbers)
    sent: Counter[str | int] = Counter()  # segments, by node and by rank
    moves: list[Move] = []
    for node, owner in sorted(needed, key=lambda each: (len(holders[each[1]]), -len(needed[each]), each)):
        source = min(holders[owner], key=lambda each: (sent[each.node], TIERS.index(each.tier), each.node))
        rank = min(ranks_on[source.node], key=lambda each: (sent[each], each))
        segments = tuple(sorted(needed[node, owner]))
        sent[source.node] += len(segments)
        sent[rank] += len(segments)
        moves.append(Move(source, rank, receiver[node, owner], node, segments))
    return tuple(sorted(moves, key=lambda move: (move.to_node, move.owner)))
