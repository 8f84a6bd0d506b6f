"""Concurrency, put in from outside so that a simulated cluster decides which thread runs, and when.

What a start does in the background is written against `Threads`: threads, conditions and mailboxes. `SYSTEM_THREADS` is
the interpreter's own; the simulator's lets exactly one thread of the whole cluster run at a time.
"""

from __future__ import annotations

import atexit
import os
import queue
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Final, Protocol

__all__ = ["SYSTEM_THREADS", "Condition", "Mailbox", "SystemThreads", "Thread", "Threads", "uncaught"]


class Condition(AbstractContextManager[Any], Protocol):
    """As `threading.Condition`: a lock, and waiting for what is changed under it."""

    def wait(self, timeout: float | None = None) -> bool: ...
    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any: ...
    def notify_all(self) -> None: ...


class Mailbox(Protocol):
    """An unbounded queue: whoever puts something in bounds how much."""

    def put(self, item: Any) -> None: ...
    def get(self) -> Any:
        """The oldest item; waits for one."""
        ...


class Thread(Protocol):
    def join(self, timeout: float | None = None) -> None: ...
    def is_alive(self) -> bool: ...


class Threads(Protocol):
    """Where a start gets its threads and what they wait on."""

    def spawn(self, name: str, run: Callable[[], None]) -> Thread:
        """Run it in a thread of its own that does not keep the process from ending."""
        ...

    def condition(self) -> Condition: ...
    def mailbox(self) -> Mailbox: ...
    def at_exit(self, last: Callable[[], None]) -> Callable[[], None]:
        """Call `last` when the process ends in order; whoever registered last is called first.

        Returns what takes it back: until then the process keeps `last`, and all that it holds.
        """
        ...


class SystemThreads:
    """The interpreter's."""

    def spawn(self, name: str, run: Callable[[], None]) -> Thread:
        thread = threading.Thread(target=run, name=name, daemon=True)
        thread.start()
        return thread

    def condition(self) -> Condition:
        return threading.Condition()

    def mailbox(self) -> Mailbox:
        return queue.SimpleQueue()

    def at_exit(self, last: Callable[[], None]) -> Callable[[], None]:
        pid = os.getpid()

        def unless_forked() -> None:
            """A forked child that ends in order has none of the threads, and its parent's files."""
            if os.getpid() == pid:
                last()

        atexit.register(unless_forked)
        return partial(atexit.unregister, unless_forked)


SYSTEM_THREADS: Final = SystemThreads()


def uncaught() -> BaseException | None:
    """At exit: the exception that the script died of, if it did. At a prompt, one is no end."""
    return None if hasattr(sys, "ps1") else getattr(sys, "last_value", None)
