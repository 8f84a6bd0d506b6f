"""Parity made by a clique over links that misbehave, and lost shards rebuilt from it."""

from __future__ import annotations

import itertools
import random
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.errors import PeerLostError, StoreError
from resilience.planning.erasure import Code, gf_multiply
from resilience.planning.inventory import ParityCover
from resilience.planning.rebuilding import Rebuild, Source
from resilience.replication import parity as parity_module
from resilience.replication.clique import ExchangeBrokenError, Offer
from resilience.replication.lanes import Combiner, add, as_bytes, double
from resilience.replication.pace import Pace
from resilience.replication.parity import MadeParity, ParityExchange
from resilience.snapshot.arena import Arena
from resilience.stores.digest import digest_of
from resilience.stores.parity_file import parity_bounds
from tests.core.fakes import FakeLinks, Wire
from tests.core.shards import FS, SAVE

OPENING, PARTIAL, FIRST = 1, 5, 7
LOST_AFTER_S = 3.0  # what comes at all comes long before, on a busy machine too


@dataclass
class Member:
    """What one member had, and what came of it."""

    arena: Arena
    made: MadeParity | None = None
    problems: list[str] = field(default_factory=list)
    error: Exception | None = None

    @property
    def shard(self) -> bytes:
        return bytes(self.arena.mapped.view)


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several rounds to a stripe of few bytes."""
    monkeypatch.setattr(parity_module, "ring_piece_bytes", lambda *_: 192)


def ring(
    directory: Path,
    sizes: Sequence[int],
    parities: int,
    wire: Wire | None = None,
    offers: Callable[[int, Offer], Offer] = lambda rank, offer: offer,
    no_room: Sequence[int] = (),
    times: int = 1,
) -> list[Member]:
    """One clique, a thread per member; `times` exchanges of the same shards."""
    wire = wire or Wire()
    members = [Member(_arena(directory / f"own{rank}", size, rank)) for rank, size in enumerate(sizes)]

    def land(rank: int) -> Callable[[ParityCover, int], Arena]:
        def give(cover: ParityCover, nbytes: int) -> Arena:
            if rank in no_room:
                raise StoreError("no space is left.")
            path = directory / f"parity{rank}"
            FS.unlink(path)
            return Arena(FS.create_mapping(path, nbytes))

        return give

    def run(rank: int) -> None:
        member = members[rank]
        exchange = ParityExchange(
            FakeLinks(wire, rank), rank, range(len(sizes)), parities, Pace(None, time.monotonic, time.sleep)
        )
        offer = offers(rank, Offer(SAVE, member.arena, lambda: digest_of(member.arena.mapped.view)))
        try:
            for _ in range(times):
                member.made, member.problems = exchange.run(offer, land(rank))
        except PeerLostError as error:
            member.error = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(sizes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    return members


def _arena(path: Path, size: int, seed: int) -> Arena:
    arena = Arena(FS.create_mapping(path, size))
    arena.mapped.view[:] = random.Random(seed).randbytes(size)
    return arena


def rebuilt(members: Sequence[Member], lost: int, gone: Sequence[int], piece_bytes: int = 256) -> bytes:
    """The shard of `lost` from what the members that are not `gone` have."""
    cover = next(member.made.cover for member in members if member.made is not None)
    there = [place for place in range(len(members)) if place not in gone]
    sources = []
    for parity in (False, True):
        for place in there:
            made = members[place].made
            if parity and made is None:
                continue
            nbytes = made.slot.nbytes if parity and made else cover.nbytes[place]
            sources.append(Source(0, place, place, parity, "n", "n", "local", place, nbytes, ""))
    plan = Rebuild(lost, "n", lost, cover.nbytes[lost], cover.digests[lost], cover, tuple(sources))
    combiner = Combiner(piece_bytes)
    content = bytearray(plan.nbytes)
    for piece in plan.pieces(piece_bytes):
        parts = []
        for part in piece.parts:
            source = plan.sources[part.source]
            made = members[source.member].made
            view = made.slot.mapped.view if source.parity and made else members[source.member].arena.mapped.view
            parts.append((part.coefficient, as_bytes(view[part.start : part.stop])))
        content[piece.start : piece.stop] = combiner.combine(piece.sum_bytes, parts)[
            : piece.stop - piece.start
        ].tobytes()
    return bytes(content)


@given(st.integers(0, 255), st.binary(min_size=1, max_size=300), st.integers(0, 80))
def test_lanes_count_as_bytes_do(coefficient: int, content: bytes, shorter: int) -> None:
    padded = content + bytes(-len(content) % 8)
    one = np.frombuffer(padded, dtype=np.uint8)
    other = np.frombuffer(padded[::-1], dtype=np.uint8)[: max(0, len(padded) - shorter)]
    total = Combiner(len(padded)).combine(len(padded), [(coefficient, one), (3, other)])
    tail = other.tobytes().ljust(len(padded), b"\0")
    assert total.tobytes() == bytes(
        gf_multiply(coefficient, a) ^ gf_multiply(3, b) for a, b in zip(padded, tail, strict=True)
    )
    doubled = one.copy()
    double(doubled, np.empty(len(padded), np.uint8))
    assert doubled.tobytes() == bytes(gf_multiply(2, each) for each in padded)
    add(doubled, one)
    assert doubled.tobytes() == bytes(gf_multiply(3, each) for each in padded)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 2),
    st.lists(st.integers(1, 3000), min_size=3, max_size=8),
    st.data(),
)
def test_any_losses_that_the_parity_is_for_are_made_good_whatever_the_shards_lengths(
    parities: int, sizes: list[int], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        piece = data.draw(st.sampled_from([64, 192, 65536]))
        patch.setattr(parity_module, "ring_piece_bytes", lambda *_: piece)
        members = ring(Path(directory), sizes, parities)
        assert [member.problems for member in members] == [[]] * len(sizes)
        count = data.draw(st.integers(1, parities))
        gone = data.draw(st.permutations(range(len(sizes))))[:count]
        for lost in gone:
            assert rebuilt(members, lost, gone, piece) == members[lost].shard


@pytest.mark.parametrize(("parities", "size"), [(1, 2), (1, 3), (2, 3), (2, 4), (2, 5), (1, 8), (2, 8)])
def test_every_set_of_losses_is_made_good(tmp_path: Path, small_pieces: None, parities: int, size: int) -> None:
    members = ring(tmp_path, [1000 + 7 * rank for rank in range(size)], parities)
    for count in range(1, parities + 1):
        for gone in itertools.combinations(range(size), count):
            assert all(rebuilt(members, lost, gone) == members[lost].shard for lost in gone)


@pytest.mark.parametrize("parities", [1, 2])
def test_what_is_kept_is_what_the_definition_says(tmp_path: Path, small_pieces: None, parities: int) -> None:
    """P and Q byte by byte, from the shards themselves; and a second exchange in the same buffers gives the same."""
    sizes = [700, 1, 512, 701, 64]
    members = ring(tmp_path, sizes, parities, times=2)
    code = Code(5, parities)
    stripe = code.stripe_bytes(max(sizes))
    padded = [member.shard.ljust(stripe * code.data, b"\0") for member in members]
    for rank, member in enumerate(members):
        assert member.made is not None
        for parity in range(parities):
            row = code.kept_row(rank, parity)
            expected = bytearray(stripe)
            for number in range(code.data):
                content = padded[code.contributor(row, number)][number * stripe : (number + 1) * stripe]
                weight = code.weight(number, parity)
                expected = bytearray(a ^ gf_multiply(weight, b) for a, b in zip(expected, content, strict=True))
            start, stop = parity_bounds(member.made.cover, parity)
            assert bytes(member.made.slot.mapped.view[start:stop]) == bytes(expected)


@pytest.mark.parametrize(("parities", "limit"), [(1, 1.0), (2, 2.0)])
def test_no_member_is_sent_more_than_a_shard_per_parity(tmp_path: Path, parities: int, limit: float) -> None:
    """And none is ever sent what another member's shard is made of, but for stripes that are added to at once."""
    received: dict[int, int] = {}
    largest: list[int] = []

    def count(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor:
        received[receiver] = received.get(receiver, 0) + (len(content) if tag != OPENING else 0)
        largest.append(len(content))
        return content

    size = 1 << 20
    members = ring(tmp_path, [size] * 6, parities, Wire(alter=count))
    assert all(not member.problems for member in members)
    assert max(received.values()) <= limit * size * 1.01
    assert max(largest) <= size / (6 - parities) + 128


def test_a_member_that_failed_says_so_and_there_is_no_parity_of_that_save(tmp_path: Path) -> None:
    def nothing_from_1(rank: int, offer: Offer) -> Offer:
        return Offer(SAVE, None, lambda: None) if rank == 1 else offer

    for member in ring(tmp_path, [900] * 4, 2, offers=nothing_from_1):
        assert member.made is None
        assert member.problems == ["rank 1 has nothing to send for this save"]


def test_a_save_that_its_group_voids_becomes_no_parity(tmp_path: Path) -> None:
    """The shard is there, but its digest is not given: the vote failed."""

    def void_2(rank: int, offer: Offer) -> Offer:
        return Offer(SAVE, offer.arena, lambda: None) if rank == 2 else offer

    members = ring(tmp_path, [900] * 4, 1, offers=void_2)
    assert [member.made for member in members] == [None] * 4
    assert {problem for member in members for problem in member.problems} == {
        "rank 2 has nothing to send for this save"
    }


def test_a_member_without_room_keeps_nothing_and_the_others_get_theirs(tmp_path: Path, small_pieces: None) -> None:
    members = ring(tmp_path, [900] * 5, 2, no_room=[3])
    assert members[3].made is None
    assert members[3].problems == ["no room for parity: no space is left."]
    for rank, member in enumerate(members):
        assert rank == 3 or (member.made is not None and not member.problems)
    assert rebuilt(members, 0, [0]) == members[0].shard, "the other parity of each row is enough for one loss"


@pytest.mark.parametrize("parities", [1, 2])
@pytest.mark.parametrize("byte", [0, 100, 207])
def test_parity_whose_parts_were_altered_on_their_way_is_not_kept(
    tmp_path: Path, small_pieces: None, parities: int, byte: int
) -> None:
    """One bit of one bare stripe, also of the digest that it carries: whoever keeps a sum of it knows."""
    altered: list[tuple[int, int]] = []

    def flip(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor:
        if (sender, tag) == (0, FIRST) and not altered and len(content) > byte:
            content[byte] ^= 1
            altered.append((sender, receiver))
        return content

    members = ring(tmp_path, [900] * 5, parities, Wire(alter=flip))
    assert altered == [(0, 1)]
    problems = [problem for member in members for problem in member.problems]
    assert "a partial sum from rank 0 was altered on its way" in members[1].problems
    voided = [member for member in members if any("of its parity" in problem for problem in member.problems)]
    assert len(voided) == parities, problems
    for member in members:
        if not member.problems:
            assert member.made is not None


def test_frames_of_another_save_break_the_link(tmp_path: Path) -> None:
    def other(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor:
        if tag == OPENING and sender == 0:
            content[8] ^= 1
        return content

    members = ring(tmp_path, [900] * 3, 1, Wire(timeout_s=LOST_AFTER_S, alter=other))
    for member in members[1:]:
        assert isinstance(member.error, ExchangeBrokenError)
    assert any("the frame of another exchange" in str(member.error) for member in members[1:])


@pytest.mark.parametrize("tag", [OPENING, PARTIAL])
def test_a_link_that_breaks_ends_the_exchange_and_tells_how_far_it_was(
    tmp_path: Path, small_pieces: None, tag: int
) -> None:
    """From some moment on nothing comes from rank 1 any more; those who wait for it say so within the bound."""
    seen: list[int] = []

    def stop(sender: int, receiver: int, carried: int, content: torch.Tensor) -> torch.Tensor | None:
        if (sender, carried) == (1, tag):
            seen.append(len(content))
            return content if tag == PARTIAL and len(seen) < 3 else None
        return content

    members = ring(tmp_path, [900] * 4, 2, Wire(timeout_s=LOST_AFTER_S, alter=stop))
    errors = [member.error for rank, member in enumerate(members) if rank != 1]
    assert any(isinstance(error, ExchangeBrokenError) and error.rank == 1 for error in errors)
    waiting = next(error for error in errors if isinstance(error, ExchangeBrokenError) and error.rank == 1)
    if tag == PARTIAL:
        assert 0 < waiting.received_bytes < waiting.expected_bytes
