"""A replica that is composed from the holder's own state: it is the owner's bytes, or it is refused."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from resilience.errors import PeerLostError
from resilience.planning import travel
from resilience.replication.clique import CliqueExchange, Offer, Received
from resilience.replication.pace import Pace
from resilience.snapshot import twins
from resilience.snapshot.arena import Arena
from resilience.snapshot.copying import Copying
from resilience.snapshot.twins import Twin, Twins, rest_for
from resilience.state.items import Item
from resilience.stores.digest import digest_of
from tests.core.fakes import SEND_TAGS, CountingInbox, FakeLinks, Wire
from tests.core.shards import FS, SAVE, item, layout_of, random_bytes, sealed

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.uint8]


@pytest.fixture(autouse=True)
def _tiny_things_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else everything that a test has would be quicker to send than to compose."""
    monkeypatch.setattr(travel, "_JOINED_BYTES", 16)
    monkeypatch.setattr(twins, "worth_it", lambda nbytes, rest: True)


@dataclass
class Rank:
    """One member of a data-parallel group of two, on a node of its own."""

    number: int
    directory: Path
    items: list[Item]
    values: bytes = b"{}"
    known: Twins = field(default_factory=lambda: Twins(range(2)))

    def __post_init__(self) -> None:
        self.layout = layout_of(self.items, self.values, part=self.number, parts=2)
        self.shared = {each.key for each in self.items if each.replicated}
        self.arena = sealed(
            self.directory / "own", self.items, self.layout, self.values, owner=self.number, world_size=2
        )
        self.inbox = CountingInbox(self.directory / "in")
        self.ended: tuple[list[Received], dict[int, str]] | PeerLostError | None = None

    def compose(self) -> dict[int, Twin]:
        composed = self.known.compose(self.layout, self.items, self.shared, self.inbox.slot)
        Copying().start([part for _, part in composed.values()], (), lambda: None)
        return {owner: twin for owner, (twin, _) in composed.items()}

    def exchange(self, wire: Wire, composed: dict[int, Twin]) -> None:
        other = 1 - self.number
        offer = Offer(
            SAVE, self.arena, lambda: digest_of(self.arena.mapped.view), self.layout.layout_id, rest_for(self.layout),
            composed,
        )  # fmt: skip
        self.talk = CliqueExchange(
            FakeLinks(wire, self.number), self.number, (other,), (other,), Pace(None, time.monotonic, time.sleep),
        )  # fmt: skip
        try:
            received, reasons = self.talk.run(offer, self.inbox)
            self.ended = received, dict(reasons)
        except PeerLostError as error:
            self.ended = error


def together(ranks: list[Rank], wire: Wire, composed: list[dict[int, Twin]]) -> None:
    threads = [
        threading.Thread(target=rank.exchange, args=(wire, twin)) for rank, twin in zip(ranks, composed, strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)


def replica(rank: Rank) -> Received:
    assert isinstance(rank.ended, tuple), rank.ended
    (received,), reasons = rank.ended
    assert reasons == {}
    return received


def two(root: Path, make: Callable[[int], list[Item]]) -> list[Rank]:
    """Both know each other's shards: one exchange is over, in which they came whole."""
    for number in range(2):
        (root / str(number)).mkdir(parents=True, exist_ok=True)
    ranks = [Rank(number, root / str(number), make(number)) for number in range(2)]
    together(ranks, Wire(), [{}, {}])
    for rank in ranks:
        got = replica(rank)
        assert not got.composed
        rank.known.learn(got.owner, got.slot.mapped.view)
    return ranks


SHAPES = st.lists(
    st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 9), max_size=3), st.booleans()), min_size=1, max_size=6
)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SHAPES)
def test_whatever_the_state_is_a_composed_replica_is_the_owner_s_bytes(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[torch.dtype, list[int], bool]]
) -> None:
    def make(rank: int) -> list[Item]:
        return [
            item(
                f"model/{place}", random_bytes(dtype, shape, place if shared else 100 * rank + place), replicated=shared
            )
            for place, (dtype, shape, shared) in enumerate(shapes)
        ]

    ranks = two(tmp_path_factory.mktemp("composed"), make)
    together(ranks, Wire(), [rank.compose() for rank in ranks])
    for rank in ranks:
        other, got = ranks[1 - rank.number], replica(rank)
        assert got.composed
        assert bytes(got.slot.mapped.view) == bytes(other.arena.mapped.view)
        assert rank.talk.sent_bytes + rank.talk.spared_bytes == rank.arena.nbytes
        assert rank.talk.sent_bytes == sum(stop - start for start, stop in rest_for(rank.layout))


def alike(rank: int) -> list[Item]:
    """Much in common, and a little of its own between."""
    common = [item(f"model/{name}", random_bytes(torch.float32, (64, 16), place)) for place, name in enumerate("ac")]
    return [common[0], item("rng/b", random_bytes(torch.float32, (3,), rank), replicated=False), common[1]]


def test_an_item_that_is_not_equal_after_all_is_refused_by_digest(tmp_path: Path) -> None:
    ranks = two(tmp_path, alike)
    ranks[1].items[0].tensor.view(torch.int32)[3, 3] ^= 1  # in the half that rank 0 stores
    together(ranks, Wire(), [rank.compose() for rank in ranks])
    assert replica(ranks[0]).composed
    assert replica_is_refused(ranks[1])


def replica_is_refused(rank: Rank) -> bool:
    assert isinstance(rank.ended, tuple)
    received, reasons = rank.ended
    if received:
        return False
    assert "its bytes arrived with digest" in reasons[1 - rank.number]
    return rank.talk.unequal == {1 - rank.number} and rank.inbox.discarded == [(1 - rank.number, True)]


def test_what_travels_is_still_proved(tmp_path: Path) -> None:
    def flip(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor:
        if (sender, tag) == (0, SEND_TAGS["segment"]):
            content[len(content) // 2] ^= 1
        return content

    ranks = two(tmp_path, alike)
    together(ranks, Wire(alter=flip), [rank.compose() for rank in ranks])
    assert replica(ranks[0]).composed
    assert replica_is_refused(ranks[1])


def test_a_shard_of_another_layout_comes_whole_into_the_slot_that_was_composed(tmp_path: Path) -> None:
    ranks = two(tmp_path, alike)
    composed = [rank.compose() for rank in ranks]
    other = ranks[0]
    renamed = [item(each.key.replace("/a", "/d"), each.tensor, replicated=each.replicated) for each in other.items]
    other.layout = layout_of(renamed, part=0, parts=2)
    assert other.layout.nbytes == other.arena.nbytes
    other.arena = sealed(tmp_path / "other", renamed, other.layout, world_size=2)
    together(ranks, Wire(), composed)
    got = replica(ranks[1])
    assert not got.composed
    assert bytes(got.slot.mapped.view) == bytes(other.arena.mapped.view)
    assert composed[1] == {}, "the exchange took charge of the slot"


def test_an_owner_that_failed_leaves_the_composed_slot_to_whoever_gave_it(tmp_path: Path) -> None:
    ranks = two(tmp_path, alike)
    composed = [rank.compose() for rank in ranks]
    sealed_arena, ranks[0].arena = ranks[0].arena, None  # type: ignore[assignment]

    def failed() -> None:
        offer = Offer(SAVE, None, lambda: None, twins=composed[0])
        ranks[0].talk = CliqueExchange(FakeLinks(wire, 0), 0, (1,), (1,), Pace(None, time.monotonic, time.sleep))
        received, reasons = ranks[0].talk.run(offer, ranks[0].inbox)
        ranks[0].ended = received, dict(reasons)

    wire = Wire()
    ranks[0].exchange = lambda wire, twin: failed()  # type: ignore[method-assign]
    together(ranks, wire, composed)
    assert replica(ranks[0]).composed, "it still receives"
    assert isinstance(ranks[1].ended, tuple)
    assert ranks[1].ended[1] == {0: "it has nothing to send for this save"}
    assert set(composed[1]) == {0}
    assert sealed_arena.nbytes == composed[1][0].slot.nbytes


def test_a_shard_of_a_rank_that_shares_nothing_is_not_composed(tmp_path: Path) -> None:
    for number in range(2):
        (tmp_path / str(number)).mkdir()
    ranks = [Rank(number, tmp_path / str(number), alike(number)) for number in range(2)]
    ranks[1].known = Twins([1, 2, 3])  # of another data-parallel group
    ranks[1].known.learn(0, ranks[0].arena.mapped.view)
    assert ranks[1].compose() == {}


def test_without_a_warm_slot_the_training_thread_makes_none(tmp_path: Path) -> None:
    ranks = two(tmp_path, alike)
    nothing: Callable[[int, int], Arena | None] = lambda owner, nbytes: None  # noqa: E731
    assert ranks[0].known.compose(ranks[0].layout, ranks[0].items, ranks[0].shared, nothing) == {}
    assert FS.list_dir(ranks[0].directory / "in") == ["slot1"]
