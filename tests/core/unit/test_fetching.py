"""Shards on their way at a restart: room is made ahead of the bytes, which are proved as they come, or given up."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from resilience.errors import CorruptCopyError, ForgedMessageError, PeerLostError, StoreError
from resilience.planning.retrieval import Fetch
from resilience.replication.authenticated import OPEN, KeyedSession, Session
from resilience.replication.communicator import Communicator, Links
from resilience.replication.landing import Landing
from resilience.replication.retrieval import Fetched, run_fetches
from resilience.snapshot.arena import Arena
from resilience.stores import digest
from resilience.stores.authentication import Key
from resilience.stores.digest import digest_of
from resilience.stores.pages import always
from tests.core.fakes import FS, FakeLinks, Wire

SEGMENT = 1 << 16
SIZES = {0: 11 * SEGMENT + 5, 1: 3 * SEGMENT}
SENDER, RECEIVER = 1, 0


@pytest.fixture(autouse=True)
def _small_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digest, "SEGMENT_BYTES", SEGMENT)


@dataclass
class Restart:
    """Rank 1 has the shards of both ranks, rank 0 fetches them. What is sent waits in the wire until it is received."""

    directory: Path
    wire: Wire = field(default_factory=lambda: Wire(timeout_s=0.5))
    links: list[FakeLinks] = field(default_factory=list)
    arenas: dict[int, Arena] = field(default_factory=dict)
    reserved: list[tuple[int, int]] = field(default_factory=list)
    room_bytes: int = 1 << 40
    session: Session = OPEN
    algorithm: str = digest.ALGORITHM
    warm: bool = False

    def __post_init__(self) -> None:
        self.contents = {owner: os.urandom(size) for owner, size in SIZES.items()}
        self.fetches = [
            Fetch(owner, "b", "b", "in_memory", SENDER, "a", RECEIVER, len(content), digest_of(content, self.algorithm))
            for owner, content in self.contents.items()
        ]

    def send(self, unreadable: Sequence[int] = ()) -> None:
        def read(fetch: Fetch) -> Arena:
            if fetch.owner in unreadable:
                raise CorruptCopyError("it is torn.")
            arena = Arena(FS.create_mapping(self.directory / f"copy{fetch.owner}", fetch.nbytes))
            arena.mapped.view[:] = self.contents[fetch.owner]
            return arena

        assert self._run(SENDER, read=read) == []

    def receive(self) -> list[Fetched]:
        return self._run(RECEIVER, land=self._land, reserve=self._reserve)

    def _run(self, rank: int, **doing: Callable[..., object]) -> list[Fetched]:
        def links(name: str, members: tuple[int, ...]) -> Links:
            self.links.append(FakeLinks(self.wire, rank))
            return self.session.links(self.links[-1], name, rank)

        class World:
            pass

        world = World()
        world.rank, world.links = rank, links  # type: ignore[attr-defined]
        actions = {"read": _unexpected, "land": _unexpected, "reserve": _unexpected, "meanwhile": lambda: None} | doing
        return run_fetches(self.fetches, cast("Communicator", world), "round", **actions)  # type: ignore[arg-type]

    def _land(self, fetch: Fetch) -> Arena:
        path = self.directory / f"landing{fetch.owner}"
        begin = FS.create_mapping if self.warm else FS.begin_mapping
        self.arenas[fetch.owner] = Arena(begin(path, fetch.nbytes))
        return self.arenas[fetch.owner]

    def _reserve(self, arena: Arena, stop: int, wanted: Callable[[], bool]) -> None:
        if stop > self.room_bytes:
            refused = StoreError("cannot reserve: no space is left.")
            refused.errno = errno.ENOSPC
            raise refused
        FS.reserve(arena.mapped, stop, wanted)


def _unexpected(*_: object) -> Arena:
    raise AssertionError("this rank is not asked for that")


@pytest.fixture
def restart(memory_mount: Path) -> Iterator[Restart]:
    yield Restart(memory_mount)
    assert [thread.name for thread in threading.enumerate() if thread.name == "resilience-landing"] == []


@pytest.mark.parametrize("warm", [False, True])
def test_shards_of_more_segments_than_are_under_way_at_once_arrive_whole(restart: Restart, warm: bool) -> None:
    restart.warm = warm
    restart.send()
    fetched = restart.receive()
    assert [(got.fetch.owner, got.problem) for got in fetched] == [(0, ""), (1, "")]
    for got in fetched:
        assert got.arena is not None
        assert bytes(got.arena.mapped.view) == restart.contents[got.fetch.owner]
        assert got.arena.mapped.reserved == got.arena.nbytes
    assert [links.closed for links in restart.links] == ["in peace"] * 2


def test_a_segment_altered_on_its_way_is_told_and_spoils_no_other_shard(restart: Restart) -> None:
    def alter(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor:
        if content.numel() == 5:  # the last segment of rank 0's shard
            content[0] ^= 1
        return content

    restart.wire.alter = alter
    restart.send()
    first, second = restart.receive()
    assert "the owner's is" in first.problem
    assert second.problem == ""


def test_a_copy_that_its_holder_cannot_read_is_told_and_the_next_one_comes(restart: Restart) -> None:
    restart.send(unreadable=[0])
    first, second = restart.receive()
    assert "b could not read its copy" in first.problem
    assert second.problem == ""
    assert second.arena is not None
    assert bytes(second.arena.mapped.view) == restart.contents[1]


def test_a_mount_that_becomes_full_while_shards_arrive_ends_the_round_and_no_page_beyond_is_touched(
    restart: Restart,
) -> None:
    restart.room_bytes = 6 * SEGMENT
    restart.send()
    with pytest.raises(StoreError, match="no space is left"):
        restart.receive()
    assert restart.links[-1].closed == "failed"
    assert restart.arenas[0].mapped.reserved == 6 * SEGMENT
    assert 1 not in restart.arenas


def test_a_peer_that_dies_while_shards_arrive_ends_the_round_and_the_making_of_room(restart: Restart) -> None:
    sent = 0

    def alter(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor | None:
        nonlocal sent
        sent += 1
        return content if sent < 5 else None

    restart.wire.alter = alter
    restart.send()
    with pytest.raises(PeerLostError):
        restart.receive()
    assert restart.links[-1].closed == "failed"


def test_room_that_is_no_longer_wanted_is_not_made(memory_mount: Path) -> None:
    mapped = FS.begin_mapping(memory_mount / "landing", 4 * SEGMENT)
    FS.reserve(mapped, 2 * SEGMENT, always)
    with pytest.raises(StoreError) as raised:
        FS.reserve(mapped, 4 * SEGMENT, lambda: False)
    assert raised.value.errno == errno.ECANCELED
    assert mapped.reserved == 2 * SEGMENT
    mapped.close()


def _keyed(directory: Path, wire: Wire) -> Restart:
    session = KeyedSession(Key(b"a secret of sixteen bytes"), b"session")
    return Restart(directory, wire, session=session, algorithm=digest.STRONG)


def test_with_a_key_shards_arrive_whole_under_a_digest_that_cannot_be_deceived(memory_mount: Path) -> None:
    restart = _keyed(memory_mount, Wire(timeout_s=5.0))
    restart.send()
    for got in restart.receive():
        assert got.problem == ""
        assert got.arena is not None
        assert bytes(got.arena.mapped.view) == restart.contents[got.fetch.owner]


def test_with_a_key_nobody_says_in_a_holder_s_name_that_it_has_nothing(memory_mount: Path) -> None:
    """Without one that strikes off a good copy; who does it to all copies chooses what the job goes back to."""

    def nothing_here(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor:
        if tag == 1:
            content[0] = 0
        return content

    restart = _keyed(memory_mount, Wire(timeout_s=5.0, alter=nothing_here))
    restart.send()
    with pytest.raises(ForgedMessageError, match="from rank 1"):
        restart.receive()
    assert restart.links[-1].closed == "failed"


def test_with_a_key_other_bytes_of_a_shard_are_of_no_use(memory_mount: Path) -> None:
    def flip(sender: int, receiver: int, tag: int, content: torch.Tensor) -> torch.Tensor:
        if tag == 2:
            content[-1] ^= 1
        return content

    restart = _keyed(memory_mount, Wire(timeout_s=5.0, alter=flip))
    restart.send()
    assert all("the owner's is blake2b-256-32m:" in got.problem for got in restart.receive())


def test_pages_that_cannot_be_had_are_told_as_what_keeps_a_shard_from_coming() -> None:
    """Not as an error of the system's own kind, which nobody who starts a job has to know."""

    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    arena: Any = SimpleNamespace(nbytes=SEGMENT, mapped=SimpleNamespace(reserved=0, fault_in=refuse))
    fetch = Fetch(1, "b", "b", "in_memory", SENDER, "a", RECEIVER, SEGMENT, "digest")
    landing = Landing([fetch], lambda _: arena, lambda *_: None)
    with pytest.raises(StoreError, match=r"no pages can be had .* Input/output error"):
        landing.next()
    landing.close()
