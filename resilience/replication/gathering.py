"""Bringing an elected save's shards together on this rank's node: verify what is here, fetch what is not.

Each copy is hashed by exactly one rank of the node that uses it. Copies that fail come back as strikes; what is
verified stays so over the rounds of an election.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from resilience.errors import CorruptCopyError, ResilienceError
from resilience.job import Job
from resilience.planning.decision import Strike
from resilience.planning.inventory import Role, SaveId, Tier
from resilience.planning.retrieval import Fetch, LocalCopy, RetrievalPlan
from resilience.planning.topology import Topology
from resilience.replication.communicator import Communicator
from resilience.replication.retrieval import Fetched, run_fetches
from resilience.runtime.threads import SYSTEM_THREADS, Threads
from resilience.snapshot.arena import Arena
from resilience.snapshot.loader import OpenShard, open_shard
from resilience.stores.keeper import ShardKeeper
from resilience.stores.node_store import CopyLocation, NodeStore, locate_copy
from resilience.stores.shard_file import read_header

__all__ = ["ShardGatherer"]


class ShardGatherer:
    """One restore's shards on one rank. `obtain` is called by all ranks with the same plan."""

    def __init__(
        self,
        job: Job,
        communicator: Communicator,
        stores: Sequence[NodeStore],
        keeper: ShardKeeper,
        topology: Topology,
        tell: Callable[..., None],
        threads: Threads = SYSTEM_THREADS,
    ) -> None:
        self._threads = threads
        self._job = job
        self._communicator = communicator
        self._stores = tuple(stores)
        self._keeper = keeper
        self._sources = topology.held()[job.rank]
        self._tell = tell
        self._opened: dict[Path, OpenShard] = {}
        self._verified: dict[tuple[SaveId, int], OpenShard] = {}
        self._landed: dict[tuple[SaveId, int], OpenShard] = {}  # fetched, in mappings that the keeper owns
        self._borrowed: list[tuple[SaveId, int]] = []  # fetched for the load only
        self.retrieved_bytes = 0
        self.roles: list[str] = []  # of the copies that this rank verified or fetched

    def obtain(self, save: SaveId, plan: RetrievalPlan, split: bool, round_name: str) -> list[Strike]:
        """Verify this rank's share and carry out its fetches. The copies that are bad come back.

        PeerLostError if a peer died, StoreError if this node cannot take in what arrived: then no copy is bad.
        """
        strikes: list[Strike] = []
        arrived = run_fetches(
            plan.fetches,
            self._communicator,
            round_name,
            read=lambda fetch: self._read(save, fetch),
            land=lambda fetch: self._keeper.slot(fetch.owner, fetch.nbytes, reserved=False),
            reserve=self._keeper.reserve_room,
            meanwhile=lambda: strikes.extend(self._verify_share(save, plan)),
            threads=self._threads,
        )
        problem: OSError | None = None
        for got in arrived:
            fetch = got.fetch
            try:
                self._take(save, got, split)
            except (CorruptCopyError, OSError) as error:
                if got.arena is not None:
                    self._keeper.discard(fetch.owner, got.arena, reusable=False)
                if isinstance(error, OSError):
                    problem = problem or error
                    continue
                strikes.append(Strike(fetch.from_dir, fetch.tier, save, fetch.owner))
                self._tell("warning", what=f"rank {fetch.owner}'s shard from {fetch.from_node}: {error}", advice="")
        if problem is not None:
            raise problem
        return strikes

    def _verify_share(self, save: SaveId, plan: RetrievalPlan) -> list[Strike]:
        """Hash the copies that fell to this rank; those that are bad come back."""
        strikes: list[Strike] = []
        fetched_here = {(fetch.to_node, fetch.owner) for fetch in plan.fetches}
        for task in plan.verify:
            if task.rank != self._job.rank or (task.node, task.owner) in fetched_here:
                continue
            copy = next(c for c in plan.local if (c.node, c.owner) == (task.node, task.owner))
            try:
                self._verify(save, copy)
            except (ResilienceError, OSError) as error:
                strikes.append(Strike(copy.node_dir, copy.tier, save, copy.owner))
                self._tell("warning", what=f"a copy is bad and struck off: {error}", advice="")
        return strikes

    def drop_bad_copies(self, strikes: Iterable[Strike]) -> None:
        """Remove what was struck off in this node's own directory, if it is bad and not merely out of reach.

        Else it would count as a replica again. A primary stays: its record alone says what its owner's digest was. One
        rank per node, before the last agreement of the restore.
        """
        if not self._job.leads_node:
            return
        for strike in strikes:
            if strike.where != self._job.node_id or strike.owner is None:
                continue
            for store in self._stores:
                try:
                    place = store.locate(strike.save, strike.owner, self._job.world_size, strike.where)
                    if place.record.role == "primary":
                        continue
                    shard = open_shard(place.path, store.fs, place.record)
                    bad = shard.digest() != place.record.digest
                    shard.close()
                except CorruptCopyError:
                    bad = True
                except (ResilienceError, OSError):
                    continue  # not there, or not readable: no proof that its bytes are bad
                if bad:
                    self._remove(store, strike.save, strike.owner)

    def _remove(self, store: NodeStore, save: SaveId, owner: int) -> None:
        """A mount that refuses is told of: by now every rank has loaded."""
        try:
            path = store.uncommit(save, owner, self._job.world_size)
            if path is not None:
                store.fs.unlink(path)
        except OSError as error:
            self._tell("warning", what=f"a bad copy of rank {owner}'s shard stays: {error}", advice="Remove it.")

    def shards(self, save: SaveId, plan: RetrievalPlan, owners: Sequence[int]) -> dict[int, OpenShard]:
        """The shards of `owners`, after every rank of the node obtained its share: mapped, headers checked."""
        copies = {copy.owner: copy for copy in plan.local if copy.node == self._job.node_id}
        found: dict[int, OpenShard] = {}
        for owner in owners:
            if (save, owner) in self._landed:
                found[owner] = self._landed[save, owner]
                continue
            if (save, owner) not in self._verified:
                location = self._fetched(save, owner) if owner not in copies else self._find(save, copies[owner])
                self._verified[save, owner] = self._open(location)
            found[owner] = self._verified[save, owner]
        return found

    def close(self) -> None:
        """Unmap; give up what was fetched only for the load. Local, after every rank of the node loaded."""
        for shard in self._opened.values():
            shard.close()
        self._opened.clear()
        self._verified.clear()
        self._landed.clear()
        for save, owner in self._borrowed:
            self._keeper.give_up(save, owner)
        self._borrowed.clear()

    def _verify(self, save: SaveId, copy: LocalCopy) -> None:
        if (save, copy.owner) in self._verified:
            return
        location = self._find(save, copy)
        shard = self._open(location)
        found = shard.digest()
        if not found == location.record.digest == copy.digest:
            self._opened.pop(location.path).close()
            raise CorruptCopyError(f"{location.path} has digest {found}, its owner computed {copy.digest}.")
        self._verified[save, copy.owner] = shard
        self.roles.append(location.record.role)

    def _find(self, save: SaveId, copy: LocalCopy | Fetch) -> CopyLocation:
        node_dir = copy.node_dir if isinstance(copy, LocalCopy) else copy.from_dir
        return self._locate(save, copy.owner, node_dir, copy.tier)

    def _locate(self, save: SaveId, owner: int, node_dir: str, tier: Tier) -> CopyLocation:
        return locate_copy(self._stores, save, owner, self._job.world_size, node_dir, tier)

    def _fetched(self, save: SaveId, owner: int) -> CopyLocation:
        """What a rank of this node fetched and committed."""
        return self._locate(save, owner, self._job.node_id, self._keeper.store.tier)

    def _read(self, save: SaveId, fetch: Fetch) -> Arena:
        """Map this node's copy for sending; the receiver proves the bytes."""
        return Arena(self._open(self._find(save, fetch)).mapped)

    def _open(self, location: CopyLocation) -> OpenShard:
        """The copy, mapped once for all that is done with it: sent, hashed, loaded."""
        shard = self._opened.get(location.path)
        if shard is None:
            shard = open_shard(location.path, self._keeper.store.fs, location.record)
            self._opened[location.path] = shard
        return shard

    def _take(self, save: SaveId, got: Fetched, split: bool) -> None:
        """Commit a fetched shard on this node: as primary, as a replica, or for the time of the load."""
        fetch = got.fetch
        if got.arena is None or got.problem:
            raise CorruptCopyError(got.problem)
        header = read_header(got.arena.mapped.view, f"the shard of rank {fetch.owner}")
        if (header.save, header.owner, header.world_size) != (save, fetch.owner, self._job.world_size):
            raise CorruptCopyError("its header speaks of another save.")
        self.retrieved_bytes += fetch.nbytes
        self.roles.append("fetched")
        role: Role = "primary" if fetch.owner == self._job.rank else "replica"
        self._keeper.commit(save, fetch.owner, got.arena, fetch.digest, role=role, split=split)
        if self._keeper.file_is_arena:  # its pages are mapped already; on a disk the buffer is free for others now
            self._landed[save, fetch.owner] = OpenShard(header, got.arena.mapped)
        if role == "replica" and fetch.owner not in self._sources:
            self._borrowed.append((save, fetch.owner))
