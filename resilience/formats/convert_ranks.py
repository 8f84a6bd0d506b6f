"""One process that saves as many ranks did: each of them in turn runs to its next exchange.

A format's `save` is written for ranks that run at once. Here each has a thread, and exactly one of them runs at any
time, so that no more than one rank's tensors are in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from resilience.replication.communicator import Agreements, GatheredAgreements

__all__ = ["in_turn"]


class _AbandonedError(Exception):
    """Another rank gave up outside of an exchange."""


def in_turn(size: int, work: Callable[[Agreements], None]) -> None:
    """Run `work` for `size` ranks, one after the other from exchange to exchange; raises what the first one raised."""
    table = _Table(size)
    threads = [threading.Thread(target=table.run, args=(rank, work), name=f"rank-{rank}") for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if table.errors:
        raise table.errors[0]


class _Table:
    """Whose turn it is, and what was said in each round."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.errors: list[BaseException] = []
        self._turns = [threading.Semaphore(0) for _ in range(size)]
        self._done: set[int] = set()
        self._rounds: list[list[bytes]] = []
        self._turns[0].release()

    def run(self, rank: int, work: Callable[[Agreements], None]) -> None:
        self._turns[rank].acquire()
        try:
            work(_Rank(rank, self))
        except _AbandonedError:
            pass  # the error is there
        except BaseException as error:  # noqa: BLE001  (it is raised by `in_turn`)
            self.errors.append(error)
        finally:
            self._done.add(rank)
            self._pass_on(rank)

    def exchange(self, rank: int, number: int, payload: bytes) -> list[bytes]:
        """What all ranks said in round `number`."""
        if len(self._rounds) <= number:
            self._rounds.append([])
        said = self._rounds[number]
        said.append(payload)
        self._pass_on(rank)
        self._turns[rank].acquire()
        if len(said) < self.size:
            raise _AbandonedError
        if rank == self.size - 1:
            self._rounds[number] = []  # nobody asks again
        return said

    def _pass_on(self, rank: int) -> None:
        for step in range(1, self.size + 1):
            successor = (rank + step) % self.size
            if successor not in self._done:
                self._turns[successor].release()
                return


class _Rank(GatheredAgreements):
    """`Agreements` of one of them."""

    def __init__(self, rank: int, table: _Table) -> None:
        self.rank = rank
        self.size = table.size
        self._table = table
        self._number = -1

    def gather(self, payload: bytes) -> list[bytes]:
        self._number += 1
        return self._table.exchange(self.rank, self._number, payload)

    def close(self) -> None:
        return
