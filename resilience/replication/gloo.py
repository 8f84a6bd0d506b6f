"""Talking over gloo, in groups of our own: agreements, the control exchange, and the way to open links.

The groups are `ProcessGroupGloo` objects on a prefixed store, outside torch's registry: `new_group` with local
synchronisation derives names from how many groups a process is in, and hangs when members differ in that. Their own
timeout is not used (a timeout closes every pair of a group for good); `Patience` bounds the waits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from resilience.errors import PeerLostError
from resilience.replication.communicator import Agreements, Control, Links, SoloAgreements, SoloControl
from resilience.replication.links import GlooLinks
from resilience.replication.liveness import Liveness, Patience

__all__ = ["UNBOUNDED", "TorchCommunicator", "connect"]

UNBOUNDED = timedelta(days=30)

Group = Any  # a ProcessGroupGloo: torch's type stubs do not know its methods
_builds = 0  # communicators made in this process: equal on all ranks, so it names their keys


class TorchCommunicator:
    """This process in its torch.distributed world. Made by every rank, in the same order."""

    def __init__(self, timeout_s: float) -> None:
        global _builds
        _builds += 1
        if not dist.is_initialized():
            raise RuntimeError("torch.distributed is not initialised")
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        self._timeout_s = timeout_s
        base = dist.distributed_c10d._get_default_store()
        store: Any = PrefixStore(f"resilience/{_builds}", base)
        # A client of the store is a connection of this rank to its host (and a name lookup there), so there are few:
        # one for the groups that the training thread opens, one for links, whose lane may wait long for its peers.
        self._store = store.clone()
        self._links_store: Any = None
        self._liveness = Liveness(store, self.rank, timeout_s)

    def agreements(self, name: str, ranks: Sequence[int] | None = None) -> Agreements:
        members = tuple(range(self.world_size)) if ranks is None else tuple(ranks)
        if len(members) == 1:
            return SoloAgreements()
        return _GlooAgreements(self._group(self._store, name, members), members, self._liveness, name)

    def control(self, name: str) -> Control:
        if self.world_size == 1:
            return SoloControl()
        members = tuple(range(self.world_size))
        return _GlooControl(self._group(self._store, name, members), members, self._liveness)

    def links(self, name: str, ranks: Sequence[int]) -> Links:
        members = tuple(ranks)
        self._links_store = self._links_store or self._store.clone()
        return GlooLinks(self._group(self._links_store, name, members), members, self.rank, self._timeout_s)

    def close(self) -> None:
        self._liveness.close()

    def _group(self, store: Store, name: str, members: tuple[int, ...]) -> Group:
        return connect(store, name, members.index(self.rank), len(members), self._timeout_s)


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
        self.rank = group.rank()
        self.size = len(members)

    def _live(self) -> Group:
        if self._group is None:
            raise PeerLostError(f"the group {self._name} is closed")
        return self._group

    def _finish(self, work: Any) -> None:
        """Wait for `work` by looking: a blocking wait could not be bounded without closing the group."""
        if not work.is_completed():
            patience = Patience(self._liveness, self._members, self._name, time.monotonic)
            pause_s = 0.0001
            while not work.is_completed():
                time.sleep(pause_s)
                pause_s = min(pause_s * 1.1, 0.005)  # notices the end within a tenth of the wait
                self._live()
                patience.check()
        try:
            work.wait(UNBOUNDED)
        except RuntimeError as error:
            raise PeerLostError(f"{self._name}: a peer is gone: {error}") from error

    def close(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            group.abort()


class _GlooAgreements(_GlooGroup):
    def gather(self, payload: bytes) -> list[bytes]:
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in self._members]
        self._finish(self._live().allgather([lengths], [torch.tensor([len(payload)])]))
        sizes = [int(length.item()) for length in lengths]
        longest = max(sizes)
        if longest == 0:
            return [b""] * self.size
        padded = torch.frombuffer(bytearray(payload.ljust(longest, b"\0")), dtype=torch.uint8)
        received = [torch.empty(longest, dtype=torch.uint8) for _ in self._members]
        self._finish(self._live().allgather([received], [padded]))
        return [tensor.numpy().tobytes()[:size] for tensor, size in zip(received, sizes, strict=True)]

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


class _GlooControl(_GlooGroup):
    def __init__(self, group: Group, members: tuple[int, ...], liveness: Liveness) -> None:
        super().__init__(group, members, liveness, "control exchange")
        self._tensor = torch.zeros(0, dtype=torch.int64)
        self._work: Any = None

    def start(self, values: Sequence[int]) -> None:
        self._tensor = torch.tensor(values, dtype=torch.int64)
        self._work = _reduce_maximum(self._live(), self._tensor)

    def result(self) -> list[int]:
        if self._work is not None:
            self._finish(self._work)
            self._work = None
        return [int(value) for value in self._tensor.tolist()]


def _reduce_maximum(group: Group, tensor: torch.Tensor) -> Any:
    options: Any = dist.AllreduceOptions()
    options.reduceOp = dist.ReduceOp.MAX
    options.timeout = UNBOUNDED
    try:
        return group.allreduce([tensor], options)
    except RuntimeError as error:
        raise PeerLostError(f"a peer is gone: {error}") from error
