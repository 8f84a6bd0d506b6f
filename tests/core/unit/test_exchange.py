"""Promise 3: a replica is the owner's bytes, or it is nothing. The exchange of a clique, over links that misbehave."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from resilience.errors import PeerLostError
from resilience.planning.pacing import SMALLEST_PIECE
from resilience.replication import clique
from resilience.replication.clique import CliqueExchange, ExchangeBrokenError, Offer, Received
from resilience.replication.pace import Pace
from resilience.snapshot.arena import Arena
from resilience.stores.digest import digest_of
from tests.core.fakes import SEND_TAGS, CountingInbox, FakeLinks, Wire
from tests.core.shards import FS, SAVE

SIZE = 10_000
LOST_AFTER_S = 3.0  # what comes at all comes long before, on a busy machine too


@dataclass
class Ended:
    received: list[Received]
    reasons: dict[int, str]
    inbox: CountingInbox
    error: Exception | None = None


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several segments to a shard; the digest's own are only as many as there are bytes for."""

    def segments(nbytes: int) -> Any:
        for start in range(0, nbytes, 4096):
            yield start, min(start + 4096, nbytes)

    monkeypatch.setattr(clique, "segments", segments)
    cut = clique.pieces_of_ranges
    monkeypatch.setattr(clique, "pieces_of_ranges", lambda ranges, piece: cut(ranges, min(piece, 4096)))


def arena_of(path: Path, rank: int) -> Arena:
    arena = Arena(FS.create_mapping(path, SIZE))
    arena.mapped.view[:] = bytes([rank + 1]) * SIZE
    return arena


def digest_in_parts(arena: Arena) -> str:
    from resilience.stores.digest import SegmentedDigest

    digest = SegmentedDigest()
    for start, stop in clique.segments(arena.nbytes):
        digest.add(arena.mapped.view[start:stop])
    return digest.value()


def exchange(
    directory: Path,
    wire: Wire,
    offers: Callable[[int, Offer], Offer] = lambda rank, offer: offer,
    size: int = 2,
    no_room: dict[int, tuple[int, ...]] | None = None,
    pace: Callable[[int], Pace] = lambda rank: Pace(None, time.monotonic, time.sleep),
) -> list[Ended]:
    """A clique of `size` in which everybody holds everybody's replica."""
    ended: list[Ended | None] = [None] * size

    def run(rank: int) -> None:
        peers = tuple(peer for peer in range(size) if peer != rank)
        arena = arena_of(directory / f"own{rank}", rank)
        inbox = CountingInbox(directory / f"in{rank}", (no_room or {}).get(rank, ()))
        offer = offers(rank, Offer(SAVE, arena, lambda: digest_in_parts(arena)))
        exchange = CliqueExchange(FakeLinks(wire, rank), rank, peers, peers, pace(rank))
        try:
            received, reasons = exchange.run(offer, inbox)
            ended[rank] = Ended(received, dict(reasons), inbox)
        except PeerLostError as error:
            ended[rank] = Ended([], {}, inbox, error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    return [each for each in ended if each is not None]


@pytest.mark.parametrize("size", [2, 3, 5])
def test_every_member_receives_what_the_others_own(tmp_path: Path, size: int) -> None:
    for rank, ended in enumerate(exchange(tmp_path, Wire(), size=size)):
        assert ended.reasons == {}
        assert {got.owner for got in ended.received} == set(range(size)) - {rank}
        for got in ended.received:
            assert bytes(got.slot.mapped.view) == bytes([got.owner + 1]) * SIZE
            assert got.nbytes == SIZE


@pytest.mark.parametrize("byte", [0, 4095, 4096, SIZE - 1])
def test_a_replica_whose_bytes_were_altered_in_flight_is_refused(tmp_path: Path, byte: int) -> None:
    def flip(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor:
        if (sender, tag) == (0, SEND_TAGS["segment"]):
            position = seen.setdefault("bytes", 0)
            if position <= byte < position + len(content):
                content[byte - position] ^= 1
            seen["bytes"] = position + len(content)
        return content

    seen: dict[str, int] = {}
    first, second = exchange(tmp_path, Wire(alter=flip))
    assert second.received == []
    assert "its bytes arrived with digest" in second.reasons[0]
    assert second.inbox.discarded == [(0, True)]
    assert [got.owner for got in first.received] == [1], "the other way was not touched"


def test_an_announced_digest_that_is_none_is_refused(tmp_path: Path) -> None:
    def garble(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor:
        return torch.full_like(content, 65) if tag == SEND_TAGS["closing"] else content

    for ended in exchange(tmp_path, Wire(alter=garble)):
        assert ended.received == []
        assert all("not a digest" in reason for reason in ended.reasons.values())


def test_an_owner_that_failed_before_sending_says_so_and_the_others_go_on(tmp_path: Path) -> None:
    def nothing_from_1(rank: int, offer: Offer) -> Offer:
        return Offer(SAVE, None, lambda: None) if rank == 1 else offer

    first, second, third = exchange(tmp_path, Wire(), nothing_from_1, size=3)
    for ended in (first, third):
        assert [got.owner for got in ended.received] == [2 - 2 * (ended is third)]
        assert ended.reasons == {1: "it has nothing to send for this save"}
    assert {got.owner for got in second.received} == {0, 2}


def test_an_owner_that_gives_up_after_sending_is_believed(tmp_path: Path) -> None:
    """Its vote failed while the bytes were on their way: the receivers drop them."""
    first, second = exchange(
        tmp_path, Wire(), lambda rank, offer: replace(offer, digest=lambda: None if rank else _of(offer))
    )
    assert first.received == []
    assert first.reasons == {1: "it gave up this save"}
    assert first.inbox.discarded == [(1, True)]
    assert [got.owner for got in second.received] == [0]


def _of(offer: Offer) -> str:
    assert offer.arena is not None
    return digest_in_parts(offer.arena)


def test_a_receiver_without_room_takes_the_bytes_off_the_wire_and_the_next_exchange_works(tmp_path: Path) -> None:
    wire = Wire()
    first, second = exchange(tmp_path, wire, no_room={1: (0,)})
    assert second.received == []
    assert "no room for its replica" in second.reasons[0]
    assert [got.owner for got in first.received] == [1]
    assert all(box.empty() for box in wire.boxes.values()), "nothing is left for a later save to stumble over"


@pytest.mark.parametrize("tag", sorted(SEND_TAGS.values()))
def test_a_message_that_never_comes_ends_the_exchange_and_the_slots_are_not_used_again(
    tmp_path: Path, tag: int
) -> None:
    def lose(sender: int, receiver: int, its_tag: int, content: torch.Tensor) -> torch.Tensor | None:
        return None if (sender, its_tag) == (0, tag) else content

    _, second = exchange(tmp_path, Wire(timeout_s=LOST_AFTER_S, alter=lose))
    assert isinstance(second.error, PeerLostError)
    assert all(not reusable for _, reusable in second.inbox.discarded)
    assert len(second.inbox.discarded) == (tag != SEND_TAGS["opening"])


@pytest.mark.parametrize(
    ("word", "value"),
    [
        *((0, 1), (1, SAVE.iteration + 1), (2, SAVE.generation - 1), (3, 0)),
        *((4, -5), (4, 1 << 60), (6, 0), (6, 3 << 20)),
    ],
)
def test_a_frame_of_another_exchange_ends_this_one_before_a_byte_is_allocated(
    tmp_path: Path, word: int, value: int
) -> None:
    def confuse(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor:
        if (sender, tag) == (1, SEND_TAGS["opening"]):
            content[word] = value
        return content

    first, _ = exchange(tmp_path, Wire(timeout_s=LOST_AFTER_S, alter=confuse))
    assert isinstance(first.error, PeerLostError)
    assert "another exchange" in str(first.error)
    assert first.inbox.discarded == []


def wire_from_holders(*holders: int, exchanges: int = 1, **given: Any) -> Wire:
    """On which holders who are not there have asked rank 0 for the whole of its shards."""
    wire = Wire(**given)
    for holder in holders * exchanges:
        asked = [clique._MAGIC, SAVE.iteration, SAVE.generation, holder, 0, 0, 0]
        wire.box(holder, 0, SEND_TAGS["asking"]).put(torch.tensor(asked))
    return wire


def test_under_a_cap_the_vote_comes_first_and_the_pieces_to_all_holders_keep_to_the_rate(tmp_path: Path) -> None:
    told: list[Any] = []
    clock = Clock()

    def note(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor:
        told.append((clock.now(), tag, len(content) if tag == SEND_TAGS["segment"] else 0))
        return content

    def digest() -> str:
        told.append((clock.now(), "voted", 0))
        return digest_of(b"")

    arena = Arena(FS.create_mapping(tmp_path / "own", 300_000))
    pace = Pace(100_000.0, clock.now, clock.sleep)
    wire = wire_from_holders(1, 2, exchanges=2, alter=note)
    exchange = CliqueExchange(FakeLinks(wire, 0), 0, (1, 2), (), pace)
    exchange.run(Offer(SAVE, arena, digest), CountingInbox(tmp_path / "in"))
    exchange.run(Offer(SAVE, arena, digest), CountingInbox(tmp_path / "in"))
    assert told[0] == (0.0, "voted", 0)
    gone = 0
    for at, _, nbytes in told:
        gone += nbytes
        assert gone <= 100_000 * at + 1
    assert gone == 2 * 2 * 300_000
    assert max(nbytes for _, _, nbytes in told) <= SMALLEST_PIECE


def test_under_a_cap_a_void_save_costs_no_traffic(tmp_path: Path) -> None:
    tags: list[int] = []

    def note(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor:
        tags.append(tag)
        return content

    arena, clock = arena_of(tmp_path / "own", 0), Clock()
    pace = Pace(1.0, clock.now, clock.sleep)
    exchange = CliqueExchange(FakeLinks(wire_from_holders(1, alter=note), 0), 0, (1,), (), pace)
    exchange.run(Offer(SAVE, arena, lambda: None), CountingInbox(tmp_path / "in"))
    assert tags == [SEND_TAGS["opening"], SEND_TAGS["closing"]]


@pytest.mark.parametrize("capped", [1, 0])
def test_members_that_send_in_pieces_of_different_sizes_understand_each_other(tmp_path: Path, capped: int) -> None:
    rates = {capped: 1e9}
    for ended in exchange(tmp_path, Wire(), pace=lambda rank: Pace(rates.get(rank), time.monotonic, time.sleep)):
        assert ended.reasons == {}
        assert len(ended.received) == 1


def test_a_broken_exchange_says_whose_bytes_stopped_and_where(tmp_path: Path) -> None:
    sent: list[int] = []

    def stop_after_two(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor | None:
        if (sender, tag) == (0, SEND_TAGS["segment"]):
            sent.append(len(content))
            return content if len(sent) <= 2 else None
        return content

    _, second = exchange(tmp_path, Wire(timeout_s=LOST_AFTER_S, alter=stop_after_two))
    assert isinstance(second.error, ExchangeBrokenError)
    assert (second.error.rank, second.error.received_bytes, second.error.expected_bytes) == (0, 2 * 4096, SIZE)
    assert second.error.offered_bytes == SIZE


class Clock:
    """Time passes only while somebody sleeps, and a little longer than asked for."""

    def __init__(self) -> None:
        self._now = 0.0

    def now(self) -> float:
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds * 1.01
