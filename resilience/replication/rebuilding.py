"""Rebuilding lost shards at a restart: the sources stream their parts of each piece, the owner's rank adds them up.

A source proves its file before it offers it, and says so; only when all of a rebuild's sources are sound does anything
travel. The sum is hashed as it grows and held against the digest that the owner computed at the seal. No rank holds
more of other ranks' bytes than a few pieces.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from resilience.errors import PeerLostError, ResilienceError
from resilience.planning.pacing import ring_piece_bytes
from resilience.planning.rebuilding import Rebuild, RebuiltPiece, Source
from resilience.replication.communicator import Communicator, Links, Transfer
from resilience.replication.lanes import Bytes, Combiner
from resilience.snapshot.arena import Arena
from resilience.stores.digest import SegmentedDigest, algorithm_of, segments

__all__ = ["Rebuilt", "run_rebuilds"]

_OFFER, _ANSWER, _PIECE = 1, 5, 6  # none is `PROVED_TAG`
_READY: Final = 0x52455349_5245424C


@dataclass(frozen=True)
class Rebuilt:
    """This rank's rebuild: the bytes, or what went wrong. `wrong`: the sources were sound, and the sum is not."""

    rebuild: Rebuild
    arena: Arena
    problem: str = ""
    wrong: bool = False


def run_rebuilds(
    rebuilds: Sequence[Rebuild],
    communicator: Communicator,
    round_name: str,
    *,
    read: Callable[[Source], Arena],
    land: Callable[[Rebuild], Arena],
) -> tuple[Rebuilt | None, list[Source]]:
    """Carry out what concerns this rank: its own rebuild, if there is one, and the sources it reads for others'.

    Called by every rank with the same list. `read` maps a file and proves it (raising if it is not sound), `land` gives
    a buffer. Returns also this rank's sources that are not sound. PeerLostError if a peer died; StoreError if there is
    no room (the others are told that nothing is rebuilt here).
    """
    rank = communicator.rank
    links: dict[int, Links] = {}
    failed = True
    try:
        links.update(_connect(rebuilds, communicator, round_name))
        files, bad = _prove(rebuilds, rank, read)
        sent = _offer(rebuilds, rank, files, links)
        mine = next((rebuild for rebuild in rebuilds if rebuild.rank == rank), None)
        arena, problem, no_room = None, "", None
        if mine is not None:
            problem = _hear(mine, rank, files, links)
            try:
                arena = land(mine)
            except OSError as error:
                no_room = error
            sent += _answer(mine, rank, links, go=not problem and arena is not None)
        sent += _send(rebuilds, rank, files, links)
        rebuilt = None
        if mine is not None and arena is not None:
            rebuilt = Rebuilt(mine, arena, problem) if problem else _receive(mine, rank, files, links, arena)
        for peer, transfer in sent:
            links[peer].wait(transfer)
        failed = False
        if no_room is not None:
            raise no_room
        return rebuilt, bad
    finally:
        for each in links.values():
            each.close(failed=failed, linger_s=0.0)


class _GrowingDigest:
    """Hashes a buffer's segments as soon as they are filled."""

    def __init__(self, content: memoryview, algorithm: str) -> None:
        self._content = content
        self._left = deque(segments(len(content)))
        self._digest = SegmentedDigest(algorithm)

    def reach(self, filled: int) -> None:
        while self._left and self._left[0][1] <= filled:
            start, stop = self._left.popleft()
            self._digest.add(self._content[start:stop])

    def value(self) -> str:
        return self._digest.value()


def _connect(rebuilds: Sequence[Rebuild], communicator: Communicator, round_name: str) -> dict[int, Links]:
    """One group per pair, in one order on all ranks."""
    rank = communicator.rank
    pairs = {
        (min(source.rank, rebuild.rank), max(source.rank, rebuild.rank))
        for rebuild in rebuilds
        for source in rebuild.sources
        if source.rank != rebuild.rank
    }
    return {
        (pair[0] if pair[1] == rank else pair[1]): communicator.links(f"{round_name}/{pair[0]}-{pair[1]}", pair)
        for pair in sorted(pairs)
        if rank in pair
    }


def _prove(
    rebuilds: Sequence[Rebuild], rank: int, read: Callable[[Source], Arena]
) -> tuple[dict[Source, Arena], list[Source]]:
    """This rank's source files, each proved once, and those that are not sound."""
    files: dict[Source, Arena] = {}
    bad: list[Source] = []
    for source in dict.fromkeys(source for rebuild in rebuilds for source in rebuild.sources if source.rank == rank):
        try:
            arena = read(source)
        except (ResilienceError, OSError):
            bad.append(source)
            continue
        if arena.nbytes == source.nbytes:
            files[source] = arena
        else:
            bad.append(source)
    return files, bad


def _sources_of(rebuild: Rebuild, rank: int) -> list[int]:
    return [number for number, source in enumerate(rebuild.sources) if source.rank == rank]


def _peers(rebuild: Rebuild) -> list[int]:
    """The other ranks that read for it."""
    return sorted({source.rank for source in rebuild.sources} - {rebuild.rank})


_Sent = list[tuple[int, Transfer]]


def _offer(rebuilds: Sequence[Rebuild], rank: int, files: dict[Source, Arena], links: dict[int, Links]) -> _Sent:
    """Tell each rank that rebuilds whether all that is read for it here is sound."""
    sent: _Sent = []
    for rebuild in rebuilds:
        if rebuild.rank != rank and rank in _peers(rebuild):
            sound = all(rebuild.sources[number] in files for number in _sources_of(rebuild, rank))
            frame = torch.tensor([_READY if sound else 0, rebuild.owner], dtype=torch.int64)
            sent.append((rebuild.rank, links[rebuild.rank].send(frame, rebuild.rank, _OFFER)))
    return sent


def _hear(mine: Rebuild, rank: int, files: dict[Source, Arena], links: dict[int, Links]) -> str:
    """Whether all sources are sound; else what is wrong."""
    frames = {peer: torch.zeros(2, dtype=torch.int64) for peer in _peers(mine)}
    expected = {peer: links[peer].receive(frames[peer], peer, _OFFER) for peer in frames}
    problem = ""
    if any(mine.sources[number] not in files for number in _sources_of(mine, rank)):
        problem = "what this node has for it cannot be read"
    for peer, frame in frames.items():
        links[peer].wait(expected[peer])
        ready, owner = frame.tolist()
        if owner != mine.owner:
            raise PeerLostError(f"rank {peer} offers for the shard of rank {owner}, not of {mine.owner}.", rank=peer)
        if ready != _READY:
            problem = problem or f"what rank {peer} has for it cannot be read, or is not what its record says"
    return problem


def _answer(mine: Rebuild, rank: int, links: dict[int, Links], *, go: bool) -> _Sent:
    frame = torch.tensor([_READY if go else 0, rank], dtype=torch.int64)
    return [(peer, links[peer].send(frame, peer, _ANSWER)) for peer in _peers(mine)]


def _send(rebuilds: Sequence[Rebuild], rank: int, files: dict[Source, Arena], links: dict[int, Links]) -> _Sent:
    """Post this rank's parts to those who want them, straight from the files."""
    sent: _Sent = []
    for rebuild in rebuilds:
        if rebuild.rank == rank or rank not in _peers(rebuild):
            continue
        way, answer = links[rebuild.rank], torch.zeros(2, dtype=torch.int64)
        way.wait(way.receive(answer, rebuild.rank, _ANSWER))
        if answer.tolist()[0] != _READY:
            continue
        own = set(_sources_of(rebuild, rank))
        for piece in rebuild.pieces(_piece_bytes(rebuild)):
            for part in piece.parts:
                if part.source in own:
                    content = files[rebuild.sources[part.source]].segment(part.start, part.stop)
                    sent.append((rebuild.rank, way.send(content, rebuild.rank, _PIECE)))
    return sent


@dataclass
class _Coming:
    """One piece that is on its way: per part its coefficient, its bytes, and the transfer that brings them."""

    piece: RebuiltPiece
    parts: list[tuple[int, Bytes]]
    transfers: list[tuple[int, Transfer]]


def _receive(mine: Rebuild, rank: int, files: dict[Source, Arena], links: dict[int, Links], arena: Arena) -> Rebuilt:
    """Add up the pieces; two are under way at a time."""
    piece_bytes = _piece_bytes(mine)
    combiner, digest = Combiner(piece_bytes), _GrowingDigest(arena.mapped.view, algorithm_of(mine.digest))
    count = len(mine.sources)
    buffers = [[torch.empty(piece_bytes, dtype=torch.uint8) for _ in range(count)] for _ in range(2)]
    under_way: deque[_Coming] = deque()

    def finish(coming: _Coming) -> None:
        for peer, transfer in coming.transfers:
            links[peer].wait(transfer)
        _store(combiner.combine(coming.piece.sum_bytes, coming.parts), coming.piece, arena.mapped.view)
        digest.reach(coming.piece.stop)

    for number, piece in enumerate(mine.pieces(piece_bytes)):
        if len(under_way) > 1:
            finish(under_way.popleft())
        coming = _Coming(piece, [], [])
        for part, buffer in zip(piece.parts, buffers[number % 2], strict=False):
            source = mine.sources[part.source]
            if source.rank == rank:
                content = files[source].segment(part.start, part.stop)
            else:
                content = buffer[: part.stop - part.start]
                transfer = links[source.rank].receive(content, source.rank, _PIECE)
                coming.transfers.append((source.rank, transfer))
            coming.parts.append((part.coefficient, content.numpy()))
        under_way.append(coming)
    while under_way:
        finish(under_way.popleft())
    found = digest.value()
    if found == mine.digest:
        return Rebuilt(mine, arena)
    problem = f"what was rebuilt has digest {found}, its owner computed {mine.digest}"
    return Rebuilt(mine, arena, problem, wrong=True)


def _store(total: Bytes, piece: RebuiltPiece, into: memoryview) -> None:
    into[piece.start : piece.stop] = total[: piece.stop - piece.start].data


def _piece_bytes(rebuild: Rebuild) -> int:
    return ring_piece_bytes(rebuild.code, rebuild.stripe_bytes, None)
