"""What every redundancy scheme must keep to, shown on real stores: a clique of threads, each with a node's directory.

class TestMine(RedundancyContract):
    scheme = "mine"          # registered in planning.schemes.SCHEMES and replication.redundancy.REDUNDANCIES
    clique = 5
"""

from __future__ import annotations

import itertools
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from resilience.planning.decision import ElectionPolicy
from resilience.planning.election import elect
from resilience.planning.inventory import Inventory, SaveId
from resilience.planning.rebuilding import Rebuild
from resilience.planning.retrieval import plan_retrieval
from resilience.planning.schemes import SCHEMES
from resilience.planning.topology import Topology
from resilience.replication.clique import Offer
from resilience.replication.pace import Pace
from resilience.replication.rebuilt_digest import rebuilt_digest
from resilience.replication.redundancy import REDUNDANCIES
from resilience.stores.digest import digest_of
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.keeper import ShardKeeper
from resilience.stores.node_store import NodeStore
from resilience.testing.links import ThreadLinks, Wire

__all__ = ["RedundancyContract"]

_RUN = "contract"
_SAVE = SaveId(10, 1, "c0" * 16)
_BOUND_S = 120.0


@dataclass
class _Member:
    """One rank with its node's directory, its shard, and why its save is not protected."""

    rank: int
    keeper: ShardKeeper
    shard: bytes
    problems: list[str] = field(default_factory=list)

    @property
    def node(self) -> str:
        return self.keeper.store.node_id

    def inventory(self) -> Inventory:
        return self.keeper.store.reader.inventory([self.node])

    def files(self) -> dict[str, int]:
        """Of the save, by name, with their sizes; not records."""
        folder = self.keeper.store.shard_path(_SAVE, self.rank, 1).parent
        return {path.name: path.stat().st_size for path in folder.glob("*.safetensors")} if folder.exists() else {}


class RedundancyContract:
    """One clique of `clique` nodes with shards of unequal size."""

    scheme = "replica"
    clique = 4
    shard_bytes = 40_000

    def test_any_losses_that_it_is_for_leave_every_shard_within_reach(self, tmp_path: Path) -> None:
        """Byte for byte, as the restore would find it: inventory, election, retrieval."""
        with self._protected(tmp_path) as (members, topology):
            assert [member.problems for member in members] == [[]] * self.clique
            assert topology.survives == SCHEMES[self.scheme].losses(self.clique)
            for count in range(topology.survives + 1):
                for lost in itertools.combinations(range(self.clique), count):
                    found = self._recovered(members, lost)
                    assert found == {member.rank: digest_of(member.shard) for member in members}, lost

    def test_more_losses_than_that_are_never_guessed_at(self, tmp_path: Path) -> None:
        """Nothing is elected, or what is can be had."""
        with self._protected(tmp_path) as (members, topology):
            for lost in itertools.combinations(range(self.clique), min(topology.survives + 1, self.clique)):
                found = self._recovered(members, lost)
                assert found in ({}, {member.rank: digest_of(member.shard) for member in members}), lost

    def test_what_is_kept_is_what_was_planned(self, tmp_path: Path) -> None:
        """The memory sum is made from it."""
        with self._protected(tmp_path) as (members, topology):
            shards = [len(member.shard) for member in members]
            for member in members:
                planned = SCHEMES[self.scheme].files(topology, member.rank, shards)
                assert sum(member.files().values()) == len(member.shard) + sum(planned.values())

    def test_a_member_without_a_shard_leaves_the_save_unprotected_and_says_so(self, tmp_path: Path) -> None:
        with self._protected(tmp_path, void=1) as (members, _):
            assert any(member.problems for member in members)
            assert self._recovered(members, (1,)) == {}, "what was void has not come back"

    def test_all_is_deleted_with_the_save(self, tmp_path: Path) -> None:
        with self._protected(tmp_path) as (members, _):
            for member in members:
                member.keeper.delete(_SAVE)
                assert member.files() == {}
                assert member.inventory().node_saves == ()

    def test_a_save_after_a_deleted_one_takes_no_new_memory(self, tmp_path: Path) -> None:
        """Buffers are warm and used again, like arenas."""
        with self._protected(tmp_path) as (members, topology):
            before = self._deleted(members)
            self._exchange(members, topology, None)
            assert [member.problems for member in members] == [[]] * self.clique
            assert self._deleted(members) == before

    def _deleted(self, members: Sequence[_Member]) -> list[int]:
        """How many buffers each member has once its save is gone."""
        for member in members:
            member.keeper.delete(_SAVE)
        return [len(list(member.keeper.arena_dir.iterdir())) for member in members]

    # -- parts --------------------------------------------------------------------------------------------------------

    @contextmanager
    def _protected(self, directory: Path, void: int | None = None) -> Iterator[tuple[list[_Member], Topology]]:
        """One save that went through one exchange. `void`: the rank whose save was not agreed on."""
        nodes = [f"node{rank}" for rank in range(self.clique)]
        topology = SCHEMES[self.scheme].place(nodes, jump=None, factor=self.clique, domains=None, restart=False)
        members = [self._member(directory, rank) for rank in range(self.clique)]
        self._exchange(members, topology, void)
        try:
            yield members, topology
        finally:
            for member in members:
                member.keeper.close()

    def _exchange(self, members: Sequence[_Member], topology: Topology, void: int | None) -> None:
        wire = Wire()
        work: list[Callable[[], None]] = [
            lambda member=member: self._protect(member, topology, wire, void=member.rank == void)  # type: ignore[misc]
            for member in members
        ]
        threads = [threading.Thread(target=each) for each in work]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_BOUND_S)
        assert not any(thread.is_alive() for thread in threads), "a member hangs"

    def _member(self, directory: Path, rank: int) -> _Member:
        fs = PosixFileSystem()
        store = NodeStore(directory / f"node{rank}", _RUN, f"node{rank}", "local", fs)
        store.prepare()
        keeper = ShardKeeper(store, store.arenas, fs, rank, self.clique, lambda: 0.0)
        return _Member(rank, keeper, random.Random(rank).randbytes(self.shard_bytes - 997 * rank))

    def _protect(self, member: _Member, topology: Topology, wire: Wire, *, void: bool) -> None:
        keeper = member.keeper
        arena = keeper.take_arena(len(member.shard), 2, 1.0)
        arena.mapped.view[:] = member.shard
        digest = digest_of(member.shard)
        if not void:
            keeper.commit(_SAVE, member.rank, arena, digest, role="primary", split=False)
        pace = Pace(None, time.monotonic, time.sleep)
        exchange = REDUNDANCIES[self.scheme](ThreadLinks(wire, member.rank), member.rank, topology, pace, keeper, None)
        offer = Offer(_SAVE, None if void else arena, lambda: None if void else digest)
        member.problems = exchange.protect(offer, lambda kept: not keeper.holds(_SAVE, kept), split=False)
        keeper.unpin(arena)

    def _recovered(self, members: Sequence[_Member], lost: Sequence[int]) -> dict[int, str]:
        """By owner, the digest of what a restart would load if the nodes of `lost` came back empty; {}: nothing."""
        nodes = [member.node for member in members]
        inventories = [Inventory(member.node) if member.rank in lost else member.inventory() for member in members]
        policy = ElectionPolicy()
        decision = elect(inventories, run_id=_RUN, world_size=len(nodes), strikes=frozenset(), policy=policy)
        plan = plan_retrieval(decision, inventories, nodes=nodes)
        by_node = {member.node: member for member in members}

        def path(node: str, owner: int) -> Path:
            return by_node[node].keeper.store.shard_path(_SAVE, owner, len(nodes))

        found = {copy.owner: digest_of(path(copy.node, copy.owner).read_bytes()) for copy in plan.local}
        found |= {fetch.owner: digest_of(path(fetch.from_node, fetch.owner).read_bytes()) for fetch in plan.fetches}
        return found | {rebuild.owner: self._rebuilt(rebuild, by_node) for rebuild in plan.rebuilds}

    def _rebuilt(self, rebuild: Rebuild, by_node: dict[str, _Member]) -> str:
        files = [
            by_node[source.node].keeper.store.shard_path(_SAVE, source.kept, self.clique).read_bytes()
            for source in rebuild.sources
        ]
        return rebuilt_digest(rebuild, lambda number, start, stop: memoryview(files[number])[start:stop])
