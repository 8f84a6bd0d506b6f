"""Bringing an elected save's shards together on this rank's node: verify what is here, fetch what is not.

Each copy is hashed by exactly one rank of the node that uses it. Copies that fail come back as strikes; what is
verified stays so over the rounds of an election.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from resilience.errors import CorruptCopyError, ResilienceError, StoreError, UnsafePathError
from resilience.job import Job
from resilience.planning.decision import Strike
from resilience.planning.inventory import Kept, Role, SaveId, Tier
from resilience.planning.rebuilding import Rebuild, Source
from resilience.planning.retrieval import Fetch, LocalCopy, RetrievalPlan
from resilience.planning.topology import Topology
from resilience.replication.communicator import Communicator
from resilience.replication.rebuilding import Rebuilt, run_rebuilds
from resilience.replication.retrieval import Fetched, run_fetches
from resilience.runtime.threads import SYSTEM_THREADS, Threads
from resilience.snapshot.arena import Arena
from resilience.snapshot.loader import OpenShard, open_shard
from resilience.stores.digest import algorithm_of, digest_of
from resilience.stores.filesystem import MappedFile
from resilience.stores.keeper import ShardKeeper
from resilience.stores.node_reader import CopyLocation, locate_copy
from resilience.stores.node_store import NodeStore
from resilience.stores.parity_file import check_parity_header, read_parity_header
from resilience.stores.records import ShardRecord
from resilience.stores.shard_file import ShardHeader, read_header

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
        self._readers = tuple(store.reader for store in stores)
        self._keeper = keeper
        self._sources = topology.held()[job.rank]
        self._tell = tell
        self._opened: dict[Path, OpenShard] = {}
        self._verified: dict[tuple[SaveId, int], OpenShard] = {}
        self._landed: dict[tuple[SaveId, int], OpenShard] = {}  # fetched, in mappings that the keeper owns
        self._loose: dict[tuple[SaveId, int], Arena] = {}  # of those, what this node's directory did not take
        self._parity: dict[Path, MappedFile] = {}  # that rebuilds read, proved
        self._borrowed: list[tuple[SaveId, int]] = []  # fetched for the load only
        self.retrieved_bytes = 0
        self.rebuilt = 0  # shards that this rank made from parity
        self.rebuilding_bytes = 0  # that came from other nodes for it
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

    def rebuild(self, save: SaveId, plan: RetrievalPlan, split: bool, round_name: str) -> list[Strike]:
        """After `obtain`, if the plan has rebuilds: make this rank's shard from parity, and read for those of others.

        What is not sound comes back; parity from which a wrong shard was made, too. Errors as of `obtain`.
        """

        def keep(made: Rebuilt) -> None:
            self._accept(save, made.rebuild.owner, made.arena, made.rebuild.digest, split)

        return self._rebuild(
            save, plan, round_name, self._job.world_size,
            lambda rebuild: self._keeper.slot(rebuild.owner, rebuild.nbytes), keep,
            lambda made: self._keeper.discard(made.rebuild.owner, made.arena, reusable=True),
        )  # fmt: skip

    def rebuild_foreign(self, save: SaveId, plan: RetrievalPlan, world_size: int, round_name: str) -> list[Strike]:
        """As `rebuild`, of a save that `world_size` ranks took: what this rank makes becomes a copy on its node.

        It goes with the others of that save.
        """
        store, fs = self._keeper.store, self._keeper.store.fs

        def land(rebuild: Rebuild) -> Arena:
            path = self._keeper.arena_dir / f"rebuilt-{rebuild.owner:05d}.arena"
            fs.unlink(path)
            return Arena(fs.create_mapping(path, rebuild.nbytes))

        def keep(made: Rebuilt) -> None:
            rebuild, view = made.rebuild, made.arena.mapped.view
            header = read_header(view, f"the shard of rank {rebuild.owner}")
            if (header.save, header.owner, header.world_size) != (save, rebuild.owner, world_size):
                raise CorruptCopyError("its header speaks of another save.")
            record = ShardRecord(
                store.run_id, save, rebuild.owner, world_size, "replica", store.tier, store.node_id, rebuild.nbytes,
                rebuild.digest, self._keeper.now(), split=len(header.group) > 1,
            )  # fmt: skip
            if self._keeper.file_is_arena:
                store.commit_file(made.arena.mapped.path, record)
                made.arena.close()
            else:
                store.commit_bytes(view, record)
                drop(made)

        def drop(made: Rebuilt) -> None:
            made.arena.close()
            fs.unlink(made.arena.mapped.path)

        return self._rebuild(save, plan, round_name, world_size, land, keep, drop)

    def _rebuild(
        self,
        save: SaveId,
        plan: RetrievalPlan,
        round_name: str,
        world_size: int,
        land: Callable[[Rebuild], Arena],
        keep: Callable[[Rebuilt], None],
        drop: Callable[[Rebuilt], None],
    ) -> list[Strike]:
        made, bad = run_rebuilds(
            plan.rebuilds,
            self._communicator,
            round_name,
            read=lambda source: self._prove(save, source, world_size),
            land=land,
        )
        strikes = [_strike(save, source) for source in bad]
        if made is None:
            return strikes
        problem = made.problem
        try:
            if not problem:
                keep(made)
                self.rebuilt += 1
                self.rebuilding_bytes += sum(made.rebuild.travelling().values())
        except CorruptCopyError as error:
            problem, made = str(error), replace(made, wrong=True)
        if problem:
            drop(made)
            self._tell("warning", what=f"rank {made.rebuild.owner}'s shard could not be rebuilt: {problem}", advice="")
        if made.wrong:
            strikes += [_strike(save, source) for source in made.rebuild.sources if source.parity]
        return strikes

    def spread(self, save: SaveId, plan: RetrievalPlan, split: bool, round_name: str) -> list[Strike]:
        """After `rebuild`: bring what was rebuilt to the other nodes that need it. Errors as of `obtain`.

        What does not arrive whole is this start's trouble, and no copy's.
        """
        arrived = run_fetches(
            plan.spread,
            self._communicator,
            round_name,
            read=lambda fetch: Arena(self._rebuilt(save, fetch.owner).mapped),
            land=lambda fetch: self._keeper.slot(fetch.owner, fetch.nbytes, reserved=False),
            reserve=self._keeper.reserve_room,
            meanwhile=lambda: None,
        )
        for got in arrived:
            self._take(save, got, split)
        return []

    def loose(self, save: SaveId) -> tuple[tuple[int, str], ...]:
        """Owners whose shards this rank holds in buffers alone, with the buffers' paths: no copies, but they load."""
        return tuple((owner, str(arena.mapped.path)) for (of, owner), arena in self._loose.items() if of == save)

    def borrow(self, save: SaveId, loose: Iterable[tuple[int, str]]) -> None:
        """Map what other ranks of this node hold in buffers alone, and proved. CorruptCopyError, StoreError."""
        for owner, path in loose:
            if (save, owner) in self._landed:
                continue
            mapped = self._keeper.store.fs.open_mapping(Path(path))
            self._opened[Path(path)] = shard = OpenShard(self._header_of(save, owner, mapped), mapped)
            self._landed[save, owner] = shard

    def drop_bad_copies(self, strikes: Iterable[Strike]) -> None:
        """Remove what was struck off in this node's own directory, if it is bad and not merely out of reach.

        Else it would count as a replica again. A primary stays: its record alone says what its owner's digest was. One
        rank per node, before the last agreement of the restore.
        """
        if not self._job.leads_node:
            return
        for strike in strikes:
            if strike.where != self._job.node_id or strike.owner is None or strike.parity:
                continue  # parity that was struck off is made anew
            for store in self._stores:
                try:
                    place = store.reader.locate(strike.save, strike.owner, self._job.world_size, strike.where)
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
        for mapped in self._parity.values():
            mapped.close()
        self._parity.clear()
        self._verified.clear()
        self._landed.clear()
        for (_, owner), arena in self._loose.items():
            self._keeper.discard(owner, arena, reusable=True)
        self._loose.clear()
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

    def _locate(self, save: SaveId, kept: Kept, node_dir: str, tier: Tier) -> CopyLocation:
        return locate_copy(self._readers, save, kept, self._job.world_size, node_dir, tier)

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
        self._accept(save, fetch.owner, got.arena, fetch.digest, split)
        self.retrieved_bytes += fetch.nbytes
        self.roles.append("fetched")

    def _accept(self, save: SaveId, owner: int, arena: Arena, digest: str, split: bool) -> None:
        """Commit bytes that have the owner's digest; where this node's directory refuses, they are there to be loaded.

        A full disk keeps a node from holding copies, and not from training: what it lacks is told.
        """
        header = self._header_of(save, owner, arena.mapped)
        role: Role = "primary" if owner == self._job.rank else "replica"
        try:
            self._keeper.commit(save, owner, arena, digest, role=role, split=split)
        except UnsafePathError:
            raise
        except StoreError as error:
            self._hold(save, owner, arena, header)
            self._tell("warning", what=f"rank {owner}'s shard is loaded and not kept on {self._job.node_id}: {error}",
                       advice="Saves fail there until it is mended.")  # fmt: skip
            return
        if self._keeper.file_is_arena:  # its pages are mapped already; on a disk the buffer is free for others now
            self._landed[save, owner] = OpenShard(header, arena.mapped)
        if role == "replica" and owner not in self._sources:
            self._borrowed.append((save, owner))

    def _hold(self, save: SaveId, owner: int, arena: Arena, header: ShardHeader) -> None:
        """For the load alone; `close` gives the buffer back."""
        before = self._loose.pop((save, owner), None)  # of an earlier round of this election
        if before is not None:
            self._keeper.discard(owner, before, reusable=True)
        self._loose[save, owner] = arena
        self._landed[save, owner] = OpenShard(header, arena.mapped)

    def _header_of(self, save: SaveId, owner: int, mapped: MappedFile) -> ShardHeader:
        header = read_header(mapped.view, f"the shard of rank {owner}")
        if (header.save, header.owner, header.world_size) != (save, owner, self._job.world_size):
            raise CorruptCopyError("its header speaks of another save.")
        return header

    def _rebuilt(self, save: SaveId, owner: int) -> OpenShard:
        landed = self._landed.get((save, owner))
        return landed if landed is not None else self._open(self._fetched(save, owner))

    def _prove(self, save: SaveId, source: Source, world_size: int) -> Arena:
        """Map a file that a rebuild reads, and hash it unless that was done already. CorruptCopyError, StoreError."""
        location = locate_copy(self._readers, save, source.kept, world_size, source.node_dir, source.tier)
        if not source.parity:
            shard = self._open(location)
            if self._verified.get((save, source.owner)) is not shard:
                _compare(location, shard.digest(), source.digest)
            return Arena(shard.mapped)
        mapped = self._parity.get(location.path)
        if mapped is None:
            mapped = self._keeper.store.fs.open_mapping(location.path)
            self._parity[location.path] = mapped
            check_parity_header(
                read_parity_header(mapped.view, str(location.path)), location.record, str(location.path)
            )
            _compare(location, digest_of(mapped.view, algorithm_of(source.digest)), source.digest)
        return Arena(mapped)


def _compare(location: CopyLocation, found: str, expected: str) -> None:
    if not found == location.record.digest == expected:
        raise CorruptCopyError(f"{location.path} has digest {found}, {expected} was computed when it was made.")


def _strike(save: SaveId, source: Source) -> Strike:
    return Strike(source.node_dir, source.tier, save, source.owner, source.parity)
