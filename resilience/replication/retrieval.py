"""Moving shards at a restart: each planned fetch from a holder to a rank that lacks it, hashed on arrival.

Pairs of ranks get a group of their own, in one order on all ranks. A holder that cannot read its copy says so in the
opening frame; what does not arrive, or does not match, is a strike against that copy and the election goes on without
it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch

from resilience.errors import CorruptCopyError, PeerLostError
from resilience.planning.retrieval import Fetch
from resilience.replication.communicator import PROVED_TAG, Communicator, Links, Transfer
from resilience.replication.landing import Landing, Reserve
from resilience.runtime.threads import SYSTEM_THREADS, Threads
from resilience.snapshot.arena import Arena
from resilience.stores.digest import SegmentedDigest, algorithm_of, segments

__all__ = ["Fetched", "Sendable", "run_fetches"]

_OPENING, _SEGMENT = 1, PROVED_TAG
_READY: Final = 0x52455349_46455443
_AHEAD: Final = 4  # segments that are under way before the first of them is waited for and hashed


class Sendable(Protocol):
    """Bytes of a copy that are asked for: a whole shard, or some segments of it as if they lay one after the other."""

    @property
    def nbytes(self) -> int: ...
    def segment(self, start: int, stop: int) -> torch.Tensor: ...


@dataclass(frozen=True)
class Fetched:
    """One fetch's outcome on the receiving rank: the verified bytes, or what went wrong (`problem`).

    Where there is a problem, `arena` is a buffer that was given for it and is of no use.
    """

    fetch: Fetch
    arena: Arena | None
    problem: str = ""


@dataclass
class _Way:
    """The link between this rank and one peer, and what goes over it."""

    peer: int
    links: Links
    outgoing: list[Fetch]


def run_fetches(
    fetches: Sequence[Fetch],
    communicator: Communicator,
    round_name: str,
    *,
    read: Callable[[Fetch], Sendable],
    land: Callable[[Fetch], Arena],
    reserve: Reserve,
    meanwhile: Callable[[], None],
    threads: Threads = SYSTEM_THREADS,
) -> list[Fetched]:
    """Carry out the fetches that concern this rank. Called by every rank with the same list; pairs work in parallel.

    `read` maps this rank's copy (raising if it cannot), `land` gives a buffer and `reserve` room in it, both in threads
    of their own; `meanwhile` is work of this rank's own to do while its copies are on their way. Raises PeerLostError
    if a peer died, StoreError if there is no room.
    """
    incoming = [fetch for fetch in fetches if fetch.to_rank == communicator.rank]
    landing = Landing(incoming, land, reserve, threads)
    ways: dict[int, _Way] = {}
    failed = True
    try:
        ways = _connect(fetches, communicator, round_name)
        posted = [(way, sent) for way in ways.values() for fetch in way.outgoing for sent in _send(way, fetch, read)]
        expected = [_expect(ways[fetch.from_rank], fetch) for fetch in incoming]
        meanwhile()
        fetched = _receive(expected, landing)
        for way, sent in posted:
            way.links.wait(sent)
        failed = False
        return fetched
    finally:
        for (
            way
        ) in ways.values():  # a peer may be busy with others; its canary ends when it closes, at once if we failed
            way.links.close(failed=failed, linger_s=0.0)
        landing.close()


def _connect(fetches: Sequence[Fetch], communicator: Communicator, round_name: str) -> dict[int, _Way]:
    rank = communicator.rank
    pairs = sorted({(min(f.from_rank, f.to_rank), max(f.from_rank, f.to_rank)) for f in fetches})
    ways = {}
    for pair in pairs:
        if rank not in pair:
            continue
        peer = pair[0] if pair[1] == rank else pair[1]
        links = communicator.links(f"{round_name}/{pair[0]}-{pair[1]}", pair)
        outgoing = [f for f in fetches if (f.from_rank, f.to_rank) == (rank, peer)]
        ways[peer] = _Way(peer, links, outgoing)
    return ways


def _send(way: _Way, fetch: Fetch, read: Callable[[Fetch], Sendable]) -> list[Transfer]:
    try:
        arena: Sendable | None = read(fetch)
    except (OSError, CorruptCopyError):
        arena = None
    if arena is not None and arena.nbytes != fetch.nbytes:
        arena = None
    opening = torch.tensor([_READY if arena is not None else 0, fetch.owner], dtype=torch.int64)
    sent = [way.links.send(opening, way.peer, _OPENING)]
    if arena is not None:
        sent += [way.links.send(arena.segment(a, b), way.peer, _SEGMENT) for a, b in segments(fetch.nbytes)]
    return sent


@dataclass
class _Expected:
    """A fetch that is on its way here. `problem`: why it does not come, or is of no use."""

    way: _Way
    fetch: Fetch
    opening: torch.Tensor
    announced: Transfer
    problem: str = ""
    arena: Arena | None = None
    digest: SegmentedDigest = field(init=False)

    def __post_init__(self) -> None:
        self.digest = SegmentedDigest(algorithm_of(self.fetch.digest))

    def outcome(self) -> Fetched:
        if not self.problem and self.digest.value() != self.fetch.digest:
            self.problem = f"its bytes have digest {self.digest.value()}, the owner's is {self.fetch.digest}"
        return Fetched(self.fetch, self.arena, self.problem)


def _expect(way: _Way, fetch: Fetch) -> _Expected:
    opening = torch.zeros(2, dtype=torch.int64)
    return _Expected(way, fetch, opening, way.links.receive(opening, way.peer, _OPENING))


def _receive(expected: Sequence[_Expected], landing: Landing) -> list[Fetched]:
    """Post each segment as soon as there is room for it; hash what arrived while later ones are on their way."""
    under_way: deque[tuple[_Expected, Transfer, memoryview]] = deque()
    for one in expected:
        _hear(one)
        for start, stop in segments(one.fetch.nbytes):
            one.arena = arena = landing.next()
            if one.problem:
                continue
            move = one.way.links.receive(arena.segment(start, stop), one.way.peer, _SEGMENT)
            under_way.append((one, move, arena.mapped.view[start:stop]))
            if len(under_way) > _AHEAD:
                _finish(*under_way.popleft())
    while under_way:
        _finish(*under_way.popleft())
    return [one.outcome() for one in expected]


def _hear(one: _Expected) -> None:
    """Whether the holder sends it."""
    one.way.links.wait(one.announced)
    ready, owner = one.opening.tolist()
    if owner != one.fetch.owner:
        raise PeerLostError(f"rank {one.way.peer} sent the shard of rank {owner}, not of {one.fetch.owner} as planned.")
    if ready != _READY:
        one.problem = f"{one.fetch.from_node} could not read its copy"


def _finish(one: _Expected, move: Transfer, content: memoryview) -> None:
    one.way.links.wait(move)
    one.digest.add(content)
