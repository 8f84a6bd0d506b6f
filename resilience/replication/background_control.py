"""The control exchange off the training thread: a thread of its own carries each one out, beside the next step.

To hand over what is to be said costs the training thread a fraction of what it takes to post a reduction of it, and
with a key, or among more ranks than one group can hold, an exchange is several messages one after the other. Numbers
are made of it here, and of numbers what was agreed.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

from resilience.errors import PeerLostError
from resilience.replication.communicator import Agreements

__all__ = ["BackgroundControl"]

_Start = tuple[Callable[[], Sequence[int]], Callable[[list[int]], Any]]
_Outcome = tuple[Any, Exception | None]
_LOOK_S: Final = 0.5
_JOIN_S: Final = 2.0


class BackgroundControl:
    """The control exchange over a group, or a tree of groups."""

    def __init__(self, group: Agreements) -> None:
        """`group`: all ranks, used by this object's thread alone."""
        self._group = group
        self._started: queue.SimpleQueue[_Start | None] = queue.SimpleQueue()
        self._heard: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()
        self._under_way = 0  # started, and their outcomes not taken up
        self._latest: _Outcome = ([], None)
        self._thread = threading.Thread(target=self._run, name="resilience-control", daemon=True)
        self._thread.start()

    def start(self, say: Callable[[], Sequence[int]], hear: Callable[[list[int]], Any] = list) -> None:
        self._under_way += 1
        self._started.put((say, hear))

    def result(self) -> Any:
        while self._under_way:
            try:
                self._latest = self._heard.get(timeout=_LOOK_S)
            except queue.Empty:
                if not self._thread.is_alive():
                    raise PeerLostError("the control exchange is closed") from None
                continue
            self._under_way -= 1
            if self._latest[1] is not None:
                break
        result, error = self._latest
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        self._started.put(None)
        self._group.close()  # whoever still waits in a stage is woken
        self._thread.join(timeout=_JOIN_S)

    def _run(self) -> None:
        while (started := self._started.get()) is not None:
            say, hear = started
            try:
                self._heard.put((hear(self._group.maximum(say())), None))
            except Exception as error:  # noqa: BLE001 - the training thread raises it, whatever it is
                self._heard.put((None, error))
