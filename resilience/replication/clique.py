"""One exchange of shards among the ranks that hold each other's replicas.

Every agreed save causes exactly one exchange on every member, in the same order. Each owner opens with a fixed frame
(save, owner, bytes, state, size of a piece), sends its shard in pieces (32 MiB segments, or smaller ones under a cap of
the rate) and closes with a frame that carries its digest. A failed owner says "none" in the first or the last frame; it
is never silent. Receivers hash segments as they arrive, so that hashing hides behind the network, and refuse what does
not match: a replica is the owner's bytes or it is nothing.

Holders first ask their owners: each says of which layout it has composed a shard from its own live state
(`snapshot/twins.py`), or of which save the buffer that it is about to use still has one (`still.py`). Then only the
rest is sent; the digest is of the whole all the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Protocol

import torch

from resilience.errors import CorruptCopyError, PeerLostError
from resilience.planning.inventory import SaveId
from resilience.planning.pacing import is_piece
from resilience.planning.travel import MOST_RANGES, Range, are_ranges, pieces_of_ranges
from resilience.replication.communicator import PROVED_TAG, Links, Transfer
from resilience.replication.pace import Pace
from resilience.replication.still import Still
from resilience.snapshot.arena import Arena
from resilience.snapshot.twins import Twin
from resilience.stores.digest import ALGORITHM, SegmentedDigest, is_digest, segments

__all__ = ["CliqueExchange", "ExchangeBrokenError", "Inbox", "Offer", "Received"]

_MAGIC: Final = 0x52455349_4C494531
_OPENING, _SEGMENT, _CLOSING, _ASKING, _RANGES = 1, PROVED_TAG, 3, 4, 5
_OPENING_WORDS: Final = 9
_ASKING_WORDS: Final = 7
_ALL, _NOT_COMPOSED, _NOT_HELD = 0, 1, 2  # what an owner sends of a shard
_CLOSING_BYTES: Final = 128
_LARGEST_SHARD: Final = 1 << 45


@dataclass(frozen=True)
class Offer:
    """What this rank sends: its sealed arena, or nothing (`arena` None: it failed, or nobody needs it)."""

    save: SaveId
    arena: Arena | None
    #: Called once, after the segments were posted: this rank's digest, or None if the save turned out void.
    digest: Callable[[], str | None]
    #: What a holder that composed a shard of this layout still needs.
    layout_id: int = 0
    rest: tuple[Range, ...] = ()
    #: By owner: replicas that this rank composed. The exchange takes out those that it takes charge of.
    twins: dict[int, Twin] = field(default_factory=dict)
    #: By owner: buffers that have a shard of an earlier save, and of which. The exchange takes out those that it uses.
    held: dict[int, tuple[Arena, SaveId]] = field(default_factory=dict)


@dataclass(frozen=True)
class Received:
    """One peer's shard, verified."""

    owner: int
    slot: Arena
    nbytes: int
    digest: str
    composed: bool = False


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
    composed: bool = False  # all but what comes was copied from this rank's own state
    base: SaveId | None = None  # all but what comes is what the buffer has of this save


@dataclass
class _Outgoing:
    """What was posted to the holders; `delivered` counts bytes of the shard by holder."""

    delivered: dict[int, int]
    nbytes: int = 0
    ranges: dict[int, tuple[Range, ...]] = field(default_factory=dict)  # by holder, where it is not all
    parts: dict[int, int] = field(default_factory=dict)  # by holder: which these are
    asked: list[tuple[int, torch.Tensor, Transfer]] = field(default_factory=list)  # by holders, not looked at yet
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
        still: Still | None = None,
    ) -> None:
        """`holders` receive this rank's shard, `sources` send theirs here; `algorithm`: of the digests of all.

        `still`: knows what need not be sent.
        """
        self._algorithm = algorithm
        self._still = still or Still()
        self.sent_bytes = 0  # of shards, in all exchanges so far, and what need not be sent
        self.spared_bytes = 0
        self.unequal: set[int] = set()  # owners whose composed shards did not match, in the newest exchange
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
        self.unequal = set()
        for owner in self._sources:
            incoming.append(self._expect(owner))
        self._ask(offer, outgoing)
        self._still.begin(offer.save, offer.arena)
        if offer.rest or self._still.expects_any:  # else nobody can be spared anything
            self._hear(offer, outgoing)
        reasons: dict[int, str] = {}
        self._announce(offer, outgoing)
        for one in incoming:
            self._open(one, offer, inbox, reasons)
        self._send(offer.arena, outgoing)
        if not decided:
            digest = offer.digest()
        for peer in self._holders:
            outgoing.transfers.append((self._links.send(_closing(digest), peer, _CLOSING), peer, 0))
        received = [got for one in incoming if (got := self._finish(one, offer.save, inbox, reasons)) is not None]
        self._hear(offer, outgoing)
        for transfer, peer, nbytes in outgoing.transfers:
            self._links.wait(transfer)
            if nbytes:  # not a word to an owner, who need not be a holder
                outgoing.delivered[peer] += nbytes
        self._still.end()
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
        words = [_MAGIC, offer.save.iteration, offer.save.generation, self._rank, nbytes, int(nbytes > 0), piece]
        for peer in self._holders:
            part, ranges = outgoing.parts.get(peer, _ALL), outgoing.ranges.get(peer, ())
            opening = torch.tensor([*words, part, len(ranges)], dtype=torch.int64)
            outgoing.transfers.append((self._links.send(opening, peer, _OPENING), peer, 0))
            if part == _NOT_HELD:
                outgoing.transfers.append((self._links.send(torch.tensor(ranges), peer, _RANGES), peer, 0))

    def _send(self, arena: Arena | None, outgoing: _Outgoing) -> None:
        if arena is None:
            return
        piece_bytes, whole = self._pace.piece(arena.nbytes, len(self._holders)), ((0, arena.nbytes),)
        pieces = {peer: list(pieces_of_ranges(outgoing.ranges.get(peer, whole), piece_bytes)) for peer in self._holders}
        for turn in range(max(map(len, pieces.values()), default=0)):  # all links at once
            for peer in self._holders:
                for start, stop in pieces[peer][turn : turn + 1]:
                    self._pace.wait(stop - start)
                    sent = self._links.send(arena.segment(start, stop), peer, _SEGMENT)
                    outgoing.transfers.append((sent, peer, stop - start))
        moving = sum(stop - start for each in pieces.values() for start, stop in each)
        self.sent_bytes += moving
        self.spared_bytes += len(self._holders) * arena.nbytes - moving

    def _ask(self, offer: Offer, outgoing: _Outgoing) -> None:
        """Tell the owners what is needed of their shards."""
        save = offer.save
        for peer in self._holders:
            words = torch.zeros(_ASKING_WORDS, dtype=torch.int64)
            outgoing.asked.append((peer, words, self._links.receive(words, peer, _ASKING)))
        for owner in self._sources:
            composed = offer.twins[owner].layout_id if owner in offer.twins else 0
            _, held = offer.held.get(owner, (None, None))
            base = (0, 0) if held is None else (held.iteration, held.generation)
            words = torch.tensor(
                [_MAGIC, save.iteration, save.generation, self._rank, composed, *base], dtype=torch.int64
            )
            outgoing.transfers.append((self._links.send(words, owner, _ASKING), owner, 0))

    def _hear(self, offer: Offer, outgoing: _Outgoing) -> None:
        """What the holders need of this rank's shard: before it is sent, if something may be spared; or at last."""
        save = offer.save
        for peer, asked, transfer in outgoing.asked:
            self._links.wait(transfer)
            *frame, composed, iteration, generation = asked.tolist()
            if frame != [_MAGIC, save.iteration, save.generation, peer]:
                raise PeerLostError(f"rank {peer} asked in another exchange: {frame[1:]}", rank=peer)
            if offer.arena is None:
                continue
            if composed and composed == offer.layout_id:
                outgoing.parts[peer], outgoing.ranges[peer] = _NOT_COMPOSED, offer.rest
                continue
            rest = self._still.rest(SaveId(iteration, generation, save.attempt)) if iteration else None
            if rest is not None:
                outgoing.parts[peer], outgoing.ranges[peer] = _NOT_HELD, rest
        outgoing.asked.clear()

    def _open(self, one: _Incoming, offer: Offer, inbox: Inbox, reasons: dict[int, str]) -> None:
        """Read the opening frame and post the receives of what it announces."""
        self._links.wait(one.opened)
        save = offer.save
        magic, iteration, generation, owner, nbytes, sending, piece, part, count = one.opening.tolist()
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
        ranges: tuple[Range, ...] = ((0, nbytes),)
        if part == _NOT_COMPOSED:
            ranges = self._open_composed(one, offer)
        elif part == _NOT_HELD:
            ranges = self._open_held(one, offer, count)
        else:
            self._open_whole(one, offer, inbox, piece, reasons)
        one.pieces = tuple(
            _Piece(self._links.receive(self._landing(one, start, stop), one.owner, _SEGMENT), start, stop)
            for start, stop in pieces_of_ranges(ranges, piece)
        )

    def _open_whole(self, one: _Incoming, offer: Offer, inbox: Inbox, piece: int, reasons: dict[int, str]) -> None:
        twin, held = offer.twins.get(one.owner), offer.held.get(one.owner)
        if twin is not None and twin.slot.nbytes == one.nbytes:
            one.slot = offer.twins.pop(one.owner).slot
        elif held is not None and held[0].nbytes == one.nbytes:
            one.slot, _ = offer.held.pop(one.owner)
        else:
            self._make_room(one, inbox, piece, reasons)

    def _open_composed(self, one: _Incoming, offer: Offer) -> tuple[Range, ...]:
        twin = offer.twins.get(one.owner)
        if twin is None or twin.slot.nbytes != one.nbytes:
            raise PeerLostError(f"rank {one.owner} sends a rest that was not asked for", rank=one.owner)
        one.slot, one.composed = offer.twins.pop(one.owner).slot, True
        return twin.rest

    def _open_held(self, one: _Incoming, offer: Offer, count: int) -> tuple[Range, ...]:
        """Hear what comes: all but this is what the buffer has."""
        held = offer.held.get(one.owner)
        if held is None or held[0].nbytes != one.nbytes or not 0 < count <= MOST_RANGES:
            raise PeerLostError(f"rank {one.owner} sends a rest that was not asked for", rank=one.owner)
        words = torch.zeros(count, 2, dtype=torch.int64)
        self._links.wait(self._links.receive(words, one.owner, _RANGES))
        ranges = tuple((start, stop) for start, stop in words.tolist())
        if not are_ranges(ranges, one.nbytes):
            raise PeerLostError(f"rank {one.owner} sends ranges that are none of {one.nbytes} bytes", rank=one.owner)
        one.slot, one.base = offer.held.pop(one.owner)
        return ranges

    def _make_room(self, one: _Incoming, inbox: Inbox, piece: int, reasons: dict[int, str]) -> None:
        try:
            one.slot = inbox.slot(one.owner, one.nbytes)
        except OSError as error:
            reasons[one.owner] = f"no room for its replica: {error}"
            one.sink = torch.empty(min(one.nbytes, piece), dtype=torch.uint8)

    def _landing(self, one: _Incoming, start: int, stop: int) -> torch.Tensor:
        if one.slot is not None:
            return one.slot.segment(start, stop)
        if one.sink is None:
            raise ValueError("a transfer without a place to land")
        return one.sink[: stop - start]

    def _arrive(self, one: _Incoming) -> str:
        """Wait for the pieces and hash each segment as soon as it is there."""
        digest = SegmentedDigest(self._algorithm)
        left = deque(one.pieces)
        for start, stop in segments(one.nbytes):
            while left and left[0].start < stop:
                piece = left.popleft()
                self._links.wait(piece.transfer)
                one.arrived += piece.stop - piece.start
            if one.slot is not None:
                digest.add(one.slot.mapped.view[start:stop])
        return digest.value()

    def _finish(self, one: _Incoming, save: SaveId, inbox: Inbox, reasons: dict[int, str]) -> Received | None:
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
            one.slot.holds = save
            return Received(one.owner, one.slot, one.nbytes, announced, one.composed)
        if announced is not None:
            self.unequal |= {one.owner} if one.composed else set()
            kept = "" if one.base is None else f" (all but what was kept of iteration {one.base.iteration})"
            reasons[one.owner] = f"its bytes{kept} arrived with digest {digest}, it announced {announced}"
        else:
            reasons.setdefault(one.owner, "it gave up this save")
        slot, one.slot = one.slot, None
        inbox.discard(one.owner, slot, reusable=True)
        return None


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
