"""Which copies of one save's shards can be used, and whose shards have none: completeness of a save on the nodes.

A copy counts if it belongs to this run, this very attempt and this world size, was not struck off, and carries the
digest that its owner computed at the seal. Without a primary in sight all copies must agree; where they do not, nobody
can tell which is right, and none counts. Copies of one save may be spread over any nodes and over both node tiers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from resilience.planning.decision import Strike
from resilience.planning.inventory import TIERS, Inventory, NodeSave, SaveId, Tier


@dataclass(frozen=True)
class Holding:
    """One node's copies of the save, and the source (the node of today) through which they can be read."""

    source: str
    copies: NodeSave


@dataclass(frozen=True)
class CopyTable:
    """All usable copies of one save. Per owner: its digest ("" if unknown), its size, and indexes into `holdings`."""

    save: SaveId
    holdings: tuple[Holding, ...]
    digests: tuple[str, ...]
    nbytes: tuple[int, ...]
    held_in: tuple[tuple[int, ...], ...]
    conflicting: tuple[int, ...]

    @property
    def missing(self) -> tuple[int, ...]:
        """Owners without a usable copy; none: the save is complete."""
        return tuple(owner for owner, held in enumerate(self.held_in) if not held)

    def tier(self) -> Tier:
        """The slowest tier that a load of this complete save needs."""
        ranks = [TIERS.index(holding.copies.tier) for holding in self.holdings]
        return TIERS[max(min(ranks[i] for i in held) for held in self.held_in)]


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
                told.setdefault(copies.save, Counter())[copies.world_size] += len(copies.owners)
    return {save: min(sizes, key=lambda size: (-sizes[size], size)) for save, sizes in told.items()}


def _place(holding: Holding) -> tuple[str, int, str]:
    return holding.source, TIERS.index(holding.copies.tier), holding.copies.node_id


def copy_table(
    save: SaveId, holdings: tuple[Holding, ...], world_size: int, strikes: Collection[Strike] = ()
) -> CopyTable:
    """Judge the copies in `holdings`; linear in their number."""
    digests, conflicting = _trusted_digests(holdings, world_size)
    struck: dict[tuple[str, Tier], set[int | None]] = {}
    for strike in strikes:
        if strike.save == save:
            struck.setdefault((strike.where, strike.tier), set()).add(strike.owner)
    nbytes = [0] * world_size
    held_in: list[list[int]] = [[] for _ in range(world_size)]
    for index, holding in enumerate(holdings):
        copies = holding.copies
        here = struck.get((copies.node_id, copies.tier), ())
        if None in here:
            continue
        for owner, digest, size, role in zip(copies.owners, copies.digests, copies.nbytes, copies.roles, strict=True):
            if role == "parity" or not 0 <= owner < world_size or owner in here or owner in conflicting:
                continue
            if digest == digests[owner]:
                held_in[owner].append(index)
                nbytes[owner] = size
    return CopyTable(
        save, holdings, tuple(digests), tuple(nbytes), tuple(map(tuple, held_in)), tuple(sorted(conflicting))
    )


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
