"""How bytes are made in one thread while another writes them: an iterator that runs a bounded distance ahead.

Small pieces are joined on the way. Each call that hashes or writes gives the interpreter's lock away and may wait 5 ms
for it beside a training thread that computes in Python, so that there should be few of them.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["read_ahead"]

_PIECES_AHEAD: Final = 4
_JOINED_BYTES: Final = 1 << 20
_LOOK_S: Final = 0.1  # how often a full queue is asked whether anybody still wants its pieces


class _Ahead:
    """The thread that goes ahead, and what it has made."""

    def __init__(self, pieces: Iterator[memoryview]) -> None:
        self._pieces = pieces
        self._made: queue.Queue[memoryview | None] = queue.Queue(_PIECES_AHEAD)
        self._unwanted = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="resilience-read-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[memoryview]:
        while (piece := self._made.get()) is not None:
            yield piece
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait for the thread, which ends after the piece that it is at."""
        self._unwanted.set()
        self._thread.join()

    def _run(self) -> None:
        try:
            for piece in _joined(self._pieces):
                if not self._put(piece):
                    return
        except BaseException as error:  # noqa: BLE001  (raised where the pieces are awaited)
            self._error = error
        self._put(None)

    def _put(self, piece: memoryview | None) -> bool:
        """False once nobody wants any more."""
        while not self._unwanted.is_set():
            try:
                self._made.put(piece, timeout=_LOOK_S)
            except queue.Full:
                continue
            return True
        return False


@contextmanager
def read_ahead(pieces: Iterator[memoryview]) -> Iterator[Iterator[memoryview]]:
    """The same bytes in pieces that may be larger, at most about `_PIECES_AHEAD` of them before they are asked for.

    An error of `pieces` is raised by the iterator. The thread has ended when the context is left.
    """
    ahead = _Ahead(pieces)
    try:
        yield iter(ahead)
    finally:
        ahead.close()


def _joined(pieces: Iterator[memoryview]) -> Iterator[memoryview]:
    small = bytearray()
    for piece in pieces:
        if len(piece) >= _JOINED_BYTES:
            if small:
                yield memoryview(small)
                small = bytearray()
            yield piece
            continue
        small += piece
        if len(small) >= _JOINED_BYTES:
            yield memoryview(small)
            small = bytearray()
    if small:
        yield memoryview(small)
