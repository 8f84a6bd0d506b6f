"""Shards of another world size on this rank: copies verified here, what they show of themselves, bytes brought over.

    show    verify the copies that fell to this rank, and tell all ranks what is in them
    bring   every rank says which segments it needs; each goes once to each node that needs it and has no copy of its
            own, into memory that the node's ranks map; every byte is held against the owner's digest before it counts

Collective over all ranks. A rank that fails in a step says so in it, so that nobody waits for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from resilience.errors import CorruptCopyError, DivergedRanksError, MemoryBudgetError, ResilienceError
from resilience.job import Job
from resilience.planning.assembly import Assembly, Move, Shown, plan_moves, readers
from resilience.planning.decision import Strike
from resilience.planning.inventory import SaveId, Tier
from resilience.planning.retrieval import Fetch, LocalCopy
from resilience.planning.typed_json import from_json
from resilience.replication.communicator import Agreements, Communicator, PeerFailedError
from resilience.replication.retrieval import Fetched, run_fetches
from resilience.runtime.threads import SYSTEM_THREADS, Threads
from resilience.snapshot.arena import Arena, bytes_of
from resilience.snapshot.loader import OpenShard, open_shard
from resilience.stores.digest import SEGMENT_BYTES, algorithm_of, combined, segment_digests
from resilience.stores.keeper import ShardKeeper
from resilience.stores.node_reader import NodeReader, locate_copy

__all__ = ["BadCopiesError", "ShardBringer", "share"]

_ROUND_BYTES = 64 << 20  # what all ranks together say in one round
_LEAST_BYTES = 1 << 20


class BadCopiesError(CorruptCopyError):
    """Copies that turned out bad while a save was being brought together, the same on all ranks."""

    def __init__(self, message: str, strikes: Sequence[Strike]) -> None:
        super().__init__(message)
        self.strikes = tuple(strikes)


@dataclass
class _Brought:
    """Segments of one shard that were brought to this node: where each lies in `content`."""

    content: torch.Tensor
    places: Mapping[int, int] = field(default_factory=dict)


class ShardBringer:
    """One start's. Every method that says so is collective."""

    def __init__(
        self,
        job: Job,
        communicator: Communicator,
        setup: Agreements,
        readers: Sequence[NodeReader],
        keeper: ShardKeeper,
        available: Callable[[], Mapping[str, int | None]],
        tell: Callable[..., None],
        threads: Threads = SYSTEM_THREADS,
    ) -> None:
        """`available`: free bytes of this node by place, see `runtime.memory.available_bytes`."""
        self._job = job
        self._communicator = communicator
        self._setup = setup
        self._readers = tuple(readers)
        self._keeper = keeper
        self._available = available
        self._tell = tell
        self._threads = threads
        self._opened: dict[Path, OpenShard] = {}
        self._verified: dict[tuple[SaveId, int, str, Tier], tuple[bytes, ...]] = {}
        self._landed: list[Arena] = []
        self._brought: dict[int, _Brought] = {}
        self._rounds = 0
        self.retrieved_bytes = 0
        self.own_copies = 0
        self.replica_copies = 0

    # -- verifying ----------------------------------------------------------------------------------------------------

    def verify_shown(self, save: SaveId, assembly: Assembly) -> list[Strike]:
        """Hash the copies that this rank shows to the others; those that are bad come back. Local."""
        return self._strikes(save, assembly, [shown for shown in assembly.shown if shown.rank == self._job.rank])

    def shown(self, save: SaveId, assembly: Assembly) -> list[tuple[Shown, OpenShard, tuple[bytes, ...]]]:
        """The verified copies that this rank shows, with the digests of their segments. Local; after `verify_shown`."""
        mine = [each for each in assembly.shown if each.rank == self._job.rank]
        return [(each, self._open(save, assembly, each), self._digests(save, each)) for each in mine]

    def _strikes(self, save: SaveId, assembly: Assembly, copies: Sequence[Shown | LocalCopy]) -> list[Strike]:
        strikes: list[Strike] = []
        for copy in copies:
            try:
                self._verify(save, assembly, copy)
            except (ResilienceError, OSError) as error:
                strikes.append(Strike(copy.node_dir, copy.tier, save, copy.owner))
                self._tell("warning", what=f"a copy is bad and struck off: {error}", advice="")
        return strikes

    def _verify(self, save: SaveId, assembly: Assembly, copy: Shown | LocalCopy) -> None:
        key = (save, copy.owner, copy.node_dir, copy.tier)
        if key in self._verified:
            return
        shard = self._open(save, assembly, copy)
        digests = tuple(segment_digests(shard.mapped.view, algorithm_of(copy.digest)))
        found = combined(digests, algorithm_of(copy.digest))
        if found != copy.digest:
            path = shard.mapped.path
            self._opened.pop(path).close()
            raise CorruptCopyError(f"{path} has digest {found}, its owner computed {copy.digest}.")
        self._verified[key] = digests

    def _digests(self, save: SaveId, copy: Shown | LocalCopy) -> tuple[bytes, ...]:
        return self._verified[save, copy.owner, copy.node_dir, copy.tier]

    def _open(self, save: SaveId, assembly: Assembly, copy: Shown | LocalCopy) -> OpenShard:
        location = locate_copy(self._readers, save, copy.owner, assembly.world_size, copy.node_dir, copy.tier)
        if location.path not in self._opened:
            self._opened[location.path] = open_shard(location.path, self._keeper.store.fs, location.record)
        return self._opened[location.path]

    # -- bringing -----------------------------------------------------------------------------------------------------

    def bring(
        self,
        save: SaveId,
        assembly: Assembly,
        wanted: Callable[[], Mapping[int, set[int]]],
        digests: Mapping[int, tuple[bytes, ...]],
    ) -> None:
        """Have the segments that this rank wants, by owner, at hand. Collective.

        `digests`: of all segments of each shard, which were seen to give its owner's digest. BadCopiesError on all
        ranks if a copy that was used is bad.
        """
        self.let_go()
        told = share(self._setup, lambda: _packed(wanted()))
        asked = [_unpacked(payload, digests) for payload in told]
        nodes = self._job.nodes
        moves = plan_moves(assembly, nodes, asked)
        share(self._setup, lambda: self._check_room(save, moves))
        strikes: list[Strike] = []

        def verify_local() -> None:
            strikes.extend(self._verify_local(save, assembly, asked))

        def move() -> bytes:
            arrived = self._move(save, assembly, moves, digests, verify_local)
            strikes.extend(self._land(save, arrived))
            return json.dumps([[each.where, each.tier, each.owner] for each in strikes]).encode()

        told = share(self._setup, move)
        heard = [from_json(tuple[tuple[str, Tier, int], ...], payload, "a rank's strikes") for payload in told]
        bad = {Strike(where, tier, save, owner) for strikes_there in heard for where, tier, owner in strikes_there}
        if bad:
            named = ", ".join(sorted(f"rank {each.owner}'s on {each.where}" for each in bad)[:5])
            raise BadCopiesError(f"copies of iteration {save.iteration} are bad: {named}", sorted(bad, key=repr))
        share(self._setup, lambda: self._map(save, assembly, asked, moves))

    def content(self, owner: int, low: int, high: int) -> torch.Tensor:
        """Bytes `low` to `high` of a shard, whose segments were brought or lie here."""
        brought = self._brought[owner]
        first = low // SEGMENT_BYTES
        start = brought.places[first] + low - first * SEGMENT_BYTES if brought.places else low
        return brought.content[start : start + high - low]

    def let_go(self) -> None:
        """Free what was brought. Local."""
        self._brought.clear()
        for arena in self._landed:
            arena.close()
            self._keeper.store.fs.unlink(arena.mapped.path)
        self._landed.clear()

    def close(self) -> None:
        """Free everything. Local, after every rank of the node loaded."""
        self.let_go()
        for shard in self._opened.values():
            shard.close()
        self._opened.clear()
        self._verified.clear()

    def _check_room(self, save: SaveId, moves: Sequence[Move]) -> bytes:
        """What comes to this node has to fit beside what is there. By the node's leader; MemoryBudgetError."""
        if not self._job.leads_node:
            return b""
        needed = sum(_nbytes(move) for move in moves if move.to_node == self._job.node_id)
        if not needed:
            return b""
        what = f"{needed} bytes of shards of iteration {save.iteration} are fetched for this load, then freed"
        self._tell("memory", what=what)
        room = self._available()  # they land among the arenas: in memory, if any directory of the node is
        places = ("disk",) if room.get("shared_memory") is None else ("memory", "shared_memory")
        free = [found for place in places if (found := room.get(place)) is not None]
        if free and needed > min(free):
            raise MemoryBudgetError(
                f"The node cannot take in what it needs: {what}, and {min(free)} are free.",
                advice="Start on more nodes, or resume from a persistent checkpoint (ckpt_step).",
            )
        return b""

    def _verify_local(self, save: SaveId, assembly: Assembly, asked: Sequence[Mapping[int, set[int]]]) -> list[Strike]:
        """Copies of this node's own that its ranks want, as far as they fell to this rank."""
        falls_to = readers(assembly, self._job.nodes, [list(each) for each in asked])
        mine = [
            copy
            for copy in assembly.local
            if copy.node == self._job.node_id and falls_to.get((copy.node, copy.owner)) == self._job.rank
        ]
        self.own_copies = len(mine)
        return self._strikes(save, assembly, mine)

    def _move(
        self,
        save: SaveId,
        assembly: Assembly,
        moves: Sequence[Move],
        digests: Mapping[int, tuple[bytes, ...]],
        meanwhile: Callable[[], None],
    ) -> list[Fetched]:
        self._rounds += 1
        by_place = {(move.owner, move.to_node): move for move in moves}
        fetches = []
        for move in moves:
            source = move.source
            parts = (digests[move.owner][number] for number in move.segments)
            digest = combined(parts, algorithm_of(source.digest))
            fetches.append(
                Fetch(
                    move.owner,
                    source.node,
                    source.node_dir,
                    source.tier,
                    move.from_rank,
                    move.to_node,
                    move.to_rank,
                    _nbytes(move),
                    digest,
                )
            )

        def read(fetch: Fetch) -> _Segments:
            move = by_place[fetch.owner, fetch.to_node]
            return _Segments(self._open(save, assembly, move.source), move.segments)

        def land(fetch: Fetch) -> Arena:
            path = self._landing(fetch.owner)
            self._keeper.store.fs.unlink(path)
            arena = Arena(self._keeper.store.fs.begin_mapping(path, fetch.nbytes))
            self._landed.append(arena)
            return arena

        return run_fetches(
            fetches, self._communicator, f"assemble/{self._rounds}", read=read, land=land,
            reserve=self._keeper.reserve_room, meanwhile=meanwhile, threads=self._threads,
        )  # fmt: skip

    def _land(self, save: SaveId, arrived: Sequence[Fetched]) -> list[Strike]:
        """What came is held against the digest by now; what did not come, or differs, is struck off."""
        strikes: list[Strike] = []
        for got in arrived:
            if got.problem or got.arena is None:
                fetch = got.fetch
                strikes.append(Strike(fetch.from_dir, fetch.tier, save, fetch.owner))
                self._tell(
                    "warning", what=f"rank {fetch.owner}'s shard from {fetch.from_node}: {got.problem}", advice=""
                )
                continue
            self.retrieved_bytes += got.fetch.nbytes
            self.replica_copies += 1
        return strikes

    def _map(
        self, save: SaveId, assembly: Assembly, asked: Sequence[Mapping[int, set[int]]], moves: Sequence[Move]
    ) -> bytes:
        """Every rank of the node looks at the same bytes: the node's own copy, or what one of its ranks received."""
        node, fs = self._job.node_id, self._keeper.store.fs
        here = {copy.owner: copy for copy in assembly.local if copy.node == node}
        landed = {arena.mapped.path: arena for arena in self._landed}
        coming = {move.owner: move for move in moves if move.to_node == node}
        for owner in asked[self._job.rank]:
            if owner in here:
                self._brought[owner] = _Brought(self._open(save, assembly, here[owner]).content())
                continue
            path = self._landing(owner)
            mapped = landed[path].mapped if path in landed else fs.open_mapping(path)
            places = {number: place * SEGMENT_BYTES for place, number in enumerate(coming[owner].segments)}
            self._brought[owner] = _Brought(bytes_of(mapped), places)
        return b""

    def _landing(self, owner: int) -> Path:
        """Swept by the next start, should this one die."""
        return self._keeper.arena_dir / f"landing-{owner:05d}.arena"


class _Segments:
    """Some segments of a verified shard, one after the other as they land."""

    def __init__(self, shard: OpenShard, numbers: Sequence[int]) -> None:
        self._content = shard.content()
        self._numbers = tuple(numbers)
        self.nbytes = sum(self._length(number) for number in numbers)

    def segment(self, start: int, stop: int) -> torch.Tensor:
        begin = self._numbers[start // SEGMENT_BYTES] * SEGMENT_BYTES
        return self._content[begin : begin + stop - start]

    def _length(self, number: int) -> int:
        return min(SEGMENT_BYTES, len(self._content) - number * SEGMENT_BYTES)


def _nbytes(move: Move) -> int:
    return sum(min(SEGMENT_BYTES, move.source.nbytes - number * SEGMENT_BYTES) for number in move.segments)


def _packed(wanted: Mapping[int, set[int]]) -> bytes:
    return json.dumps([[owner, sorted(numbers)] for owner, numbers in sorted(wanted.items())]).encode()


def _unpacked(payload: bytes, digests: Mapping[int, Sequence[bytes]]) -> dict[int, set[int]]:
    """What another rank wants; DivergedRanksError if it speaks of segments that no shard has."""
    told = from_json(tuple[tuple[int, tuple[int, ...]], ...], payload, "the segments that a rank wants")
    wanted = {owner: set(numbers) for owner, numbers in told}
    if not all(numbers <= set(range(len(digests.get(owner, ())))) for owner, numbers in wanted.items()):
        raise DivergedRanksError("a rank asks for segments that no shard has.")
    return wanted


def share(group: Agreements, make: Callable[[], bytes]) -> list[bytes]:
    """What every rank made, in rounds of bounded size. Collective; if one could not make its own, all raise.

    That rank raises why, the others PeerFailedError.
    """
    problem: Exception | None = None
    mine = b""
    try:
        mine = make()
    except Exception as error:  # noqa: BLE001  (whatever it is, the others wait for this rank's answer)
        problem = error
    word = json.dumps([len(mine), problem is not None]).encode()
    told = [from_json(tuple[int, bool], each, "how much a rank has to say") for each in group.gather(word)]
    if problem is not None:
        raise problem
    if any(failed for _, failed in told):
        raise PeerFailedError("another rank could not bring together what it needs.")
    most = max(size for size, _ in told)
    piece = max(_LEAST_BYTES, _ROUND_BYTES // group.size)
    parts: list[list[bytes]] = [[] for _ in told]
    for start in range(0, most, piece):
        for rank, content in enumerate(group.gather(mine[start : start + piece])):
            parts[rank].append(content)
    return [b"".join(each) for each in parts]
