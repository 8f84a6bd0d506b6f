"""`Communicator` for a rank of a simulated job: collectives in rounds, and links that carry bulk bytes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from resilience.drill.simulator.network import Box, Group, Hearts, Round, SimTransfer, World
from resilience.drill.simulator.truth import ALIKE
from resilience.errors import PeerLostError
from resilience.replication.authenticated import OPEN, Session
from resilience.replication.communicator import Agreements, Control, Links, SoloAgreements, SoloControl, Transfer

__all__ = ["SimCommunicator"]


class SimCommunicator:
    """`Communicator` of one rank."""

    def __init__(self, world: World, rank: int, local_rank: int) -> None:
        self.rank = rank
        self.world_size = len(world.nodes)
        self.local_rank = local_rank
        self._world = world
        self._hearts = Hearts(world, rank)
        self._session: Session = OPEN

    def authenticate(self, session: Session) -> None:
        self._session = session

    def agreements(self, name: str, ranks: Sequence[int] | None = None) -> Agreements:
        members = tuple(range(self.world_size)) if ranks is None else tuple(ranks)
        if len(members) == 1:
            return SoloAgreements()
        return self._session.agreements(_SimAgreements(self._meet(name, members), self.rank, self._hearts), name)

    def control(self, name: str, nodes: Sequence[str]) -> Control:
        if self.world_size == 1:
            return SoloControl()
        return _SimControl(self._meet(name, tuple(range(self.world_size))), self.rank, self._hearts)

    def links(self, name: str, ranks: Sequence[int], wanted: Callable[[], bool] = lambda: True) -> Links:
        links = _SimLinks(self._meet(name, tuple(ranks), wanted), self.rank, self._hearts)
        return self._session.links(links, name, self.rank)

    def close(self) -> None:
        self._world.scheduler.point("close communicator")

    def _meet(self, name: str, members: tuple[int, ...], wanted: Callable[[], bool] = lambda: True) -> Group:
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

    def __init__(self, group: Group, rank: int, hearts: Hearts) -> None:
        self.rank = group.members.index(rank)
        self.size = len(group.members)
        self._group = group
        self._me = rank
        self._hearts = hearts
        self._count = 0
        self._closed = False

    def _give(self, kind: str, given: Any) -> Round:
        """Take part in the next round: what this member gives is on its way to the others."""
        group, world = self._group, self._group.world
        world.scheduler.point(f"{kind} {group.name}")
        if self._closed or group.broken:
            raise PeerLostError(f"{group.name}: {group.broken or 'closed'}", rank=group.lost)
        if len(group.rounds) == self._count:
            group.rounds.append(Round(kind))
        this = group.rounds[self._count]
        if this.kind != kind:
            what = f"rank {self._me} comes with {kind} where others came with {this.kind}, in the group {group.name}"
            world.scheduler.fail(ALIKE, what)
        self._count += 1
        this.given[self._me] = given
        for peer in group.members:
            self._carry(this, peer, given)
        return this

    def _carry(self, this: Round, peer: int, given: Any) -> None:
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

    def _hear(self, this: Round, senders: Sequence[int]) -> list[Any]:
        got = this.arrived.setdefault(self._me, {})
        self._group.wait(
            self._me, lambda: self._closed or all(rank in got for rank in senders),
            lambda: [rank for rank in senders if rank not in got and not self._is_coming(this, rank)],
            [rank for rank in senders if rank not in got], self._hearts, self._group.name,
        )  # fmt: skip
        if self._closed:
            raise PeerLostError(f"the group {self._group.name} is closed")
        return [got[rank] for rank in senders]

    def _is_coming(self, this: Round, rank: int) -> bool:
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

    def collect(self, payload: bytes) -> list[bytes]:
        this = self._give("collect", payload)
        return self._hear(this, self._group.members) if self.rank == 0 else []

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
                ALIKE,
                f"maximum over vectors of unequal lengths in {self._group.name}",
            )
        return [max(column) for column in zip(*columns, strict=True)]

    def barrier(self) -> None:
        self.maximum([0])


class _SimControl(_Talking):
    _under_way: Round | None = None
    _values: Sequence[int] = ()
    _read: Callable[[list[int]], Any] = list

    def start(self, say: Callable[[], Sequence[int]], hear: Callable[[list[int]], Any] = list) -> None:
        self._under_way, self._read = self._give("control", list(say())), hear

    def result(self) -> Any:
        if self._under_way is not None:
            columns = self._hear(self._under_way, self._group.members)
            if len({len(column) for column in columns}) != 1:
                self._group.world.scheduler.fail(ALIKE, "control vectors of unequal lengths")
            self._values = [max(column) for column in zip(*columns, strict=True)]
            self._under_way = None
        return self._read(list(self._values))


class _SimLinks:
    """`Links` of one rank: bytes are read from the sender's memory when they arrive, not when they were posted."""

    def __init__(self, group: Group, rank: int, hearts: Hearts) -> None:
        self._group = group
        self._me = rank
        self._hearts = hearts
        self._closed = False

    def send(self, content: torch.Tensor, peer: int, tag: int) -> Transfer:
        return self._post(content, peer, self._box(self._me, peer, tag), "send")

    def receive(self, content: torch.Tensor, peer: int, tag: int) -> Transfer:
        return self._post(content, peer, self._box(peer, self._me, tag), "receive")

    def wait(self, transfer: Transfer) -> None:
        assert isinstance(transfer, SimTransfer)
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

    def _box(self, sender: int, receiver: int, tag: int) -> Box:
        return self._group.boxes.setdefault((sender, receiver, tag), Box())

    def _post(self, content: torch.Tensor, peer: int, box: Box, what: str) -> SimTransfer:
        group = self._group
        group.world.scheduler.point(f"{what} {group.name}")
        if self._closed or group.broken:
            raise PeerLostError(f"link among ranks {list(group.members)}: {group.broken or 'closed'}", rank=group.lost)
        if peer in group.left:
            raise PeerLostError(f"link to rank {peer}: it has left", rank=peer)
        transfer = SimTransfer(peer, content)
        (box.sends if what == "send" else box.receives).append(transfer)
        sender = self._me if what == "send" else peer
        self._match(box, sender, peer if what == "send" else self._me)
        return transfer

    def _match(self, box: Box, sender: int, receiver: int) -> None:
        world = self._group.world
        while box.sends and box.receives:
            sent, received = box.sends.popleft(), box.receives.popleft()
            world.network.carry(
                world.nodes[sender],
                world.nodes[receiver],
                lambda sent=sent, received=received: self._arrive(sent, received, sender, receiver),  # type: ignore[misc]
            )

    def _arrive(self, sent: SimTransfer, received: SimTransfer, sender: int, receiver: int) -> None:
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
