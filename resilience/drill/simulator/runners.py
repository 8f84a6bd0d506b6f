"""Real threads for the simulated ones, used again: to start one takes longer than most simulated threads live."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

__all__ = ["Runner", "idle_runner"]


class Runner:
    """A thread that lives one simulated thread's life after the other, each from when its `baton` is released."""

    def __init__(self) -> None:
        self.baton = threading.Lock()
        self.baton.acquire()
        self.life: Callable[[], None] | None = None
        threading.Thread(target=self._run, name="simulated", daemon=True).start()

    def _run(self) -> None:
        while True:
            self.baton.acquire()
            life, self.life = self.life, None
            assert life is not None, "the baton is given to those who have a life"
            life()
            del life  # nothing of a history outlives it here
            _IDLE.append(self)


def idle_runner(life: Callable[[], None]) -> Runner:
    """One that has nothing to do, or a new one; it lives `life` once its baton is released."""
    try:
        runner = _IDLE.pop()
    except IndexError:
        runner = Runner()
    runner.life = life
    return runner


_IDLE: list[Runner] = []
os.register_at_fork(after_in_child=_IDLE.clear)  # threads stay behind in the parent
