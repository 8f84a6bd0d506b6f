"""What a holder has of an earlier save does not travel again; what it puts together is the owner's, or nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilience.errors import PeerLostError
from resilience.planning.inventory import SaveId
from resilience.planning.travel import are_ranges, rest_of, spans_of
from resilience.replication import still as still_module
from resilience.replication.clique import CliqueExchange, ExchangeBrokenError, Offer, Received
from resilience.replication.pace import Pace
from resilience.replication.still import Still
from resilience.snapshot.arena import Arena
from resilience.stores.digest import digest_of
from tests.core.fakes import RANGES_TAG, SEND_TAGS, CountingInbox, FakeLinks, Wire
from tests.core.shards import FS, SAVE, copied, identity, item, layout_of

VALUES = b"{}"
SIZES = [5000, 200, 9000, 40_000, 10, 10, 7000]  # elements
FROZEN = {0, 3, 4}


@dataclass
class Pair:
    """An owner (rank 0) whose arenas are used in turn, and a holder (rank 1) with a few buffers for its shards."""

    directory: Path
    slots: int = 2
    sizes: list[int] = field(default_factory=lambda: list(SIZES))
    alter: Callable[[int, int, int, torch.Tensor], torch.Tensor | None] = lambda *carried: carried[3]
    timeout_s: float = 20.0

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.tensors = [torch.randint(0, 1000, (size,), dtype=torch.int32) for size in self.sizes]
        self.wire = Wire(self.timeout_s, self._carry)
        self.lay_out()
        self.free: list[Arena] = []
        self.inbox = CountingInbox(self.directory / "in")
        self.iteration = 0
        self.owner, self.holder = (
            CliqueExchange(FakeLinks(self.wire, rank), rank, holders, sources, Pace(None, time.monotonic, time.sleep))
            for rank, holders, sources in ((0, (1,), ()), (1, (), (0,)))
        )

    def lay_out(self) -> None:
        """Of the tensors as they are now."""
        self.items = [item(f"t{number}", tensor) for number, tensor in enumerate(self.tensors)]
        self.layout = layout_of(self.items, VALUES)
        self.arenas = [
            Arena(FS.create_mapping(self.directory / f"own{self.layout.nbytes}-{turn}", self.layout.nbytes))
            for turn in range(2)
        ]

    def save(self, *, void: bool = False) -> tuple[Received | None, str, int, Exception | None]:
        """One save: what the holder got, why not, the bytes that were sent of it, and how its exchange ended."""
        self.iteration += 1
        save = SaveId(self.iteration, 1, SAVE.attempt)
        arena = self.arenas[self.iteration % 2]
        arena.use(self.layout)
        arena.write_values(VALUES)
        whose = replace(identity(values=VALUES), iteration=self.iteration)
        copied(self.items, arena, lambda: arena.seal(whose))
        before, digest = self.owner.sent_bytes, None if void else digest_of(arena.mapped.view)
        sender = threading.Thread(target=self._send, args=(Offer(save, arena, lambda: digest, self.layout.layout_id),))
        sender.start()
        held: dict[int, tuple[Arena, SaveId]] = {}
        if len(self.free) >= self.slots:
            slot = self.free.pop(0)
            base, slot.holds = slot.holds, None
            held = {0: (slot, base)} if base is not None else {}
        try:
            received, reasons = self.holder.run(Offer(save, None, lambda: None, held=held), self.inbox)
        except PeerLostError as error:
            return None, "", 0, error
        finally:
            sender.join(30)
        for got in received:
            self.free.append(got.slot)
            assert bytes(got.slot.mapped.view) == bytes(arena.mapped.view)
        return received[0] if received else None, reasons.get(0, ""), self.owner.sent_bytes - before, None

    def _carry(self, sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor | None:
        return self.alter(sender, receiver, tag, content)  # as it is by now

    def _send(self, offer: Offer) -> None:
        try:
            self.owner.run(offer, self.inbox)
        except PeerLostError:
            assert self.alter is not Pair.alter

    def run(self, saves: int) -> None:
        """Saves, after each of which all that is not frozen changes."""
        for _ in range(saves):
            self.save()
            self.train()

    def train(self, but: set[int] = FROZEN) -> None:
        """Change every tensor that is not frozen."""
        for number, tensor in enumerate(self.tensors):
            if number not in but:
                tensor.add_(1)


@pytest.fixture
def pair(tmp_path: Path) -> Callable[..., Pair]:
    return lambda **given: Pair(tmp_path / "pair", **given)


def test_frozen_tensors_are_sent_once_for_each_buffer_and_never_again(pair: Callable[..., Pair]) -> None:
    job, sent = pair(), []
    for _ in range(8):
        got, why, nbytes, _ = job.save()
        assert got, why
        sent.append(nbytes)
        job.train()
    frozen = 4 * sum(SIZES[number] for number in (0, 3))  # the tiny one goes with its neighbours
    assert sent[:2] == [job.layout.nbytes] * 2
    assert sent[-2:] == [job.layout.nbytes - frozen] * 2
    assert job.owner.spared_bytes >= 2 * frozen


def test_a_state_that_changes_everywhere_is_looked_at_now_and_then_and_goes_whole(
    pair: Callable[..., Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[int] = []
    digest = Still._digest

    def count(self: Still, arena: Arena, number: int) -> bytes:
        hashed.append(job.iteration)
        return digest(self, arena, number)

    monkeypatch.setattr(Still, "_digest", count)
    job = pair()
    for _ in range(36):
        got, why, nbytes, _ = job.save()
        assert got, why
        assert nbytes == job.layout.nbytes
        job.train(but=set())
    assert len(set(hashed)) == 4  # when a holder first had something, the one after it, and every sixteenth


def test_what_thaws_is_sent_at_once_and_what_freezes_is_found_later(pair: Callable[..., Pair]) -> None:
    job = pair()
    job.run(6)
    job.tensors[3][7] += 1  # in the middle of what was still for long
    got, _, sent, _ = job.save()
    assert got
    assert sent >= 4 * SIZES[3]
    for _ in range(30):
        job.train(but=FROZEN | {2})
        got, why, sent, _ = job.save()
        assert got, why
    assert sent <= job.layout.nbytes - 4 * (SIZES[0] + SIZES[2] + SIZES[3])


def test_a_buffer_that_changed_under_us_is_refused_and_the_next_shard_comes_whole(pair: Callable[..., Pair]) -> None:
    job = pair(slots=1)
    job.run(6)
    at = next(placed.start for placed in job.layout.placed if placed.piece.key == "t3")
    job.free[0].mapped.view[at] ^= 1
    got, why, _, _ = job.save()
    assert got is None
    assert "all but what was kept of iteration 6" in why
    assert job.inbox.discarded == [(0, True)]
    got, why, sent, _ = job.save()
    assert got, why
    assert sent == job.layout.nbytes


def test_a_void_save_leaves_nothing_that_counts_as_held(pair: Callable[..., Pair]) -> None:
    job = pair(slots=1)
    job.run(5)
    got, why, _, _ = job.save(void=True)
    assert (got, why) == (None, "it gave up this save")
    assert job.free == []
    got, _, sent, _ = job.save()
    assert got
    assert sent == job.layout.nbytes


def test_another_layout_goes_whole(pair: Callable[..., Pair]) -> None:
    job = pair(slots=1)
    job.run(5)
    job.tensors.append(torch.ones(64, dtype=torch.int32))  # within the padding's page or not, it is another layout
    job.lay_out()
    got, why, sent, _ = job.save()
    assert got, why
    assert sent == job.layout.nbytes


@pytest.mark.parametrize("ranges", [[[0, 5]], [[50, 40]], [[0, 10], [5, 20]], [[0, 1 << 50]], [[-5, 10]]])
def test_ranges_that_are_none_end_the_exchange(pair: Callable[..., Pair], ranges: list[list[int]]) -> None:
    def alter(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor:
        if tag != RANGES_TAG:
            return content
        return torch.tensor((ranges * len(content))[: len(content)])  # where it is one: twice, they overlap

    job = pair(slots=1, timeout_s=2.0)
    job.run(5)
    job.alter = alter
    got, why, _, error = job.save()
    assert got is None
    assert isinstance(error, ExchangeBrokenError), why
    assert "ranges" in str(error)
    assert job.inbox.discarded == [(0, False)] or not job.inbox.discarded


def test_a_rest_that_was_not_asked_for_ends_the_exchange(pair: Callable[..., Pair]) -> None:
    def alter(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor:
        if tag == SEND_TAGS["opening"]:
            content[7], content[8] = 2, 1
        return content

    job = pair(timeout_s=2.0, alter=alter)
    _, _, _, error = job.save()
    assert isinstance(error, ExchangeBrokenError)
    assert "not asked for" in str(error)


def test_ranges_that_never_come_end_the_exchange(pair: Callable[..., Pair]) -> None:
    job = pair(slots=1, timeout_s=1.0)
    job.run(5)
    job.alter = lambda sender, receiver, tag, content: None if tag == RANGES_TAG else content
    _, _, _, error = job.save()
    assert isinstance(error, ExchangeBrokenError)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.integers(1, 12_000), min_size=1, max_size=8),
    st.integers(1, 3),
    st.lists(st.sets(st.integers(0, 7)), min_size=3, max_size=24),
)
def test_whatever_changes_and_whatever_is_held_a_replica_is_the_owner_s_bytes(
    tmp_path_factory: pytest.TempPathFactory, sizes: list[int], slots: int, changes: list[set[int]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(still_module, "_LOOK_EVERY", 3)
        patch.setattr(still_module, "_KNOWN_SAVES", 3)
        job = Pair(tmp_path_factory.mktemp("still"), slots=slots, sizes=sizes)
        for changed in changes:
            got, why, _, _ = job.save()
            assert got, why
            job.train(but=set(range(len(sizes))) - changed)


PIECES = st.lists(st.integers(0, 3_000_000), max_size=30)


@given(PIECES, st.integers(0, 5000))
def test_spans_cover_all_pieces_once_and_large_ones_stand_alone(lengths: list[int], first: int) -> None:
    pieces = list(_laid_out(lengths, first))
    nbytes = first + sum(lengths) + 100
    spans = spans_of(pieces, nbytes)
    assert are_ranges(spans, nbytes)
    assert rest_of(nbytes, spans, joined_bytes=0) == rest_of(nbytes, [p for p in pieces if p[0] < p[1]], joined_bytes=0)
    assert set(spans) >= {(start, stop) for start, stop in pieces if stop - start >= 1 << 20}
    assert len(spans) <= 2 * (nbytes // max(4096, min(1 << 20, nbytes // 64))) + 1


def _laid_out(lengths: list[int], at: int) -> Iterator[Any]:
    for length in lengths:
        yield at, at + length
        at += length
