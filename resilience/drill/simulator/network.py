"""`Communicator` for a simulated job: mailboxes with delay, loss of connection, partitions, dead and silent peers.

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
from resilience.replication.communicator import Agreements, Control, Links, SoloAgreements, SoloControl, Transfer
from resilience.replication.liveness import Vigil

__all__ = ["Network", "SimCommunicator", "World"]

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
        self._groups: dict[tuple[str, tuple[int, ...]], _Group] = {}

    def join(self, rank: int, process: Process) -> None:
        self.members[rank] = Member(rank, self.nodes[rank], process)

    def gone(self, rank: int) -> None:
        """Its process ended, however: whoever is connected to it notices, unless its node fell silent."""
        member = self.members[rank]
        if member.gone_at is None:
            member.gone_at = self.scheduler.now
            self.scheduler.at(self.scheduler.now + _RESET_S, self._wake_all)

    def group(self, name: str, members: tuple[int, ...]) -> _Group:
        return self._groups.setdefault((name, members), _Group(self, name, members))

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


class _Hearts:
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


class _Group:
    """Some ranks of a world that talk with each other under one name."""

    def __init__(self, world: World, name: str, members: tuple[int, ...]) -> None:
        self.world = world
        self.name = name
        self.members = members
        self.here: set[int] = set()
        self.left: dict[int, float] = {}  # who closed it in peace, and by when all that it sent has arrived
        self.broken = ""
        self.lost: int | None = None
        self.rounds: list[_Round] = []
        self.boxes: dict[tuple[int, int, int], _Box] = {}
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
        hearts: _Hearts,
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


@dataclass(eq=False)
class _Round:
    """One collective of a group: what each member gave, and what has arrived where."""

    kind: str
    given: dict[int, Any] = field(default_factory=dict)
    arrived: dict[int, dict[int, Any]] = field(default_factory=dict)  # by receiver, then sender


@dataclass(eq=False)
class _Transfer:
    """A send or a receive of one rank."""

    peer: int
    content: torch.Tensor
    done: bool = False


@dataclass(eq=False)
class _Box:
    """Messages of one sender, receiver and tag, in order."""

    sends: deque[_Transfer] = field(default_factory=deque)
    receives: deque[_Transfer] = field(default_factory=deque)
    free_at: float = 0.0


class SimCommunicator:
    """`Communicator` of one rank."""

    def __init__(self, world: World, rank: int, local_rank: int) -> None:
        self.rank = rank
        self.world_size = len(world.nodes)
        self.local_rank = local_rank
        self._world = world
        self._hearts = _Hearts(world, rank)

    def agreements(self, name: str, ranks: Sequence[int] | None = None) -> Agreements:
        members = tuple(range(self.world_size)) if ranks is None else tuple(ranks)
        return (
            SoloAgreements()
            if len(members) == 1
            else _SimAgreements(self._meet(name, members), self.rank, self._hearts)
        )

    def control(self, name: str, nodes: Sequence[str]) -> Control:
        if self.world_size == 1:
            return SoloControl()
        return _SimControl(self._meet(name, tuple(range(self.world_size))), self.rank, self._hearts)

    def links(self, name: str, ranks: Sequence[int], wanted: Callable[[], bool] = lambda: True) -> Links:
        return _SimLinks(self._meet(name, tuple(ranks), wanted), self.rank, self._hearts)

    def close(self) -> None:
        self._world.scheduler.point("close communicator")

    def _meet(self, name: str, members: tuple[int, ...], wanted: Callable[[], bool] = lambda: True) -> _Group:
        self._world.scheduler.point(f"meet {name}")
        group = self._world.group(name, members)
        group.here.add(self.rank)
        if len(group.here) == len(members):
            group.wake()
        group.wait(
            self.rank, lambda: group.here >= set(members),
            lambda: [each for each in members if each not in group.here],
            [each for each in members if each not in group.here], self._hearts,
            f"the group {name} of ranks {list(members)} did not come together", stalls=True, wanted=wanted,
        )  # fmt: skip
        return group


class _Talking:
    """Rounds of a group, in the same order on every member."""

    def __init__(self, group: _Group, rank: int, hearts: _Hearts) -> None:
        self.rank = group.members.index(rank)
        self.size = len(group.members)
        self._group = group
        self._me = rank
        self._hearts = hearts
        self._count = 0
        self._closed = False

    def _give(self, kind: str, given: Any) -> _Round:
        """Take part in the next round: what this member gives is on its way to the others."""
        group, world = self._group, self._group.world
        world.scheduler.point(f"{kind} {group.name}")
        if self._closed or group.broken:
            raise PeerLostError(f"{group.name}: {group.broken or 'closed'}", rank=group.lost)
        if len(group.rounds) == self._count:
            group.rounds.append(_Round(kind))
        this = group.rounds[self._count]
        if this.kind != kind:
            what = f"rank {self._me} comes with {kind} where others came with {this.kind}, in the group {group.name}"
            world.scheduler.fail("6 all ranks decide alike, nobody hangs", what)
        self._count += 1
        this.given[self._me] = given
        for peer in group.members:
            self._carry(this, peer, given)
        return this

    def _carry(self, this: _Round, peer: int, given: Any) -> None:
        def arrive() -> None:
            got = this.arrived.setdefault(peer, {})
            got[self._me] = given
            if this.kind == "broadcast" or len(got) == self.size:
                self._group.wake(peer)

        if peer == self._me:
            arrive()
        else:
            world = self._group.world
            world.network.carry(world.nodes[self._me], world.nodes[peer], arrive)

    def _hear(self, this: _Round, senders: Sequence[int]) -> list[Any]:
        got = this.arrived.setdefault(self._me, {})
        self._group.wait(
            self._me, lambda: self._closed or all(rank in got for rank in senders),
            lambda: [rank for rank in senders if rank not in got and not self._is_coming(this, rank)],
            [rank for rank in senders if rank not in got], self._hearts, self._group.name,
        )  # fmt: skip
        if self._closed:
            raise PeerLostError(f"the group {self._group.name} is closed")
        return [got[rank] for rank in senders]

    def _is_coming(self, this: _Round, rank: int) -> bool:
        """Whether what a member gave will arrive, even if it ends now."""
        world = self._group.world
        return rank in this.given and world.nodes[rank] not in world.network.silent

    def close(self) -> None:
        self._group.world.scheduler.point(f"close {self._group.name}")
        self._closed = True
        world = self._group.world
        self._group.left.setdefault(self._me, world.network.farewell(world.nodes[self._me]))
        self._group.wake()


class _SimAgreements(_Talking):
    def gather(self, payload: bytes) -> list[bytes]:
        return self._hear(self._give("gather", payload), self._group.members)

    def broadcast(self, payload: bytes | None) -> bytes:
        first = self._group.members[0]
        if self.rank == 0 and payload is None:
            raise ValueError("member 0 must give the payload")
        found = self._hear(self._give("broadcast", payload), (first,))[0]
        return bytes(found)

    def maximum(self, values: Sequence[int]) -> list[int]:
        columns = self._hear(self._give("maximum", list(values)), self._group.members)
        if len({len(column) for column in columns}) != 1:
            self._group.world.scheduler.fail(
                "6 all ranks decide alike, nobody hangs",
                f"maximum over vectors of unequal lengths in {self._group.name}",
            )
        return [max(column) for column in zip(*columns, strict=True)]

    def barrier(self) -> None:
        self.maximum([0])


class _SimControl(_Talking):
    _under_way: _Round | None = None
    _values: Sequence[int] = ()

    def start(self, values: Sequence[int]) -> None:
        self._under_way = self._give("control", list(values))

    def result(self) -> list[int]:
        if self._under_way is not None:
            columns = self._hear(self._under_way, self._group.members)
            if len({len(column) for column in columns}) != 1:
                self._group.world.scheduler.fail(
                    "6 all ranks decide alike, nobody hangs", "control vectors of unequal lengths"
                )
            self._values = [max(column) for column in zip(*columns, strict=True)]
            self._under_way = None
        return list(self._values)


class _SimLinks:
    """`Links` of one rank: bytes are read from the sender's memory when they arrive, not when they were posted."""

    def __init__(self, group: _Group, rank: int, hearts: _Hearts) -> None:
        self._group = group
        self._me = rank
        self._hearts = hearts
        self._closed = False

    def send(self, content: torch.Tensor, peer: int, tag: int) -> Transfer:
        return self._post(content, peer, self._box(self._me, peer, tag), "send")

    def receive(self, content: torch.Tensor, peer: int, tag: int) -> Transfer:
        return self._post(content, peer, self._box(peer, self._me, tag), "receive")

    def wait(self, transfer: Transfer) -> None:
        assert isinstance(transfer, _Transfer)
        group, peer = self._group, transfer.peer
        group.world.scheduler.point(f"wait {group.name}")
        what = f"link among ranks {list(group.members)}"
        group.wait(
            self._me, lambda: transfer.done or self._closed, lambda: [peer], [peer], self._hearts, what, stalls=True
        )
        if not transfer.done:
            raise PeerLostError(f"{what}: closed")

    def close(self, *, failed: bool = False, linger_s: float = 10.0) -> None:
        group = self._group
        group.world.scheduler.point(f"close {group.name}")
        if self._closed:
            return
        self._closed = True
        group.left.setdefault(self._me, group.world.network.farewell(group.world.nodes[self._me]))
        if failed:
            group.break_off(f"rank {self._me} is gone", self._me)
        group.wake()

    def _box(self, sender: int, receiver: int, tag: int) -> _Box:
        return self._group.boxes.setdefault((sender, receiver, tag), _Box())

    def _post(self, content: torch.Tensor, peer: int, box: _Box, what: str) -> _Transfer:
        group = self._group
        group.world.scheduler.point(f"{what} {group.name}")
        if self._closed or group.broken:
            raise PeerLostError(f"link among ranks {list(group.members)}: {group.broken or 'closed'}", rank=group.lost)
        if peer in group.left:
            raise PeerLostError(f"link to rank {peer}: it has left", rank=peer)
        transfer = _Transfer(peer, content)
        (box.sends if what == "send" else box.receives).append(transfer)
        sender = self._me if what == "send" else peer
        self._match(box, sender, peer if what == "send" else self._me)
        return transfer

    def _match(self, box: _Box, sender: int, receiver: int) -> None:
        world = self._group.world
        while box.sends and box.receives:
            sent, received = box.sends.popleft(), box.receives.popleft()
            world.network.carry(
                world.nodes[sender],
                world.nodes[receiver],
                lambda sent=sent, received=received: self._arrive(sent, received, sender, receiver),  # type: ignore[misc]
            )

    def _arrive(self, sent: _Transfer, received: _Transfer, sender: int, receiver: int) -> None:
        group = self._group
        members = group.world.members
        if group.broken or any(members[rank].gone_at is not None for rank in (sender, receiver)):
            return
        if sent.content.nbytes != received.content.nbytes:
            raise AssertionError("a message of another size than the receive that was posted for it")
        received.content.copy_(sent.content)
        network = group.world.network
        if network.flips and received.content.nbytes > 256:
            network.flips -= 1
            place = network.scheduler.random.randrange(received.content.nbytes)
            received.content.view(torch.uint8)[place] ^= 1
            network.on_flip()
        sent.done = received.done = True
        group.wake(sender)
        group.wake(receiver)
