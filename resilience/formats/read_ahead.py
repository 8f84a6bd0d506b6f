"""How bytes are made in one thread while another writes them: an iterator that runs a bounded distance ahead.

Small pieces are joined on the way. Each call that hashes or writes gives the interpreter's lock away and may wait 5 ms
for it beside a training thread that computes in Python, so that there should be few of them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

__all__ = ["read_ahead"]

_AHEAD_BYTES: Final = 32 << 20  # made and not yet asked for; one piece may be ahead however large it is
_JOINED_BYTES: Final = 1 << 20


class _Ahead:
    """The thread that goes ahead, and what it has made."""

    def __init__(self, pieces: Iterator[memoryview]) -> None:
        self._pieces = pieces
        self._changed = threading.Condition()
        self._made: deque[memoryview] = deque()
        self._made_bytes = 0
        self._ended = False
        self._unwanted = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="resilience-read-ahead", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[memoryview]:
        while (piece := self._take()) is not None:
            yield piece
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Wait for the thread, which ends after the piece that it is at."""
        with self._changed:
            self._unwanted = True
            self._changed.notify_all()
        self._thread.join()

    def _take(self) -> memoryview | None:
        """The next piece; None after the last one."""
        with self._changed:
            self._changed.wait_for(lambda: self._made or self._ended)
            if not self._made:
                return None
            piece = self._made.popleft()
            self._made_bytes -= len(piece)
            self._changed.notify_all()
            return piece

    def _run(self) -> None:
        try:
            for piece in _joined(self._pieces):
                if not self._put(piece):
                    return
        except BaseException as error:  # noqa: BLE001  (raised where the pieces are awaited)
            self._error = error
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def _put(self, piece: memoryview) -> bool:
        """False once nobody wants any more."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._unwanted or not self._made or self._made_bytes + len(piece) <= _AHEAD_BYTES
            )
            if self._unwanted:
                return False
            self._made.append(piece)
            self._made_bytes += len(piece)
            self._changed.notify_all()
            return True


@contextmanager
def read_ahead(pieces: Iterator[memoryview]) -> Iterator[Iterator[memoryview]]:
    """The same bytes in pieces that may be larger, about `_AHEAD_BYTES` of them before they are asked for.

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
