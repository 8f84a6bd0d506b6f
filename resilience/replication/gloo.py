"""Talking over gloo, in groups of our own: agreements, the control exchange, and the way to open links.

The groups are `ProcessGroupGloo` objects on a prefixed store, outside torch's registry: `new_group` with local
synchronisation derives names from how many groups a process is in, and hangs when members differ in that. Their own
timeout is not used (a timeout closes every pair of a group for good); a `Vigil` bounds the waits. No group is wider
than `fan_in.WIDEST`: agreements among more ranks go through a tree of groups.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from resilience.errors import PeerLostError
from resilience.planning.fan_in import WIDEST, fan_in
from resilience.replication.authenticated import OPEN, Session
from resilience.replication.background_control import BackgroundControl
from resilience.replication.communicator import Agreements, Control, Links, SoloAgreements, SoloControl
from resilience.replication.links import GlooLinks
from resilience.replication.liveness import Liveness, Vigil
from resilience.replication.tree import Stage, Tree

__all__ = ["UNBOUNDED", "TorchCommunicator", "connect"]

UNBOUNDED = timedelta(days=30)
_NEVER_TAG = 10
_CLOSE_S = 2.0

Group = Any  # a ProcessGroupGloo: torch's type stubs do not know its methods
_builds = 0  # communicators made in this process: equal on all ranks, so it names their keys


class TorchCommunicator:
    """This process in its torch.distributed world. Made by every rank, in the same order."""

    def __init__(self, timeout_s: float, widest: int = WIDEST) -> None:
        """`widest`: members of one group at most."""
        self._session: Session = OPEN
        global _builds
        _builds += 1
        if not dist.is_initialized():
            raise RuntimeError("torch.distributed is not initialised")
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._timeout_s = timeout_s
        self._widest = widest
        base = dist.distributed_c10d._get_default_store()
        store: Any = PrefixStore(f"resilience/{_builds}", base)
        # A client of the store is a connection of this rank to its host (and a name lookup there), so there are few:
        # one for the groups that the training thread opens, one for links, whose lane may wait long for its peers.
        self._store = store.clone()
        self._links_store: Any = None
        self._lingering: list[GlooLinks] = []  # closed or not; those without a thread are forgotten at the next opening
        self._liveness = Liveness(store, self.rank, timeout_s)

    def authenticate(self, session: Session) -> None:
        self._session = session

    def agreements(self, name: str, ranks: Sequence[int] | None = None) -> Agreements:
        members = tuple(range(self.world_size)) if ranks is None else tuple(ranks)
        if len(members) == 1:
            return SoloAgreements()
        levels = fan_in(members, widest=self._widest)
        if len(levels) == 1:
            return self._flat(name, members)
        return self._tree(name, members, levels)

    def control(self, name: str, nodes: Sequence[str]) -> Control:
        if self.world_size == 1:
            return SoloControl()
        members = tuple(range(self.world_size))
        levels = fan_in(members, nodes, self._widest)
        several = len(levels) > 1
        return BackgroundControl(self._tree(name, members, levels) if several else self._flat(name, members))

    def links(self, name: str, ranks: Sequence[int], wanted: Callable[[], bool] = lambda: True) -> Links:
        members = tuple(ranks)
        self._links_store = self._links_store or self._store.clone()
        group = self._group(self._links_store, name, members, wanted)
        links = GlooLinks(group, members, self.rank, self._liveness)
        self._lingering = [each for each in self._lingering if each.lingers]
        self._lingering.append(links)
        return self._session.links(links, name, self.rank)

    def close(self) -> None:
        """Local. Peers that have not closed their ends of closed links yet are waited for a little."""
        deadline = time.monotonic() + _CLOSE_S
        for links in self._lingering:
            links.join(deadline - time.monotonic())
        self._liveness.close()

    def _flat(self, name: str, members: tuple[int, ...]) -> Agreements:
        group = _GlooAgreements(self._group(self._store, name, members), members, self._liveness, name)
        return self._session.agreements(group, name)

    def _tree(self, name: str, members: tuple[int, ...], levels: list[list[tuple[int, ...]]]) -> Tree:
        """Open this rank's groups, lowest first: a leader's next one comes together when all below it have."""
        stages = [
            Stage(self._flat(f"{name}/{height}/{group[0]}", group), group[0] == self.rank, level is levels[-1])
            for height, level in enumerate(levels)
            for group in level
            if self.rank in group
        ]
        return Tree(name, members.index(self.rank), len(members), stages)

    def _group(
        self, store: Store, name: str, members: tuple[int, ...], wanted: Callable[[], bool] = lambda: True
    ) -> Group:
        self._meet(PrefixStore(f"{name}/here", store), name, members, wanted)
        return connect(store, name, members.index(self.rank), len(members), self._timeout_s)

    def _meet(self, here: Store, name: str, members: tuple[int, ...], wanted: Callable[[], bool]) -> None:
        """Until every member is here: gloo's own bound does not know who lives, and does not say who is missing."""
        missing = [rank for rank in members if rank != self.rank]
        pause_s = 0.001
        try:
            here.set(str(self.rank), "1")
            with Vigil(self._liveness, missing, "it has to wait", time.monotonic, stalls=True) as vigil:
                while missing := [rank for rank in missing if not here.check([str(rank)])]:
                    if not wanted():
                        raise PeerLostError(f"rank {missing[0]} is late, and they are not wanted any more")
                    time.sleep(pause_s)
                    pause_s = min(pause_s * 1.5, 0.05)
                    vigil.check()
        except (PeerLostError, RuntimeError, OSError) as error:
            rank = error.rank if isinstance(error, PeerLostError) and error.rank is not None else None
            late = f"the group {name} of ranks {list(members)} did not come together, {missing[:8]} not being there"
            raise PeerLostError(f"{late}: {error}", rank=missing[0] if rank is None and missing else rank) from error


def connect(store: Store, name: str, rank: int, size: int, timeout_s: float) -> Group:
    """A gloo group under the prefix `name`; PeerLostError if not all members come within `timeout_s`."""
    try:
        group = dist.ProcessGroupGloo(PrefixStore(name, store), rank, size, timedelta(seconds=timeout_s))
    except (RuntimeError, OSError) as error:
        raise PeerLostError(f"the group {name} of {size} did not come together: {error}") from error
    group._set_default_timeout(UNBOUNDED)
    return group


class _GlooGroup:
    """A group and the way to wait on it."""

    def __init__(self, group: Group, members: tuple[int, ...], liveness: Liveness, name: str) -> None:
        self._group: Group | None = group
        self._members = members
        self._liveness = liveness
        self._name = name
        self._works: list[Any] = []  # under way, as far as this rank knows
        self.rank = group.rank()
        self.size = len(members)

    def _live(self) -> Group:
        if self._group is None:
            raise PeerLostError(f"the group {self._name} is closed")
        return self._group

    def _finish(self, work: Any) -> None:
        """Wait for `work` by looking: a blocking wait could not be bounded without closing the group."""
        self._works = [*(each for each in self._works if each is not work and not each.is_completed()), work]
        if not work.is_completed():
            pause_s = 0.0001
            with Vigil(self._liveness, self._members, self._name, time.monotonic) as vigil:
                while not work.is_completed():
                    time.sleep(pause_s)
                    pause_s = min(pause_s * 1.1, 0.005)  # notices the end within a tenth of the wait
                    group = self._live()
                    try:
                        vigil.check()
                    except PeerLostError:
                        self._break_off(group)  # of no use any more; and the other members need not wait as long
                        raise
        try:
            work.wait(UNBOUNDED)
        except RuntimeError as error:
            raise PeerLostError(f"{self._name}: a peer is gone: {error}") from error

    def close(self) -> None:
        """Local. What the peers have not come to yet is waited for a little, then broken off."""
        group, self._group = self._group, None
        if group is None:
            return
        deadline = time.monotonic() + _CLOSE_S
        while (pending := not all(work.is_completed() for work in self._works)) and time.monotonic() < deadline:
            time.sleep(0.005)
        if pending:
            self._break_off(group)
        group.abort()

    def _break_off(self, group: Group) -> None:
        """End what is under way: a group's last reference waits for that, for ever if a peer stands still.

        Aborting does not do it; a wait that times out closes all connections, and does.
        """
        for peer in range(self.size):
            if peer != self.rank:
                try:
                    group.recv([torch.zeros(1)], peer, _NEVER_TAG).wait(timedelta(milliseconds=1))
                except RuntimeError:
                    continue


class _GlooAgreements(_GlooGroup):
    def gather(self, payload: bytes) -> list[bytes]:
        sizes = self._sizes(payload)
        if not any(sizes):
            return [b""] * self.size
        padded, received = _padded(payload, max(sizes)), self._blank(max(sizes))
        self._finish(self._live().allgather([received], [padded]))
        return _cut(received, sizes)

    def collect(self, payload: bytes) -> list[bytes]:
        sizes = self._sizes(payload)
        if not any(sizes):
            return [b""] * self.size if self.rank == 0 else []
        options = dist.GatherOptions()
        options.rootRank = 0
        received = self._blank(max(sizes)) if self.rank == 0 else []
        padded = _padded(payload, max(sizes))
        self._finish(self._live().gather([received] if received else [], [padded], options))
        return _cut(received, sizes) if received else []

    def _sizes(self, payload: bytes) -> list[int]:
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in self._members]
        self._finish(self._live().allgather([lengths], [torch.tensor([len(payload)])]))
        return [int(length.item()) for length in lengths]

    def _blank(self, nbytes: int) -> list[torch.Tensor]:
        return [torch.empty(nbytes, dtype=torch.uint8) for _ in self._members]

    def broadcast(self, payload: bytes | None) -> bytes:
        length = torch.tensor([len(payload) if self.rank == 0 and payload is not None else 0])
        self._finish(self._live().broadcast(length, 0))
        nbytes = int(length.item())
        if nbytes == 0:
            return b""
        own = bytearray(payload if self.rank == 0 and payload is not None else nbytes)
        content = torch.frombuffer(own, dtype=torch.uint8)
        self._finish(self._live().broadcast(content, 0))
        return bytes(own)

    def maximum(self, values: Sequence[int]) -> list[int]:
        tensor = torch.tensor(list(values), dtype=torch.int64)
        self._finish(_reduce_maximum(self._live(), tensor))
        return [int(value) for value in tensor.tolist()]

    def barrier(self) -> None:
        self.maximum([0])


def _padded(payload: bytes, nbytes: int) -> torch.Tensor:
    return torch.frombuffer(bytearray(payload.ljust(nbytes, b"\0")), dtype=torch.uint8)


def _cut(received: Sequence[torch.Tensor], sizes: Sequence[int]) -> list[bytes]:
    return [tensor.numpy().tobytes()[:size] for tensor, size in zip(received, sizes, strict=True)]


def _reduce_maximum(group: Group, tensor: torch.Tensor) -> Any:
    options: Any = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.MAX
    options.timeout = UNBOUNDED
    try:
        return group.allreduce([tensor], options)
    except RuntimeError as error:
        raise PeerLostError(f"a peer is gone: {error}") from error
