"""The simulated network: who reaches whom, what takes how long, and the groups of ranks that talk over it.

Who is waited for and for how long is decided by the real `Vigil`, over simulated heartbeats, so that the bounds are
those of a real job. A process that ends closes its connections, which its peers notice soon; a node that loses power is
silent. A group of which one connection broke is of no use any more, for any of its members.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch

from resilience.drill.simulator.schedule import Process, Scheduler, Task
from resilience.errors import PeerLostError
from resilience.replication.liveness import Vigil

__all__ = ["Group", "Hearts", "Network", "Round", "SimTransfer", "World"]

_RESET_S: Final = 0.04  # after the end of a process its peers' sockets fail
_LEFT_S: Final = 1.0  # what a peer sent before it left in peace has arrived by then
_LOOK_S: Final = 1.0


class Network:
    """How long what takes from one node to another now, and who cannot reach whom."""

    def __init__(self, scheduler: Scheduler, latency_s: float) -> None:
        self.scheduler = scheduler
        self.latency_s = latency_s
        self.slow: dict[str, float] = {}  # by node: seconds more for whatever comes or goes
        self.cut: set[str] = set()  # these nodes reach each other and nobody else
        self.flips = 0  # of so many of the next large messages one bit arrives altered
        self.on_flip: Callable[[], None] = lambda: None
        self.silent: set[str] = set()  # nodes without power
        self._on_mend: list[Callable[[], None]] = []

    def reaches(self, one: str, other: str) -> bool:
        return one == other or ((one in self.cut) == (other in self.cut) and not {one, other} & self.silent)

    def delay_s(self, one: str, other: str) -> float:
        chance = self.scheduler.random
        spike = 50.0 if chance.random() < 0.02 else 1.0
        return self.latency_s * (0.5 + chance.random()) * spike + self.slow.get(one, 0.0) + self.slow.get(other, 0.0)

    def carry(self, one: str, other: str, arrive: Callable[[], None]) -> None:
        """Call `arrive` after the delay; if the way is cut, once it is mended."""
        delay_s = self.delay_s(one, other)
        self.scheduler.at(self.scheduler.now + delay_s, lambda: self._deliver(one, other, arrive))

    def farewell(self, node: str) -> float:
        """By when all that was sent from there has arrived."""
        return self.scheduler.now + 80 * self.latency_s + 2 * sum(self.slow.values())

    def mend(self) -> None:
        self.cut = set()
        waiting, self._on_mend = self._on_mend, []
        for deliver in waiting:
            deliver()

    def _deliver(self, one: str, other: str, arrive: Callable[[], None]) -> None:
        if self.reaches(one, other):
            arrive()
        elif not {one, other} & self.silent:
            self._on_mend.append(lambda: self._deliver(one, other, arrive))


@dataclass(eq=False)
class Member:
    """One rank of a job: its process and its node."""

    rank: int
    node: str
    process: Process
    gone_at: float | None = None


class World:
    """The ranks of one start, and the groups that they open. The job's store is on the first rank's node."""

    def __init__(self, network: Network, nodes: Sequence[str], timeout_s: float) -> None:
        self.network = network
        self.scheduler = network.scheduler
        self.nodes = tuple(nodes)
        self.timeout_s = timeout_s
        self.members: dict[int, Member] = {}
        self._groups: dict[tuple[str, tuple[int, ...]], Group] = {}

    def join(self, rank: int, process: Process) -> None:
        self.members[rank] = Member(rank, self.nodes[rank], process)

    def gone(self, rank: int) -> None:
        """Its process ended, however: whoever is connected to it notices, unless its node fell silent."""
        member = self.members[rank]
        if member.gone_at is None:
            member.gone_at = self.scheduler.now
            self.scheduler.at(self.scheduler.now + _RESET_S, self._wake_all)

    def group(self, name: str, members: tuple[int, ...]) -> Group:
        return self._groups.setdefault((name, members), Group(self, name, members))

    def disconnect(self, rank: int, chance: random.Random) -> None:
        """One connection of the rank breaks: of those for bulk bytes, as a rule."""
        mine = [group for group in self._groups.values() if rank in group.here and len(group.members) > 1]
        links = [group for group in mine if group.boxes and not group.broken]
        found = links if links and chance.random() < 0.8 else mine
        if found:
            chance.choice(found).break_off(f"the connection to rank {rank} broke", rank)

    def reset_by(self, rank: int, seen_from: int) -> bool:
        """Whether the connection to `rank` broke because its process is no more."""
        peer, here = self.members.get(rank), self.nodes[seen_from]
        if peer is None or peer.gone_at is None or self.scheduler.now < peer.gone_at + _RESET_S:
            return False
        return self.network.reaches(here, peer.node)

    def beats(self, rank: int, seen_from: int) -> bool:
        """Whether the heartbeats of `rank` reach the store, and from there `seen_from`."""
        peer, host, here = self.members.get(rank), self.nodes[0], self.nodes[seen_from]
        alive = peer is not None and peer.gone_at is None
        return alive and self.network.reaches(self.nodes[rank], host) and self.network.reaches(host, here)

    def store_answers(self, seen_from: int) -> bool:
        return self.nodes[0] not in self.network.silent or self.nodes[0] == self.nodes[seen_from]

    def _wake_all(self) -> None:
        for group in self._groups.values():
            group.wake()


@dataclass(eq=False)
class Round:
    """One collective of a group: what each member gave, and what has arrived where."""

    kind: str
    given: dict[int, Any] = field(default_factory=dict)
    arrived: dict[int, dict[int, Any]] = field(default_factory=dict)  # by receiver, then sender


@dataclass(eq=False)
class SimTransfer:
    """A send or a receive of one rank."""

    peer: int
    content: torch.Tensor
    done: bool = False


@dataclass(eq=False)
class Box:
    """Messages of one sender, receiver and tag, in order."""

    sends: deque[SimTransfer] = field(default_factory=deque)
    receives: deque[SimTransfer] = field(default_factory=deque)
    free_at: float = 0.0


class Hearts:
    """`Heartbeats` of a world, as one rank sees them."""

    def __init__(self, world: World, rank: int) -> None:
        self.timeout_s = world.timeout_s
        self._world = world
        self._rank = rank
        self._watched: set[int] = set()
        self._latest: dict[int, bytes] = {}

    def watch(self, ranks: Iterable[int]) -> None:
        self._watched |= set(ranks)

    def forget(self, ranks: Iterable[int]) -> None:
        self._watched -= set(ranks)

    def latest(self) -> Mapping[int, bytes]:
        if not self._world.store_answers(self._rank):
            raise PeerLostError("the job's store does not answer")
        for rank in sorted(self._watched):
            if self._world.beats(rank, self._rank):
                self._latest[rank] = str(self._world.scheduler.now).encode()
        return self._latest


class Group:
    """Some ranks of a world that talk with each other under one name."""

    def __init__(self, world: World, name: str, members: tuple[int, ...]) -> None:
        self.world = world
        self.name = name
        self.members = members
        self.here: set[int] = set()
        self.left: dict[int, float] = {}  # who closed it in peace, and by when all that it sent has arrived
        self.broken = ""
        self.lost: int | None = None
        self.rounds: list[Round] = []
        self.boxes: dict[tuple[int, int, int], Box] = {}
        self._waiting: dict[int, list[Task]] = {}

    def wake(self, rank: int | None = None) -> None:
        """Have a rank (None: all) look again at what it waits for."""
        for each in list(self._waiting) if rank is None else [rank]:
            for task in self._waiting.pop(each, ()):
                self.world.scheduler.wake(task)

    def break_off(self, why: str, rank: int | None) -> None:
        """No connection of this group carries anything any more."""
        if not self.broken:
            self.broken, self.lost = why, rank
            self.world.scheduler.at(self.world.scheduler.now + _RESET_S, self.wake)

    def wait(
        self,
        me: int,
        until: Callable[[], bool],
        needed: Callable[[], Sequence[int]],
        among: Sequence[int],
        hearts: Hearts,
        what: str,
        *,
        stalls: bool = False,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """Until `until`; PeerLostError once those still `needed` are gone, or some of those `among` which they are from

        the beginning fall silent, or (`stalls`) do not move.
        """
        scheduler, look_s = self.world.scheduler, min(_LOOK_S, hearts.timeout_s / 8)
        with Vigil(hearts, [rank for rank in among if rank != me], what, lambda: scheduler.now, stalls=stalls) as vigil:
            while not until():
                if self.broken:
                    raise PeerLostError(f"{what}: {self.broken}", rank=self.lost)
                if not wanted():
                    raise PeerLostError(f"{what}: they are not wanted any more")
                try:
                    self._look(me, needed(), what)
                    vigil.check()
                except PeerLostError as error:
                    self.break_off(str(error), error.rank)
                    raise
                waiting = self._waiting.setdefault(me, [])
                if scheduler.current not in waiting:
                    waiting.append(scheduler.current)
                scheduler.block(scheduler.now + look_s)

    def _look(self, me: int, needed: Sequence[int], what: str) -> None:
        for rank in needed:
            if rank != me and self.world.reset_by(rank, me):
                raise PeerLostError(f"{what}: rank {rank} is gone", rank=rank)
            if rank != me and rank in self.left and self.world.scheduler.now > self.left[rank] + _LEFT_S:
                raise PeerLostError(f"{what}: rank {rank} has left", rank=rank)
