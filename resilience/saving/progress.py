"""Does the background work of this rank move? One mark that changes with whatever moves, and how long it has not.

What moves: tasks of the lanes, reports on saves, bytes that reach a disk, messages of the exchange. Whoever waits for
saves goes on waiting while the mark of any rank changes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

from resilience.replication.communicator import Links, Transfer

__all__ = ["CountedLinks", "Stillness"]


class Stillness:
    """For how long a mark has been the same, from the first look on."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._mark: Hashable = None
        self._since = now()

    def seconds(self, mark: Hashable) -> float:
        if mark != self._mark:
            self._mark, self._since = mark, self._now()
        return self._now() - self._since


class CountedLinks:
    """`Links` that tell how many transfers are over."""

    def __init__(self, links: Links, count: Callable[[], None]) -> None:
        """`count` is called after each."""
        self._links = links
        self._count = count

    def send(self, content: torch.Tensor, peer: int, tag: int) -> Transfer:
        return self._links.send(content, peer, tag)

    def receive(self, content: torch.Tensor, peer: int, tag: int) -> Transfer:
        return self._links.receive(content, peer, tag)

    def wait(self, transfer: Transfer) -> None:
        self._links.wait(transfer)
        self._count()

    def close(self, *, failed: bool = False, linger_s: float = 10.0) -> None:
        self._links.close(failed=failed, linger_s=linger_s)
