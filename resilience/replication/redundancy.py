"""What a rank does with its clique for each save, by scheme: replicas are sent and received, or parity is made.

One implementation per scheme behind one protocol, picked once, by name, when the links of an epoch are opened. What
schemes cost and where they put things is `planning/schemes.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, Protocol

from resilience.errors import PeerLostError
from resilience.planning.inventory import Kept, ParityCover, ParityName, SaveId
from resilience.planning.topology import Topology
from resilience.replication.clique import CliqueExchange, Offer
from resilience.replication.communicator import Links
from resilience.replication.pace import Pace
from resilience.replication.parity import ParityExchange
from resilience.replication.still import Still
from resilience.snapshot.arena import Arena
from resilience.snapshot.twins import Twins
from resilience.stores.digest import digest_of
from resilience.stores.keeper import ShardKeeper
from resilience.stores.parity_file import ParityHeader, parity_header

__all__ = ["REDUNDANCIES", "ParityRedundancy", "Redundancy", "ReplicaRedundancy", "UnequalCopiesError"]

Lacks = Callable[[Kept], bool]


class UnequalCopiesError(Exception):
    """What data-parallel ranks are said to have in common differs between them; ours, never a user's to meet."""


class Redundancy(Protocol):
    """The exchanges of one epoch's clique, in order. Used by the background worker alone."""

    @property
    def settles_first(self) -> bool:
        """Whether the owner's copy is to be committed before the exchange, and not when its bytes are on their way."""
        ...

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes of shards that were sent so far, and that need not be sent because holders composed them."""
        ...

    def protect(self, offer: Offer, lacks: Lacks, *, split: bool) -> list[str]:
        """One exchange, and the commit of what this rank keeps of it: why something is missing; nothing: all is there.

        `lacks`: whether this rank is still to have it (after a restart most is there already). Raises
        ExchangeBrokenError if the link broke: this exchange and the group are over; UnequalCopiesError if a replica
        that was composed from this rank's own state is not the owner's shard.
        """
        ...

    def close(self, *, failed: bool = False) -> None: ...


class ReplicaRedundancy:
    """Whole copies on other nodes."""

    def __init__(
        self, links: Links, rank: int, topology: Topology, pace: Pace, keeper: ShardKeeper, twins: Twins | None
    ) -> None:
        holders, sources = topology.holders[rank], topology.held()[rank]
        self._sources = sources
        algorithm, still = keeper.store.seal.digest_algorithm, Still(look_at_once=True)
        self._exchange = CliqueExchange(links, rank, holders, sources, pace, algorithm, still)
        self._keeper = keeper
        self._twins = twins

    @property
    def settles_first(self) -> bool:
        return self._exchange.capped

    @property
    def traffic(self) -> tuple[int, int]:
        return self._exchange.sent_bytes, self._exchange.spared_bytes

    def protect(self, offer: Offer, lacks: Lacks, *, split: bool) -> list[str]:
        held, came = self._held(offer), dict[int, int]()
        try:
            received, reasons = self._exchange.run(replace(offer, held=held), self._keeper)
            came = {got.owner: got.nbytes for got in received}
        finally:
            for owner, (slot, _) in held.items():  # that the exchange did not use; of another layout, it is over
                self._keeper.discard(owner, slot, reusable=came.get(owner, slot.nbytes) == slot.nbytes)
        problems = [f"rank {owner}: {reason}" for owner, reason in reasons.items() if lacks(owner)]
        for got in received:
            if not lacks(got.owner):  # sent for another holder's sake, after a restart
                self._keeper.discard(got.owner, got.slot, reusable=True)
                continue
            if self._twins is not None:
                self._twins.learn(got.owner, got.slot.mapped.view)
            try:
                self._keeper.commit(offer.save, got.owner, got.slot, got.digest, role="replica", split=split)
            except OSError as error:
                self._keeper.discard(got.owner, got.slot, reusable=True)
                problems.append(f"replica of rank {got.owner}: {error}")
        for owner in self._exchange.unequal:
            if self._twins is not None:
                self._twins.forget(owner)
        if self._exchange.unequal:
            owners = ", ".join(map(str, sorted(self._exchange.unequal)))
            raise UnequalCopiesError(f"what this rank has in common with rank {owners} is not equal to it any more")
        return problems

    def _held(self, offer: Offer) -> dict[int, tuple[Arena, SaveId]]:
        """Buffers that have shards of earlier saves, for those owners of whom nothing was composed."""
        found = {owner: self._keeper.holding_slot(owner) for owner in self._sources if owner not in offer.twins}
        return {owner: slot for owner, slot in found.items() if slot is not None}

    def close(self, *, failed: bool = False) -> None:
        self._exchange.close(failed=failed)


class ParityRedundancy:
    """Parity over the clique's shards: xor or rs, as the topology says."""

    settles_first = True  # what it covers is announced by digest before a byte goes
    traffic = (0, 0)  # nothing of it can be spared

    def __init__(
        self, links: Links, rank: int, topology: Topology, pace: Pace, keeper: ShardKeeper, twins: Twins | None
    ) -> None:
        members = topology.clique_of(rank)
        self._exchange = ParityExchange(links, rank, members, topology.parities, pace)
        self._keeper = keeper
        self._index = members.index(rank)
        self._name = ParityName(members[0], self._index)
        self._world_size = topology.world_size

    def protect(self, offer: Offer, lacks: Lacks, *, split: bool) -> list[str]:
        landed: list[Arena] = []

        def land(cover: ParityCover, nbytes: int) -> Arena:
            landed.append(self._keeper.slot(self._name, nbytes))
            return landed[-1]

        try:
            made, problems = self._exchange.run(offer, land if lacks(self._name) else None)
            if made is not None and not problems:
                self._commit(offer, made.cover, made.slot, split=split)
                landed.clear()
        except PeerLostError:
            raise
        except OSError as error:
            problems = [f"parity: {error}"]
        finally:
            for slot in landed:  # only we write into it
                self._keeper.discard(self._name, slot, reusable=True)
        return problems if lacks(self._name) else []

    def close(self, *, failed: bool = False) -> None:
        self._exchange.close(failed=failed)

    def _commit(self, offer: Offer, cover: ParityCover, slot: Arena, *, split: bool) -> None:
        keeper, algorithm = self._keeper, self._keeper.store.seal.digest_algorithm
        header = ParityHeader(keeper.store.run_id, offer.save, self._index, self._world_size, cover)
        content = parity_header(header)
        slot.mapped.view[: len(content)] = content
        if keeper.holds(offer.save, self._name):  # of another clique, or struck off
            keeper.give_up(offer.save, self._name)
        keeper.commit_parity(offer.save, cover, slot, digest_of(slot.mapped.view, algorithm), split=split)


#: By the name that `redundancy` gives.
REDUNDANCIES: Final[Mapping[str, Callable[[Links, int, Topology, Pace, ShardKeeper, Twins | None], Redundancy]]] = {
    "replica": ReplicaRedundancy,
    "xor": ParityRedundancy,
    "rs": ParityRedundancy,
}
