"""Links between threads of one process that can lose, hold back and alter what they carry; and an inbox that counts."""

from __future__ import annotations

import queue
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from resilience.errors import PeerLostError, StoreError
from resilience.snapshot.arena import Arena
from resilience.stores.filesystem import PosixFileSystem

FS = PosixFileSystem()
SEND_TAGS = {"opening": 1, "segment": 2, "closing": 3, "asking": 4}
RANGES_TAG = 5


@dataclass
class Wire:
    """All mailboxes of a world. `alter(sender, receiver, tag, content)` may change what is carried, or drop it."""

    timeout_s: float = 60.0
    alter: Callable[[int, int, int, torch.Tensor], torch.Tensor | None] = lambda *carried: carried[3]
    boxes: dict[tuple[int, int, int], queue.Queue[torch.Tensor]] = field(default_factory=dict)
    hung_up: set[int] = field(default_factory=set)  # nothing more comes from these

    def box(self, sender: int, receiver: int, tag: int) -> queue.Queue[torch.Tensor]:
        return self.boxes.setdefault((sender, receiver, tag), queue.Queue())


@dataclass
class _Receive:
    content: torch.Tensor
    peer: int
    box: queue.Queue[torch.Tensor]


class FakeLinks:
    """One rank's end of the wire."""

    def __init__(self, wire: Wire, rank: int) -> None:
        self._wire = wire
        self._rank = rank
        self.closed: str | None = None

    def send(self, content: torch.Tensor, peer: int, tag: int) -> object:
        carried = self._wire.alter(self._rank, peer, tag, content.clone())
        if carried is not None:
            self._wire.box(self._rank, peer, tag).put(carried)
        return None

    def receive(self, content: torch.Tensor, peer: int, tag: int) -> object:
        return _Receive(content, peer, self._wire.box(peer, self._rank, tag))

    def wait(self, transfer: object) -> None:
        if isinstance(transfer, _Receive):
            transfer.content.copy_(self._arrived(transfer))

    def _arrived(self, transfer: _Receive) -> torch.Tensor:
        until = time.monotonic() + self._wire.timeout_s
        while True:
            over = transfer.peer in self._wire.hung_up or time.monotonic() >= until
            try:
                return transfer.box.get(timeout=0.0 if over else 0.05)
            except queue.Empty as error:
                if over:
                    raise PeerLostError(f"nothing moved for {self._wire.timeout_s:g} s", rank=transfer.peer) from error

    def close(self, *, failed: bool = False, linger_s: float = 0.0) -> None:
        self.closed = "failed" if failed else "in peace"


class CountingInbox:
    """Gives out slots (or has no room for some owners), and knows what became of each."""

    def __init__(self, directory: Path, no_room_for: tuple[int, ...] = ()) -> None:
        self._directory = directory
        self._no_room_for = no_room_for
        self._count = 0
        self.discarded: list[tuple[int, bool]] = []

    def slot(self, owner: int, nbytes: int) -> Arena:
        if owner in self._no_room_for:
            raise StoreError("no space is left.")
        self._count += 1
        self._directory.mkdir(exist_ok=True)
        return Arena(FS.create_mapping(self._directory / f"slot{self._count}", nbytes))

    def discard(self, owner: int, slot: Arena, *, reusable: bool) -> None:
        self.discarded.append((owner, reusable))
