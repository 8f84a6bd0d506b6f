"""One exchange of shards among the ranks that hold each other's replicas.

Every agreed save causes exactly one exchange on every member, in the same order. Each owner opens with a fixed frame
(save, owner, bytes, state), sends its shard in 32 MiB segments and closes with a frame that carries its digest. A
failed owner says "none" in the first or the last frame; it is never silent. Receivers hash segments as they arrive, so
that hashing hides behind the network, and refuse what does not match: a replica is the owner's bytes or it is nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch

from resilience.errors import CorruptCopyError, PeerLostError
from resilience.planning.inventory import SaveId
from resilience.replication.communicator import Links, Transfer
from resilience.snapshot.arena import Arena
from resilience.stores.digest import ALGORITHM, SegmentedDigest, is_digest, segments

__all__ = ["CliqueExchange", "Inbox", "Offer", "Received"]

_MAGIC: Final = 0x52455349_4C494531
_OPENING, _SEGMENT, _CLOSING = 1, 2, 3
_OPENING_WORDS: Final = 8
_CLOSING_BYTES: Final = 64
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


class Inbox(Protocol):
    """Where received shards land."""

    def slot(self, owner: int, nbytes: int) -> Arena:
        """A warm buffer of exactly `nbytes` that nobody else uses; StoreError if there is no room."""
        ...

    def discard(self, owner: int, slot: Arena, *, reusable: bool) -> None:
        """What was received is of no use. Not `reusable`: a broken link may still write into it."""
        ...


@dataclass
class _Incoming:
    owner: int
    opening: torch.Tensor
    closing: torch.Tensor
    opened: Transfer
    closed: Transfer | None = None
    slot: Arena | None = None
    sink: torch.Tensor | None = None  # when there is no room: the bytes are taken off the wire and dropped
    transfers: tuple[tuple[Transfer, int, int], ...] = ()
    nbytes: int = 0


class CliqueExchange:
    """The exchanges of one epoch's group, in order. Used by the background worker alone."""

    def __init__(
        self, links: Links, rank: int, holders: Sequence[int], sources: Sequence[int], pace: Callable[[int], None]
    ) -> None:
        """`holders` receive this rank's shard, `sources` send theirs here;

        `pace(nbytes)` sleeps to keep the rate cap.
        """
        self._links = links
        self._rank = rank
        self._holders = tuple(holders)
        self._sources = tuple(sources)
        self._pace = pace

    def run(self, offer: Offer, inbox: Inbox) -> tuple[list[Received], Mapping[int, str]]:
        """One exchange. Returns what arrived and verified, and for each other source the reason why not.

        Raises PeerLostError if the link broke: this exchange and the group are over, slots were discarded.
        """
        incoming = [self._expect(owner) for owner in self._sources]
        reasons: dict[int, str] = {}
        try:
            sent = self._announce(offer)
            for one in incoming:
                self._open(one, offer.save, inbox, reasons)
            sent += self._send(offer.arena)
            digest = offer.digest()
            sent += [self._links.send(_closing(digest), peer, _CLOSING) for peer in self._holders]
            received = [got for one in incoming if (got := self._finish(one, inbox, reasons)) is not None]
            for transfer in sent:
                self._links.wait(transfer)
        except PeerLostError:
            for one in incoming:
                if one.slot is not None:
                    inbox.discard(one.owner, one.slot, reusable=False)
            raise
        return received, reasons

    def close(self, *, failed: bool = False) -> None:
        self._links.close(failed=failed)

    def _expect(self, owner: int) -> _Incoming:
        opening = torch.zeros(_OPENING_WORDS, dtype=torch.int64)
        closing = torch.zeros(_CLOSING_BYTES, dtype=torch.uint8)
        return _Incoming(owner, opening, closing, self._links.receive(opening, owner, _OPENING))

    def _announce(self, offer: Offer) -> list[Transfer]:
        nbytes = 0 if offer.arena is None else offer.arena.nbytes
        words = [_MAGIC, offer.save.iteration, offer.save.generation, self._rank, nbytes, int(nbytes > 0), 0, 0]
        opening = torch.tensor(words, dtype=torch.int64)
        return [self._links.send(opening, peer, _OPENING) for peer in self._holders]

    def _send(self, arena: Arena | None) -> list[Transfer]:
        sent: list[Transfer] = []
        if arena is None:
            return sent
        for start, stop in segments(arena.nbytes):
            for peer in self._holders:
                self._pace(stop - start)
                sent.append(self._links.send(arena.segment(start, stop), peer, _SEGMENT))
        return sent

    def _open(self, one: _Incoming, save: SaveId, inbox: Inbox, reasons: dict[int, str]) -> None:
        """Read the opening frame and post the receives of what it announces."""
        self._links.wait(one.opened)
        magic, iteration, generation, owner, nbytes, sending, *_ = one.opening.tolist()
        expected = (_MAGIC, save.iteration, save.generation, one.owner)
        if (magic, iteration, generation, owner) != expected or not 0 <= nbytes <= _LARGEST_SHARD:
            raise PeerLostError(
                f"rank {one.owner} sent the frame of another exchange (iteration {iteration}, generation {generation}, "
                f"owner {owner}); expected iteration {save.iteration}, generation {save.generation}"
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
            one.sink = torch.empty(min(nbytes, next(segments(nbytes))[1]), dtype=torch.uint8)
        one.transfers = tuple(
            (self._links.receive(self._landing(one, start, stop), one.owner, _SEGMENT), start, stop)
            for start, stop in segments(nbytes)
        )

    def _landing(self, one: _Incoming, start: int, stop: int) -> torch.Tensor:
        if one.slot is not None:
            return one.slot.segment(start, stop)
        if one.sink is None:
            raise ValueError("a transfer without a place to land")
        return one.sink[: stop - start]

    def _finish(self, one: _Incoming, inbox: Inbox, reasons: dict[int, str]) -> Received | None:
        """Hash what arrives, read the closing frame, compare."""
        digest = SegmentedDigest()
        for transfer, start, stop in one.transfers:
            self._links.wait(transfer)
            if one.slot is not None:
                digest.add(one.slot.mapped.view[start:stop])
        if one.closed is None:
            raise ValueError("an exchange that was never opened")
        self._links.wait(one.closed)
        if one.slot is None:
            return None
        try:
            announced = _announced(one.closing)
        except CorruptCopyError as error:
            announced, reasons[one.owner] = None, str(error)
        if announced is not None and announced == digest.value():
            return Received(one.owner, one.slot, one.nbytes, announced)
        if announced is not None:
            reasons[one.owner] = f"its bytes arrived with digest {digest.value()}, it announced {announced}"
        else:
            reasons.setdefault(one.owner, "it gave up this save")
        slot, one.slot = one.slot, None
        inbox.discard(one.owner, slot, reusable=True)
        return None


def _closing(digest: str | None) -> torch.Tensor:
    text = (digest or "none").encode()
    return torch.frombuffer(bytearray(text.ljust(_CLOSING_BYTES, b" ")), dtype=torch.uint8)


def _announced(frame: torch.Tensor) -> str | None:
    text = frame.numpy().tobytes().decode("ascii", "replace").strip()
    if text == "none":
        return None
    if not is_digest(text):
        raise CorruptCopyError(f"its closing frame is {text[:48]!r}, not a {ALGORITHM} digest")
    return text
