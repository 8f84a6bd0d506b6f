"""Links between threads of one process, for contract tests: what is sent is there as soon as it is waited for."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from dataclasses import dataclass, field

import torch

from resilience.errors import PeerLostError

__all__ = ["ThreadLinks", "Wire"]

_BOUND_S = 60.0


@dataclass
class Wire:
    """All that is under way in one clique: a queue per sender, receiver and tag."""

    boxes: dict[tuple[int, int, int], queue.Queue[torch.Tensor]] = field(
        default_factory=lambda: defaultdict(queue.Queue)
    )
    guard: threading.Lock = field(default_factory=threading.Lock)

    def box(self, sender: int, receiver: int, tag: int) -> queue.Queue[torch.Tensor]:
        with self.guard:
            return self.boxes[sender, receiver, tag]


@dataclass(frozen=True)
class _Receive:
    content: torch.Tensor
    peer: int
    box: queue.Queue[torch.Tensor]


class ThreadLinks:
    """One rank's end of a wire; see `replication.communicator.Links`."""

    def __init__(self, wire: Wire, rank: int) -> None:
        self._wire = wire
        self._rank = rank

    def send(self, content: torch.Tensor, peer: int, tag: int) -> object:
        self._wire.box(self._rank, peer, tag).put(content.clone())
        return None

    def receive(self, content: torch.Tensor, peer: int, tag: int) -> object:
        return _Receive(content, peer, self._wire.box(peer, self._rank, tag))

    def wait(self, transfer: object) -> None:
        if not isinstance(transfer, _Receive):
            return
        try:
            transfer.content.copy_(transfer.box.get(timeout=_BOUND_S))
        except queue.Empty as error:
            raise PeerLostError(f"nothing came for {_BOUND_S:g} s", rank=transfer.peer) from error

    def close(self, *, failed: bool = False, linger_s: float = 10.0) -> None:
        return
