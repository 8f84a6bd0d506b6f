"""One exchange of shards among the ranks that hold each other's replicas.

Every agreed save causes exactly one exchange on every member, in the same order. Each owner opens with a fixed frame
(save, owner, bytes, state, size of a piece), sends its shard in pieces (32 MiB segments, or smaller ones under a cap of
the rate) and closes with a frame that carries its digest. A failed owner says "none" in the first or the last frame; it
is never silent. Receivers hash segments as they arrive, so that hashing hides behind the network, and refuse what does
not match: a replica is the owner's bytes or it is nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch

from resilience.errors import CorruptCopyError, PeerLostError
from resilience.planning.inventory import SaveId
from resilience.planning.pacing import is_piece
from resilience.replication.communicator import PROVED_TAG, Links, Transfer
from resilience.replication.pace import Pace
from resilience.snapshot.arena import Arena
from resilience.stores.digest import ALGORITHM, SegmentedDigest, is_digest, segments

__all__ = ["CliqueExchange", "ExchangeBrokenError", "Inbox", "Offer", "Received"]

_MAGIC: Final = 0x52455349_4C494531
_OPENING, _SEGMENT, _CLOSING = 1, PROVED_TAG, 3
_OPENING_WORDS: Final = 8
_CLOSING_BYTES: Final = 128
_LARGEST_SHARD: Final = 1 << 45


@dataclass(frozen=True)
class Offer:
    """What this rank sends: its sealed arena, or nothing (`arena` None: it failed, or nobody needs it)."""

    save: SaveId
    arena: Arena | None
    #: Called once, after the segments were posted: this rank's digest, or None if the save turned out void.
    digest: Callable[[], str | None]


@dataclass(frozen=True)
class Received:
    """One peer's shard, verified."""

    owner: int
    slot: Arena
    nbytes: int
    digest: str


class ExchangeBrokenError(PeerLostError):
    """The links broke during an exchange: how far the bytes to and from `rank`, the peer that was given up, had come.

    `rank` None: these links were closed before, or nobody knows.
    """

    def __init__(self, why: PeerLostError, received: tuple[int, int], sent: tuple[int, int]) -> None:
        """`received`, `sent`: bytes that arrived, and of how many."""
        super().__init__(str(why), rank=why.rank)
        self.received_bytes, self.expected_bytes = received
        self.sent_bytes, self.offered_bytes = sent  # of these it is known


class Inbox(Protocol):
    """Where received shards land."""

    def slot(self, owner: int, nbytes: int) -> Arena:
        """A warm buffer of exactly `nbytes` that nobody else uses; StoreError if there is no room."""
        ...

    def discard(self, owner: int, slot: Arena, *, reusable: bool) -> None:
        """What was received is of no use. Not `reusable`: a broken link may still write into it."""
        ...


@dataclass(frozen=True)
class _Piece:
    transfer: Transfer
    start: int
    stop: int


@dataclass
class _Incoming:
    owner: int
    opening: torch.Tensor
    closing: torch.Tensor
    opened: Transfer
    closed: Transfer | None = None
    slot: Arena | None = None
    sink: torch.Tensor | None = None  # when there is no room: the bytes are taken off the wire and dropped
    pieces: tuple[_Piece, ...] = ()
    nbytes: int = 0
    arrived: int = 0


@dataclass
class _Outgoing:
    """What was posted to the holders; `delivered` counts bytes of the shard by holder."""

    delivered: dict[int, int]
    nbytes: int = 0
    transfers: list[tuple[Transfer, int, int]] = field(default_factory=list)  # each with holder and bytes


class CliqueExchange:
    """The exchanges of one epoch's group, in order. Used by the background worker alone."""

    def __init__(
        self,
        links: Links,
        rank: int,
        holders: Sequence[int],
        sources: Sequence[int],
        pace: Pace,
        algorithm: str = ALGORITHM,
    ) -> None:
        """`holders` receive this rank's shard, `sources` send theirs here; `algorithm`: of the digests of all."""
        self._algorithm = algorithm
        self._links = links
        self._rank = rank
        self._holders = tuple(holders)
        self._sources = tuple(sources)
        self._pace = pace

    def run(self, offer: Offer, inbox: Inbox) -> tuple[list[Received], Mapping[int, str]]:
        """One exchange. Returns what arrived and verified, and for each other source the reason why not.

        Raises ExchangeBrokenError if the link broke: this exchange and the group are over, slots were discarded.
        """
        incoming: list[_Incoming] = []
        outgoing = _Outgoing(dict.fromkeys(self._holders, 0))
        try:
            return self._run(offer, inbox, incoming, outgoing)
        except PeerLostError as error:
            for one in incoming:
                if one.slot is not None:
                    inbox.discard(one.owner, one.slot, reusable=False)
            raise _broken(error, incoming, outgoing) from error

    def _run(
        self, offer: Offer, inbox: Inbox, incoming: list[_Incoming], outgoing: _Outgoing
    ) -> tuple[list[Received], Mapping[int, str]]:
        digest, decided = None, self._pace.capped
        if decided:  # the bytes will take long: the save is committed, or void, before they go
            digest = offer.digest()
            offer = offer if digest is not None else Offer(offer.save, None, offer.digest)
        for owner in self._sources:
            incoming.append(self._expect(owner))
        reasons: dict[int, str] = {}
        self._announce(offer, outgoing)
        for one in incoming:
            self._open(one, offer.save, inbox, reasons)
        self._send(offer.arena, outgoing)
        if not decided:
            digest = offer.digest()
        for peer in self._holders:
            outgoing.transfers.append((self._links.send(_closing(digest), peer, _CLOSING), peer, 0))
        received = [got for one in incoming if (got := self._finish(one, inbox, reasons)) is not None]
        for transfer, peer, nbytes in outgoing.transfers:
            self._links.wait(transfer)
            outgoing.delivered[peer] += nbytes
        return received, reasons

    @property
    def capped(self) -> bool:
        """Whether an exchange takes as long as its rate allows, and not as long as the network needs."""
        return self._pace.capped

    def close(self, *, failed: bool = False) -> None:
        self._links.close(failed=failed)

    def _expect(self, owner: int) -> _Incoming:
        opening = torch.zeros(_OPENING_WORDS, dtype=torch.int64)
        closing = torch.zeros(_CLOSING_BYTES, dtype=torch.uint8)
        return _Incoming(owner, opening, closing, self._links.receive(opening, owner, _OPENING))

    def _announce(self, offer: Offer, outgoing: _Outgoing) -> None:
        nbytes = 0 if offer.arena is None else offer.arena.nbytes
        outgoing.nbytes = nbytes
        piece = self._pace.piece(nbytes, len(self._holders))
        words = [_MAGIC, offer.save.iteration, offer.save.generation, self._rank, nbytes, int(nbytes > 0), piece, 0]
        opening = torch.tensor(words, dtype=torch.int64)
        for peer in self._holders:
            outgoing.transfers.append((self._links.send(opening, peer, _OPENING), peer, 0))

    def _send(self, arena: Arena | None, outgoing: _Outgoing) -> None:
        if arena is None:
            return
        for start, stop in _pieces(arena.nbytes, self._pace.piece(arena.nbytes, len(self._holders))):
            for peer in self._holders:
                self._pace.wait(stop - start)
                sent = self._links.send(arena.segment(start, stop), peer, _SEGMENT)
                outgoing.transfers.append((sent, peer, stop - start))

    def _open(self, one: _Incoming, save: SaveId, inbox: Inbox, reasons: dict[int, str]) -> None:
        """Read the opening frame and post the receives of what it announces."""
        self._links.wait(one.opened)
        magic, iteration, generation, owner, nbytes, sending, piece, *_ = one.opening.tolist()
        expected = (_MAGIC, save.iteration, save.generation, one.owner)
        if (
            (magic, iteration, generation, owner) != expected
            or not 0 <= nbytes <= _LARGEST_SHARD
            or not is_piece(piece)
        ):
            raise PeerLostError(
                f"rank {one.owner} sent the frame of another exchange (iteration {iteration}, generation {generation}, "
                f"owner {owner}); expected iteration {save.iteration}, generation {save.generation}",
                rank=one.owner,
            )
        one.closed = self._links.receive(one.closing, one.owner, _CLOSING)
        if not sending:
            reasons[one.owner] = "it has nothing to send for this save"
            return
        one.nbytes = nbytes
        try:
            one.slot = inbox.slot(one.owner, nbytes)
        except OSError as error:
            reasons[one.owner] = f"no room for its replica: {error}"
            one.sink = torch.empty(min(nbytes, piece), dtype=torch.uint8)
        one.pieces = tuple(
            _Piece(self._links.receive(self._landing(one, start, stop), one.owner, _SEGMENT), start, stop)
            for start, stop in _pieces(nbytes, piece)
        )

    def _landing(self, one: _Incoming, start: int, stop: int) -> torch.Tensor:
        if one.slot is not None:
            return one.slot.segment(start, stop)
        if one.sink is None:
            raise ValueError("a transfer without a place to land")
        return one.sink[: stop - start]

    def _arrive(self, one: _Incoming) -> str:
        """Wait for the pieces and hash each segment as soon as it is there."""
        digest = SegmentedDigest(self._algorithm)
        pieces = iter(one.pieces)
        for start, stop in segments(one.nbytes):
            while one.arrived < stop:
                piece = next(pieces)
                self._links.wait(piece.transfer)
                one.arrived = piece.stop
            if one.slot is not None:
                digest.add(one.slot.mapped.view[start:stop])
        return digest.value()

    def _finish(self, one: _Incoming, inbox: Inbox, reasons: dict[int, str]) -> Received | None:
        """Take in what arrives, read the closing frame, compare."""
        digest = self._arrive(one)
        if one.closed is None:
            raise ValueError("an exchange that was never opened")
        self._links.wait(one.closed)
        if one.slot is None:
            return None
        try:
            announced = _announced(one.closing)
        except CorruptCopyError as error:
            announced, reasons[one.owner] = None, str(error)
        if announced is not None and announced == digest:
            return Received(one.owner, one.slot, one.nbytes, announced)
        if announced is not None:
            reasons[one.owner] = f"its bytes arrived with digest {digest}, it announced {announced}"
        else:
            reasons.setdefault(one.owner, "it gave up this save")
        slot, one.slot = one.slot, None
        inbox.discard(one.owner, slot, reusable=True)
        return None


def _pieces(nbytes: int, piece_bytes: int) -> Iterator[tuple[int, int]]:
    """`(start, stop)` of each piece: none reaches over the end of a segment of the digest."""
    for start, stop in segments(nbytes):
        for at in range(start, stop, piece_bytes):
            yield at, min(at + piece_bytes, stop)


def _broken(error: PeerLostError, incoming: Sequence[_Incoming], outgoing: _Outgoing) -> ExchangeBrokenError:
    of_peer = [one for one in incoming if one.owner == error.rank]
    received = sum(one.arrived for one in of_peer), sum(one.nbytes for one in of_peer)
    sent = (0, 0)
    if error.rank in outgoing.delivered:
        sent = outgoing.delivered[error.rank], outgoing.nbytes
    return ExchangeBrokenError(error, received, sent)


def _closing(digest: str | None) -> torch.Tensor:
    text = (digest or "none").encode()
    return torch.frombuffer(bytearray(text.ljust(_CLOSING_BYTES, b" ")), dtype=torch.uint8)


def _announced(frame: torch.Tensor) -> str | None:
    text = frame.numpy().tobytes().decode("ascii", "replace").strip()
    if text == "none":
        return None
    if not is_digest(text):
        raise CorruptCopyError(f"its closing frame is {text[:48]!r}, not a digest")
    return text
