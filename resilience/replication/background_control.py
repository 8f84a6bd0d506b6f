"""The control exchange off the training thread: a thread of its own carries each one out, beside the next step.

To hand numbers over costs the training thread a fraction of what it takes to post a reduction of them, and with a key,
or among more ranks than one group can hold, an exchange is several messages one after the other.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Final

from resilience.errors import PeerLostError
from resilience.replication.communicator import Agreements

__all__ = ["BackgroundControl"]

_LOOK_S: Final = 0.5
_JOIN_S: Final = 2.0


class BackgroundControl:
    """The control exchange over a group, or a tree of groups."""

    def __init__(self, group: Agreements) -> None:
        """`group`: all ranks, used by this object's thread alone."""
        self._group = group
        self._changed = threading.Condition()
        self._started: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()
        self._under_way = 0
        self._result: list[int] = []
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="resilience-control", daemon=True)
        self._thread.start()

    def start(self, values: Sequence[int]) -> None:
        with self._changed:
            self._under_way += 1
        self._started.put(list(values))

    def result(self) -> list[int]:
        with self._changed:
            while self._under_way and self._error is None:
                self._changed.wait(_LOOK_S)
                if not self._thread.is_alive():
                    raise PeerLostError("the control exchange is closed")
            if self._error is not None:
                raise self._error
            return list(self._result)

    def close(self) -> None:
        self._started.put(None)
        self._group.close()  # whoever still waits in a stage is woken
        self._thread.join(timeout=_JOIN_S)

    def _run(self) -> None:
        while (values := self._started.get()) is not None:
            error: Exception | None = None
            merged: list[int] = []
            try:
                merged = self._group.maximum(values)
            except Exception as raised:  # noqa: BLE001 - the training thread raises it, whatever it is
                error = raised
            with self._changed:
                self._result, self._error = merged, error
                self._under_way -= 1
                self._changed.notify_all()
