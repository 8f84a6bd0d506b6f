"""Moving shards at a restart: each planned fetch from a holder to a rank that lacks it, hashed on arrival.

Pairs of ranks get a group of their own, in one order on all ranks. A holder that cannot read its copy says so in the
opening frame; what does not arrive, or does not match, is a strike against that copy and the election goes on without
it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from resilience.errors import CorruptCopyError, PeerLostError
from resilience.planning.retrieval import Fetch
from resilience.replication.communicator import Communicator, Links, Transfer
from resilience.snapshot.arena import Arena
from resilience.stores.digest import SegmentedDigest, segments

__all__ = ["Fetched", "run_fetches"]

_OPENING, _SEGMENT = 1, 2
_READY: Final = 0x52455349_46455443


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
    incoming: list[Fetch]


def run_fetches(
    fetches: Sequence[Fetch],
    communicator: Communicator,
    round_name: str,
    *,
    read: Callable[[Fetch], Arena],
    land: Callable[[Fetch], Arena],
    meanwhile: Callable[[], None],
) -> list[Fetched]:
    """Carry out the fetches that concern this rank. Called by every rank with the same list; pairs work in parallel.

    `read` maps this rank's copy (raising if it cannot), `land` gives a buffer, `meanwhile` is work of this rank's own
    to do while its copies are on their way. Raises PeerLostError if a peer died.
    """
    ways = _connect(fetches, communicator, round_name)
    failed = True
    try:
        posted = [(way, sent) for way in ways for fetch in way.outgoing for sent in _send(way, fetch, read)]
        opened = [(way, fetch, *_announce(way)) for way in ways for fetch in way.incoming]
        meanwhile()
        landing = [_open(way, fetch, opening, transfer, land) for way, fetch, opening, transfer in opened]
        fetched = [_finish(*one) for one in landing]
        for way, sent in posted:
            way.links.wait(sent)
        failed = False
        return fetched
    finally:
        for way in ways:  # a peer may be busy with others; its canary ends when it closes, at once if we failed
            way.links.close(failed=failed, linger_s=0.0)


def _connect(fetches: Sequence[Fetch], communicator: Communicator, round_name: str) -> list[_Way]:
    rank = communicator.rank
    pairs = sorted({(min(f.from_rank, f.to_rank), max(f.from_rank, f.to_rank)) for f in fetches})
    ways = []
    for pair in pairs:
        if rank not in pair:
            continue
        peer = pair[0] if pair[1] == rank else pair[1]
        links = communicator.links(f"{round_name}/{pair[0]}-{pair[1]}", pair)
        outgoing = [f for f in fetches if (f.from_rank, f.to_rank) == (rank, peer)]
        incoming = [f for f in fetches if (f.from_rank, f.to_rank) == (peer, rank)]
        ways.append(_Way(peer, links, outgoing, incoming))
    return ways


def _send(way: _Way, fetch: Fetch, read: Callable[[Fetch], Arena]) -> list[Transfer]:
    try:
        arena: Arena | None = read(fetch)
    except (OSError, CorruptCopyError):
        arena = None
    if arena is not None and arena.nbytes != fetch.nbytes:
        arena = None
    opening = torch.tensor([_READY if arena is not None else 0, fetch.owner], dtype=torch.int64)
    sent = [way.links.send(opening, way.peer, _OPENING)]
    if arena is not None:
        sent += [way.links.send(arena.segment(a, b), way.peer, _SEGMENT) for a, b in segments(fetch.nbytes)]
    return sent


def _announce(way: _Way) -> tuple[torch.Tensor, Transfer]:
    opening = torch.zeros(2, dtype=torch.int64)
    return opening, way.links.receive(opening, way.peer, _OPENING)


_Landing = tuple[_Way, Fetch, "Arena | None", list[tuple[Transfer, int, int]], str]


def _open(
    way: _Way, fetch: Fetch, opening: torch.Tensor, transfer: Transfer, land: Callable[[Fetch], Arena]
) -> _Landing:
    way.links.wait(transfer)
    ready, owner = opening.tolist()
    if owner != fetch.owner:
        raise PeerLostError(f"rank {way.peer} sent the shard of rank {owner}, not of {fetch.owner} as planned.")
    if ready != _READY:
        return way, fetch, None, [], f"{fetch.from_node} could not read its copy"
    arena = land(fetch)
    moves = [(way.links.receive(arena.segment(a, b), way.peer, _SEGMENT), a, b) for a, b in segments(fetch.nbytes)]
    return way, fetch, arena, moves, ""


def _finish(
    way: _Way, fetch: Fetch, arena: Arena | None, moves: Iterable[tuple[Transfer, int, int]], problem: str
) -> Fetched:
    if arena is None:
        return Fetched(fetch, None, problem)
    digest = SegmentedDigest()
    for transfer, start, stop in moves:
        way.links.wait(transfer)
        digest.add(arena.mapped.view[start:stop])
    if digest.value() != fetch.digest:
        return Fetched(fetch, arena, f"its bytes have digest {digest.value()}, the owner's is {fetch.digest}")
    return Fetched(fetch, arena)
