"""A lost shard rebuilt by its rank while others read for it: sound sources only, proved by the owner's digest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from resilience.errors import CorruptCopyError, PeerLostError, StoreError
from resilience.planning.rebuilding import Rebuild, Source
from resilience.replication import rebuilding
from resilience.replication.communicator import Communicator
from resilience.replication.rebuilding import Rebuilt, run_rebuilds
from resilience.snapshot.arena import Arena
from resilience.stores import digest
from resilience.stores.digest import digest_of
from tests.core.fakes import FS, FakeLinks, Wire
from tests.core.unit.test_parity_exchange import Member, ring

OFFER, PIECE = 1, 6
SIZES = [3000, 2900, 2990, 17, 3001]


@dataclass
class Ended:
    rebuilt: Rebuilt | None = None
    bad: Sequence[Source] = ()
    error: Exception | None = None


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many pieces, and several segments of the digest; neither a multiple of the other."""
    monkeypatch.setattr(rebuilding, "ring_piece_bytes", lambda *_: 192)
    monkeypatch.setattr(digest, "SEGMENT_BYTES", 1000)


@pytest.fixture
def members(tmp_path: Path) -> list[Member]:
    made = ring(tmp_path, SIZES, 2)
    assert not any(member.problems for member in made)
    return made


def plan(members: Sequence[Member], lost: int, gone: Sequence[int]) -> Rebuild:
    """Each member's rank reads its own files; those of `gone` have none."""
    made = members[0].made
    assert made is not None
    cover = made.cover
    code_sources = [
        Source(0, place, place, parity, f"n{place}", f"n{place}", "local", place, size, "")
        for parity in (False, True)
        for place, size in enumerate(SIZES if not parity else [made.slot.nbytes] * len(SIZES))
        if place not in gone
    ]
    full = Rebuild(lost, f"n{lost}", lost, SIZES[lost], digest_of(members[lost].shard), cover, tuple(code_sources))
    used = {(term.member, term.parity) for stripe in full.stripes() for term in stripe.terms}
    return replace(full, sources=tuple(each for each in code_sources if (each.member, each.parity) in used))


def run_all(
    members: Sequence[Member],
    rebuilds: Sequence[Rebuild],
    directory: Path,
    *,
    wire: Wire | None = None,
    read: Callable[[Source], Arena] | None = None,
    no_room: Sequence[int] = (),
) -> list[Ended]:
    wire = wire or Wire()
    ended = [Ended() for _ in members]

    def file_of(source: Source) -> Arena:
        made = members[source.member].made
        assert made is not None
        return made.slot if source.parity else members[source.member].arena

    def land(rebuild: Rebuild) -> Arena:
        if rebuild.owner in no_room:
            raise StoreError("no space is left.")
        return Arena(FS.create_mapping(directory / f"rebuilt{rebuild.owner}", rebuild.nbytes))

    def run(rank: int) -> None:
        class World:
            pass

        world: Any = World()
        world.rank, world.links = rank, lambda name, pair: FakeLinks(wire, rank)
        try:
            rebuilt, bad = run_rebuilds(rebuilds, cast("Communicator", world), "round", read=read or file_of, land=land)
            ended[rank] = Ended(rebuilt, bad)
        except (PeerLostError, StoreError) as error:
            ended[rank] = Ended(error=error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    return ended


@pytest.mark.parametrize("gone", [(0,), (3,), (4, 0), (1, 2), (3, 4)])
def test_lost_shards_come_back_each_on_its_own_rank(
    members: list[Member], gone: tuple[int, ...], tmp_path: Path
) -> None:
    rebuilds = [plan(members, lost, gone) for lost in gone]
    for rank, ended in enumerate(run_all(members, rebuilds, tmp_path)):
        assert ended.error is None
        assert (ended.rebuilt is not None) == (rank in gone)
        if ended.rebuilt is not None:
            assert not ended.rebuilt.problem
            assert bytes(ended.rebuilt.arena.mapped.view) == members[rank].shard


def test_no_more_travels_than_the_plan_says(members: list[Member], tmp_path: Path) -> None:
    carried: dict[int, int] = {}

    def count(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor:
        if tag == PIECE:
            assert receiver == 1
            carried[sender] = carried.get(sender, 0) + len(content)
        return content

    rebuild = plan(members, 1, (1,))
    run_all(members, [rebuild], tmp_path, wire=Wire(alter=count))
    assert {f"n{rank}": nbytes for rank, nbytes in carried.items()} == rebuild.travelling()


def test_a_source_that_is_not_sound_is_named_by_who_reads_it_and_nothing_travels(
    members: list[Member], tmp_path: Path
) -> None:
    rebuild = plan(members, 1, (1,))
    culprit = next(source for source in rebuild.sources if source.parity)
    carried: list[int] = []

    def note(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor:
        carried.extend([sender] if tag == PIECE else [])
        return content

    def read(source: Source) -> Arena:
        if source == culprit:
            raise CorruptCopyError("it has another digest.")
        made = members[source.member].made
        assert made is not None
        return made.slot if source.parity else members[source.member].arena

    ended = run_all(members, [rebuild], tmp_path, read=read, wire=Wire(alter=note))
    assert [list(each.bad) for rank, each in enumerate(ended) if rank == culprit.rank] == [[culprit]]
    assert all(not each.bad for rank, each in enumerate(ended) if rank != culprit.rank)
    outcome = ended[1].rebuilt
    assert outcome is not None
    assert (f"what rank {culprit.rank} has for it cannot be read" in outcome.problem, outcome.wrong) == (True, False)
    assert carried == []


def test_a_sum_that_is_wrong_is_told_from_a_source_that_is_bad(members: list[Member], tmp_path: Path) -> None:
    """All sources are sound, as far as anybody can tell, and the sum has another digest than the owner's."""
    rebuild = plan(members, 2, (2,))
    made = members[next(source.member for source in rebuild.sources if source.parity)].made
    assert made is not None
    made.slot.mapped.view[rebuild.code.header_bytes + 5] ^= 1
    made.slot.mapped.view[-1 - rebuild.stripe_bytes] ^= 1
    outcome = run_all(members, [rebuild], tmp_path)[2].rebuilt
    assert outcome is not None
    assert outcome.wrong
    assert "its owner computed" in outcome.problem


def test_bytes_altered_on_their_way_are_noticed(members: list[Member], tmp_path: Path) -> None:
    def flip(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor:
        if tag == PIECE and sender == 0:
            content[0] ^= 1
        return content

    outcome = run_all(members, [plan(members, 1, (1,))], tmp_path, wire=Wire(alter=flip))[1].rebuilt
    assert outcome is not None
    assert outcome.wrong


def test_a_rank_without_room_says_so_and_nobody_waits_for_it(members: list[Member], tmp_path: Path) -> None:
    rebuilds = [plan(members, lost, (1, 3)) for lost in (1, 3)]
    ended = run_all(members, rebuilds, tmp_path, no_room=[1])
    assert isinstance(ended[1].error, StoreError)
    assert ended[3].rebuilt is not None
    assert not ended[3].rebuilt.problem
    assert all(each.error is None for rank, each in enumerate(ended) if rank != 1)


@pytest.mark.parametrize("tag", [OFFER, PIECE])
def test_a_peer_that_falls_silent_ends_the_rebuild_within_the_bound(
    members: list[Member], tmp_path: Path, tag: int
) -> None:
    def drop(sender: int, receiver: int, carried: int, content: torch.Tensor) -> torch.Tensor | None:
        return None if (sender, carried) == (0, tag) else content

    ended = run_all(members, [plan(members, 1, (1,))], tmp_path, wire=Wire(timeout_s=1.0, alter=drop))
    assert isinstance(ended[1].error, PeerLostError)
    assert ended[1].error.rank == 0
