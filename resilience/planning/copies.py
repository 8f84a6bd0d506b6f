"""Which copies of one save's shards can be used, and whose shards have none: completeness of a save on the nodes.

A shard without a copy is not missing where the parity of its clique and the members that are left give it back.

A copy counts if it belongs to this run, this very attempt and this world size, was not struck off, and carries the
digest that its owner computed at the seal. Without a primary in sight all copies must agree; where they do not, nobody
can tell which is right, and none counts. Copies of one save may be spread over any nodes and over both node tiers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from resilience.planning.decision import Strike
from resilience.planning.erasure import LARGEST_CLIQUE, Code
from resilience.planning.inventory import TIERS, Inventory, NodeSave, ParityCover, SaveId, Tier


@dataclass(frozen=True)
class Holding:
    """One node's copies of the save, and the source (the node of today) through which they can be read."""

    source: str
    copies: NodeSave


@dataclass(frozen=True)
class ParityGroup:
    """The usable parity of one clique. `held_in`: by member, indexes into the table's `holdings`."""

    cover: ParityCover
    held_in: tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class CopyTable:
    """All usable copies of one save. Per owner: its digest ("" if unknown), its size, and indexes into `holdings`.

    `rebuilt_from`: for each owner without a copy whose shard can be rebuilt, the parity that does it.
    """

    save: SaveId
    holdings: tuple[Holding, ...]
    digests: tuple[str, ...]
    nbytes: tuple[int, ...]
    held_in: tuple[tuple[int, ...], ...]
    conflicting: tuple[int, ...]
    rebuilt_from: Mapping[int, ParityGroup]

    @property
    def missing(self) -> tuple[int, ...]:
        """Owners without a usable copy, or parity that rebuilds one; none: the save is complete."""
        return tuple(owner for owner, held in enumerate(self.held_in) if not held and owner not in self.rebuilt_from)

    def tier(self) -> Tier:
        """The slowest tier that a load of this complete save needs."""
        ranks = [TIERS.index(holding.copies.tier) for holding in self.holdings]
        parity = [held for group in self.rebuilt_from.values() for held in group.held_in]
        return TIERS[max(min(ranks[i] for i in held) for held in (*self.held_in, *parity) if held)]


def holdings_of(inventories: Sequence[Inventory], run_id: str, world_size: int) -> dict[SaveId, tuple[Holding, ...]]:
    """Every node save of this run and world size, grouped; in an order that does not depend on who answered first."""
    found: dict[SaveId, list[Holding]] = {}
    for inventory in inventories:
        for copies in inventory.node_saves:
            if copies.run_id == run_id and copies.world_size == world_size:
                found.setdefault(copies.save, []).append(Holding(inventory.source, copies))
    return {save: tuple(sorted(held, key=_place)) for save, held in found.items()}


def world_sizes(inventories: Sequence[Inventory], run_id: str) -> dict[SaveId, int]:
    """How many ranks took each node save of this run. Linear.

    An attempt has one world size. Should records say otherwise, the size that most copies name counts (of equally many
    the smallest), and the copies of others do not belong to the save.
    """
    told: dict[SaveId, Counter[int]] = {}
    for inventory in inventories:
        for copies in inventory.node_saves:
            if copies.run_id == run_id:
                told.setdefault(copies.save, Counter())[copies.world_size] += len(copies.owners) + len(copies.parity)
    return {save: min(sizes, key=lambda size: (-sizes[size], size)) for save, sizes in told.items()}


def _place(holding: Holding) -> tuple[str, int, str]:
    return holding.source, TIERS.index(holding.copies.tier), holding.copies.node_id


def copy_table(
    save: SaveId, holdings: tuple[Holding, ...], world_size: int, strikes: Collection[Strike] = ()
) -> CopyTable:
    """Judge the copies in `holdings`; linear in their number."""
    digests, conflicting = _trusted_digests(holdings, world_size)
    struck = _struck(save, strikes)
    nbytes = [0] * world_size
    held_in: list[list[int]] = [[] for _ in range(world_size)]
    for index, holding in enumerate(holdings):
        copies = holding.copies
        here = struck.get((copies.node_id, copies.tier), ())
        if None in here:
            continue
        for owner, digest, size, role in zip(copies.owners, copies.digests, copies.nbytes, copies.roles, strict=True):
            known = role != "parity" and 0 <= owner < world_size and owner not in conflicting
            if known and (owner, False) not in here and digest == digests[owner]:
                held_in[owner].append(index)
                nbytes[owner] = size
    rebuilt_from: dict[int, ParityGroup] = {}
    if not all(held_in):
        groups = _parity_groups(holdings, world_size, struck)
        rebuilt_from, unsure = _rebuildable(groups, digests, conflicting, held_in)
        conflicting |= unsure
    for owner, group in rebuilt_from.items():
        place = group.cover.members.index(owner)
        digests[owner], nbytes[owner] = group.cover.digests[place], group.cover.nbytes[place]
    return CopyTable(
        save,
        holdings,
        tuple(digests),
        tuple(nbytes),
        tuple(map(tuple, held_in)),
        tuple(sorted(conflicting)),
        rebuilt_from,
    )


#: By node directory and tier: the owners whose shard (or, True, whose parity) is struck off there; None: everything.
_Struck = Mapping[tuple[str, Tier], Collection[tuple[int, bool] | None]]


def _struck(save: SaveId, strikes: Collection[Strike]) -> _Struck:
    struck: dict[tuple[str, Tier], set[tuple[int, bool] | None]] = {}
    for strike in strikes:
        if strike.save == save:
            what = None if strike.owner is None else (strike.owner, strike.parity)
            struck.setdefault((strike.where, strike.tier), set()).add(what)
    return struck


def _parity_groups(holdings: Sequence[Holding], world_size: int, struck: _Struck) -> list[ParityGroup]:
    """The parity that can be used, by what it covers."""
    found: dict[ParityCover, list[list[int]]] = {}
    for index, holding in enumerate(holdings):
        copies = holding.copies
        here = struck.get((copies.node_id, copies.tier), ())
        for parity in () if None in here else copies.parity:
            members = parity.cover.members
            if members[-1] < world_size and len(members) <= LARGEST_CLIQUE and (parity.keeper, True) not in here:
                held = found.setdefault(parity.cover, [[] for _ in members])
                held[parity.index].append(index)
    return [ParityGroup(cover, tuple(map(tuple, held))) for cover, held in sorted(found.items(), key=_by_members)]


def _by_members(entry: tuple[ParityCover, object]) -> tuple[tuple[int, ...], int, tuple[str, ...]]:
    return entry[0].members, entry[0].parities, entry[0].digests


def _rebuildable(
    groups: Sequence[ParityGroup],
    digests: Sequence[str],
    conflicting: Collection[int],
    held_in: Sequence[Sequence[int]],
) -> tuple[dict[int, ParityGroup], set[int]]:
    """Whose lost shards follow from what; and the owners of whom two cliques' parity says different things.

    Parity of which any owner's own record says another digest was made of something else.
    """
    by: dict[int, ParityGroup] = {}
    unsure: set[int] = set()
    for group in groups:
        cover = group.cover
        pairs = list(zip(cover.members, cover.digests, strict=True))
        if any(digests[member] not in ("", digest) for member, digest in pairs):
            continue
        shards = [place for place, (member, _) in enumerate(pairs) if held_in[member]]
        parity = [place for place, held in enumerate(group.held_in) if held]
        code = Code(len(pairs), cover.parities)
        for place, (member, digest) in enumerate(pairs):
            if held_in[member] or member in conflicting or code.recover(place, shards, parity) is None:
                continue
            other = by.setdefault(member, group).cover
            if other.digests[other.members.index(member)] != digest:
                unsure.add(member)
    return {owner: group for owner, group in by.items() if owner not in unsure}, unsure


def _trusted_digests(holdings: Sequence[Holding], world_size: int) -> tuple[list[str], set[int]]:
    """Per owner the primary's digest, else the one that all replicas share; and the owners whose records conflict.

    A struck primary still speaks: its bytes failed, not its record, which has a checksum of its own.
    """
    primary: dict[int, str] = {}
    replica: dict[int, str] = {}
    primaries_differ: set[int] = set()
    replicas_differ: set[int] = set()
    for holding in holdings:
        copies = holding.copies
        for owner, digest, role in zip(copies.owners, copies.digests, copies.roles, strict=True):
            if role == "primary":
                if primary.setdefault(owner, digest) != digest:
                    primaries_differ.add(owner)
            elif role == "replica" and replica.setdefault(owner, digest) != digest:
                replicas_differ.add(owner)
    digests = [primary.get(owner, replica.get(owner, "")) for owner in range(world_size)]
    return digests, primaries_differ | (replicas_differ - primary.keys())
