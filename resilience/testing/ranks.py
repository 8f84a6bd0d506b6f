"""Several ranks in one process, one thread each, that agree with each other."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any, Final, TypeVar

from resilience.replication.communicator import GatheredAgreements

__all__ = ["ThreadAgreements", "on_all_ranks"]

T = TypeVar("T")
_WAIT_S: Final = 60.0


class ThreadAgreements(GatheredAgreements):
    """`Agreements` over threads of one process."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[bytes]) -> None:
        self.rank = rank
        self.size = size
        self._barrier = barrier
        self._slots = slots

    def gather(self, payload: bytes) -> list[bytes]:
        self._slots[self.rank] = payload
        self._barrier.wait(_WAIT_S)
        answers = list(self._slots)
        self._barrier.wait(_WAIT_S)
        return answers

    def close(self) -> None:
        self._barrier.abort()


def on_all_ranks(size: int, work: Callable[[ThreadAgreements], T]) -> list[T | BaseException]:
    """What `work` returned or raised on each rank. AssertionError, with where each thread is, if one stands still."""
    barrier, slots = threading.Barrier(size), [b""] * size
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadAgreements(rank, size, barrier, slots))
        except Exception as error:  # noqa: BLE001 - whoever asked looks at what each rank raised
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_WAIT_S)
        assert not thread.is_alive(), f"a rank stands still:\n{_stacks()}"
    return results


def _stacks() -> str:
    return "\n".join("".join(traceback.format_stack(frame)[-8:]) for frame in sys._current_frames().values())
