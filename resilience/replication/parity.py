"""One exchange of a clique whose shards are covered by parity: a pipelined reduce-scatter around the ring.

Each row of the code (`planning/erasure.py`) begins as the stripe of its first member; each next one adds its own
stripe to the partial sum that it receives and sends it on; the last one sends P, and Q, to the members that keep them.
All rows are under way at once, piece by piece, so that a member sends a shard's worth per parity and holds a few pieces
of the others', never their shards.

Every save causes exactly one exchange on every member, in the same order. All open with a frame (save, owner, bytes,
digest), by which everybody knows what the parity will cover. The digest is that of a shard whose save was agreed on:
parity never makes whole what was void. A member that has nothing says so, and then there is no parity of this save.
Every partial sum carries a digest of itself, checked by whom it reaches: what was altered on its way voids its piece
for all that follow, and its parity is not kept.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import torch
import xxhash

from resilience.errors import PeerLostError
from resilience.planning.erasure import Code
from resilience.planning.inventory import ParityCover, SaveId
from resilience.planning.pacing import ring_buffers, ring_piece_bytes
from resilience.replication.clique import ExchangeBrokenError, Offer
from resilience.replication.communicator import Links
from resilience.replication.lanes import Bytes, add, as_bytes, double
from resilience.replication.pace import Pace
from resilience.snapshot.arena import Arena
from resilience.stores.digest import is_digest
from resilience.stores.parity_file import parity_bounds

__all__ = ["MadeParity", "ParityExchange"]

#: Gives a buffer for the parity file, of so many bytes, that covers this.
Land = Callable[[ParityCover, int], Arena]

_MAGIC: Final = 0x52455349_50415231
#: None is `PROVED_TAG`: where the ranks have a key, each message carries a MAC. The last: bare stripes, which overtake
#: what waits for others.
_OPENING, _PARTIAL, _SECOND, _FIRST = 1, 5, 6, 7
_WORDS: Final = 8
_DIGEST_ROOM: Final = 128
_FRAME_BYTES: Final = _WORDS * 8 + _DIGEST_ROOM
_SEAL_BYTES: Final = 16  # of a partial sum's own digest, behind it
_VOID: Final = bytes(_SEAL_BYTES)
_LARGEST_SHARD: Final = 1 << 45


@dataclass(frozen=True)
class MadeParity:
    """What this member is to keep: the parity file's bytes in `slot`, all but its header, and what they cover."""

    cover: ParityCover
    slot: Arena


@dataclass
class _Piece:
    """A buffer of one round, and the transfer that uses it. `going`: to which peer, and how many bytes."""

    content: torch.Tensor
    view: Bytes
    transfer: object = None
    going: tuple[int, int] | None = None


@dataclass
class _Round:
    """Piece `start` to `stop` of every row: what is received, by hop and, last, what is kept."""

    start: int
    stop: int
    arriving: list[_Piece] = field(default_factory=list)


@dataclass
class _Counts:
    """Bytes by peer, for what is told of a broken link."""

    received: Counter[int] = field(default_factory=Counter)
    expected: Counter[int] = field(default_factory=Counter)
    sent: Counter[int] = field(default_factory=Counter)
    offered: Counter[int] = field(default_factory=Counter)


class ParityExchange:
    """The exchanges of one epoch's clique, in order. Used by the background worker alone."""

    def __init__(self, links: Links, rank: int, members: Sequence[int], parities: int, pace: Pace) -> None:
        self._links = links
        self._members = tuple(members)
        self._me = self._members.index(rank)
        self._code = Code(len(members), parities)
        self._pace = pace
        self._buffers: list[list[_Piece]] = [[], []]
        self._piece_bytes = 0

    def run(self, offer: Offer, land: Land | None) -> tuple[MadeParity | None, list[str]]:
        """One exchange: the parity that this member is to keep, or why there is none.

        `land` gives a buffer for the parity file (StoreError if there is no room: the others still get theirs); None:
        this member has its parity already. Raises ExchangeBrokenError if the link broke: this exchange and the group
        are over.
        """
        counts = _Counts()
        try:
            return self._run(offer, land, counts)
        except PeerLostError as error:
            peer = -1 if error.rank is None else error.rank
            raise ExchangeBrokenError(
                error, (counts.received[peer], counts.expected[peer]), (counts.sent[peer], counts.offered[peer])
            ) from error

    def close(self, *, failed: bool = False) -> None:
        self._links.close(failed=failed)

    def _run(self, offer: Offer, land: Land | None, counts: _Counts) -> tuple[MadeParity | None, list[str]]:
        digest = offer.digest()  # before anything goes: what it says is void must not become parity
        arena = offer.arena if digest is not None else None
        cover, silent = self._open(offer.save, arena, digest or "")
        if cover is None or arena is None:
            return None, [f"rank {rank} has nothing to send for this save" for rank in silent]
        problems: list[str] = []
        slot: Arena | None = None
        try:
            slot = None if land is None else land(cover, self._code.file_bytes(max(cover.nbytes)))
        except OSError as error:
            problems.append(f"no room for parity: {error}")
        ring = _Ring(self._links, self._code, self._members, self._me, cover, arena, slot, self._pace, counts)
        problems += ring.run(self._prepared(ring.piece_bytes))
        return (MadeParity(cover, slot) if slot is not None else None), problems

    def _open(self, save: SaveId, arena: Arena | None, digest: str) -> tuple[ParityCover | None, list[int]]:
        """Say what this member has, hear what the others have: the cover, or who has nothing."""
        peers = [rank for rank in self._members if rank != self._members[self._me]]
        heard = {rank: torch.zeros(_FRAME_BYTES, dtype=torch.uint8) for rank in peers}
        expected = {rank: self._links.receive(heard[rank], rank, _OPENING) for rank in peers}
        frame = _frame(save, self._members[self._me], 0 if arena is None else arena.nbytes, digest)
        sent = [self._links.send(frame, rank, _OPENING) for rank in peers]
        told = {self._members[self._me]: (0 if arena is None else arena.nbytes, digest)}
        for rank in peers:
            self._links.wait(expected[rank])
            told[rank] = _read_frame(heard[rank], save, rank)
        for transfer in sent:
            self._links.wait(transfer)
        silent = [rank for rank in self._members if not told[rank][0]]
        if silent:
            return None, silent
        sizes, digests = (tuple(told[rank][place] for rank in self._members) for place in (0, 1))
        return ParityCover(self._code.parities, self._members, sizes, digests), []  # type: ignore[arg-type]

    def _prepared(self, piece_bytes: int) -> list[list[_Piece]]:
        """The buffers of two rounds, kept from exchange to exchange."""
        if self._piece_bytes != piece_bytes:
            self._piece_bytes = piece_bytes
            count = ring_buffers(self._code)
            self._buffers = [[_buffer(piece_bytes + _SEAL_BYTES) for _ in range(count)] for _ in range(2)]
        return self._buffers


class _Ring:
    """The reduce-scatter of one exchange."""

    def __init__(
        self,
        links: Links,
        code: Code,
        members: Sequence[int],
        me: int,
        cover: ParityCover,
        arena: Arena,
        slot: Arena | None,
        pace: Pace,
        counts: _Counts,
    ) -> None:
        self._links = links
        self._code = code
        self._members = members
        self._me = me
        self._cover = cover
        self._own = as_bytes(arena.mapped.view)
        self._slot = slot
        self._pace = pace
        self._counts = counts
        self._stripe = code.stripe_bytes(max(cover.nbytes))
        self.piece_bytes = ring_piece_bytes(code, self._stripe, pace.bytes_per_s)
        self._scratch = np.empty(0, dtype=np.uint8)
        self._problems: list[str] = []

    def run(self, buffers: Sequence[Sequence[_Piece]]) -> list[str]:
        """All pieces of all rows; returns what went wrong with what this member keeps."""
        if self._code.parities == 2 and self._code.data > 1:
            self._scratch = np.empty(min(self.piece_bytes, self._stripe), dtype=np.uint8)
        starts = range(0, self._stripe, self.piece_bytes)
        rounds = [_Round(start, min(start + self.piece_bytes, self._stripe)) for start in starts]
        self._begin(rounds[0], buffers[0])
        for number, each in enumerate(rounds):
            if number + 1 < len(rounds):  # on its way while this one is worked on
                self._begin(rounds[number + 1], buffers[(number + 1) % 2])
            self._work(each, buffers[number % 2])
        for pieces in buffers:
            self._settle(pieces)
        return list(dict.fromkeys(self._problems))

    def _begin(self, each: _Round, pieces: Sequence[_Piece]) -> None:
        """Have all of a round's receives posted, and send this member's bare stripe: none of it waits for others."""
        self._settle(pieces)
        before, nbytes = self._peer(-1), each.stop - each.start + _SEAL_BYTES
        free = iter(pieces[1:])
        for hop in range(self._code.data - 1):
            for _ in range(self._messages(hop)):
                each.arriving.append(self._receive(next(free), nbytes, before, _tag(hop)))
        each.arriving.append(self._receive(next(free), nbytes, before, _tag(self._code.data - 1)))
        if self._code.parities == 2:
            each.arriving.append(self._receive(next(free), nbytes, self._peer(-2), _SECOND))
        content, own = pieces[0].view[: each.stop - each.start], self._stripe_part(0, each)
        content[: len(own)] = own
        content[len(own) :] = 0
        _seal(pieces[0], len(content))
        self._pass_on(0, each, [pieces[0]] * self._messages(0))

    def _work(self, each: _Round, pieces: Sequence[_Piece]) -> None:
        """Add this member's stripes to what comes, hop by hop, and take in what it keeps."""
        arriving, nbytes = iter(each.arriving), each.stop - each.start
        for hop in range(1, self._code.data):
            partials = [next(arriving) for _ in range(self._messages(hop - 1))]
            sound = [self._arrived(partial, each, self._members[self._me - 1]) for partial in partials]
            if len(partials) < self._code.parities:  # of the first hop there is one, which is P and Q alike
                second = pieces[-1]
                second.view[:nbytes] = partials[0].view[:nbytes]
                partials.append(second)
            for parity, partial in enumerate(partials):
                body = partial.view[:nbytes]
                if parity:
                    double(body, self._scratch)
                add(body, self._stripe_part(hop, each))
                _seal(partial, nbytes, sound=all(sound))
            self._pass_on(hop, each, partials)
        for parity, final in enumerate(arriving):
            self._keep(parity, final, each)

    def _pass_on(self, hop: int, each: _Round, partials: Sequence[_Piece]) -> None:
        """To the next member; from the last one to those that keep P and Q."""
        last = hop == self._code.data - 1
        for parity, partial in enumerate(partials):
            peer = self._peer(1 + parity if last else 1)
            nbytes = each.stop - each.start + _SEAL_BYTES
            self._pace.wait(nbytes)
            self._counts.offered[peer] += nbytes
            tag = _SECOND if last and parity else _tag(hop)
            transfer = self._links.send(partial.content[:nbytes], peer, tag)
            self._settle([partial])  # the bare stripe of a row of one goes to two members
            partial.transfer, partial.going = transfer, (peer, nbytes)

    def _keep(self, parity: int, final: _Piece, each: _Round) -> None:
        sender = self._members[(self._me - 1 - parity) % len(self._members)]
        if not self._arrived(final, each, sender):
            self._problems.append("a partial sum of its parity was altered on its way, or voided before")
        if self._slot is not None:
            start = parity_bounds(self._cover, parity)[0]
            target = as_bytes(self._slot.mapped.view[start + each.start : start + each.stop])
            np.copyto(target, final.view[: len(target)])

    def _arrived(self, piece: _Piece, each: _Round, sender: int) -> bool:
        """Wait for it; whether it is what its sender sealed, and not void."""
        if piece.transfer is None:
            raise ValueError("a piece that nobody expects")
        self._links.wait(piece.transfer)
        piece.transfer = None
        nbytes = each.stop - each.start
        self._counts.received[sender] += nbytes + _SEAL_BYTES
        seal = piece.view[nbytes : nbytes + _SEAL_BYTES].tobytes()
        if seal == _VOID:
            return False
        if seal == xxhash.xxh3_128_digest(piece.view[:nbytes].data):
            return True
        self._problems.append(f"a partial sum from rank {sender} was altered on its way")
        return False

    def _receive(self, piece: _Piece, nbytes: int, peer: int, tag: int) -> _Piece:
        self._counts.expected[peer] += nbytes
        piece.transfer = self._links.receive(piece.content[:nbytes], peer, tag)
        return piece

    def _settle(self, pieces: Sequence[_Piece]) -> None:
        """Wait for the sends that use these buffers."""
        for piece in pieces:
            if piece.going is not None:
                self._links.wait(piece.transfer)
                self._counts.sent[piece.going[0]] += piece.going[1]
            piece.transfer = piece.going = None

    def _messages(self, hop: int) -> int:
        """How many partial sums a row has after a hop: after the first, where it is the bare stripe, one is both."""
        return 1 if hop == 0 and self._code.data > 1 else self._code.parities

    def _stripe_part(self, stripe: int, each: _Round) -> Bytes:
        """Of this member's own stripe; short where the shard ends."""
        start = stripe * self._stripe
        return self._own[start + each.start : start + each.stop]

    def _peer(self, distance: int) -> int:
        return self._members[(self._me + distance) % len(self._members)]


def _tag(hop: int) -> int:
    """Of what is sent to the next member after a hop."""
    return _PARTIAL if hop else _FIRST


def _buffer(nbytes: int) -> _Piece:
    content = torch.empty(nbytes, dtype=torch.uint8)
    return _Piece(content, content.numpy())


def _seal(piece: _Piece, nbytes: int, *, sound: bool = True) -> None:
    digest = xxhash.xxh3_128_digest(piece.view[:nbytes].data) if sound else _VOID
    piece.view[nbytes : nbytes + _SEAL_BYTES] = np.frombuffer(digest, dtype=np.uint8)


def _frame(save: SaveId, owner: int, nbytes: int, digest: str) -> torch.Tensor:
    words = np.array([_MAGIC, save.iteration, save.generation, owner, nbytes, 0, 0, 0], dtype=np.int64)
    return torch.frombuffer(bytearray(words.tobytes() + digest.encode().ljust(_DIGEST_ROOM, b" ")), dtype=torch.uint8)


def _read_frame(frame: torch.Tensor, save: SaveId, owner: int) -> tuple[int, str]:
    """A member's bytes (0: it has nothing) and digest."""
    content = frame.numpy().tobytes()
    magic, iteration, generation, sender, nbytes, *_ = np.frombuffer(content, dtype=np.int64, count=_WORDS).tolist()
    if (magic, iteration, generation, sender) != (_MAGIC, save.iteration, save.generation, owner) or not (
        0 <= nbytes <= _LARGEST_SHARD
    ):
        raise PeerLostError(
            f"rank {owner} sent the frame of another exchange (iteration {iteration}, generation {generation}, owner "
            f"{sender}); expected iteration {save.iteration}, generation {save.generation}",
            rank=owner,
        )
    digest = content[_WORDS * 8 :].decode("ascii", "replace").strip()
    if nbytes and not is_digest(digest):
        raise PeerLostError(f"rank {owner} announced the digest {digest[:48]!r}, which is none", rank=owner)
    return nbytes, digest
