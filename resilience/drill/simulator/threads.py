"""The ports of `runtime/` that a simulated process gets: its threads, conditions, mailboxes and clock."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final

from resilience.drill.simulator.schedule import Process, Scheduler, Task
from resilience.runtime.threads import Condition, Mailbox, Thread

__all__ = ["SimClock", "SimCondition", "SimThreads"]

_WALL_AT_START: Final = 1_700_000_000.0


class SimThreads:
    """`Threads` of one simulated process."""

    def __init__(self, scheduler: Scheduler, process: Process) -> None:
        self._scheduler = scheduler
        self._process = process

    def spawn(self, name: str, run: Callable[[], None]) -> Thread:
        self._scheduler.point(f"spawn {name}")
        short = name.removeprefix("resilience-")
        return _SimThread(self._scheduler, self._scheduler.spawn(short, self._process, run))

    def condition(self) -> Condition:
        return SimCondition(self._scheduler)

    def mailbox(self) -> Mailbox:
        return _SimMailbox(self._scheduler)

    def at_exit(self, last: Callable[[], None]) -> Callable[[], None]:
        """A simulated process ends without: what is stuck then is found by the scheduler."""
        return lambda: None


class _SimThread:
    def __init__(self, scheduler: Scheduler, task: Task) -> None:
        self._scheduler = scheduler
        self._task = task

    def join(self, timeout: float | None = None) -> None:
        self._scheduler.point(f"join {self._task.name}")
        until = None if timeout is None else self._scheduler.now + timeout
        while not self._task.done and (until is None or self._scheduler.now < until):
            self._task.joining.append(self._scheduler.current)
            self._scheduler.block(until)

    def is_alive(self) -> bool:
        return not self._task.done


class SimCondition:
    """A lock that its thread may take again, and waiting for what is changed under it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._owner: Task | None = None
        self._depth = 0
        self._entering: list[Task] = []
        self._waiting: list[Task] = []

    def __enter__(self) -> SimCondition:
        self._scheduler.point("lock")
        self._take(1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._owner is self._scheduler.current:  # not if it was killed while it waited
            self._depth -= 1
            if self._depth == 0:
                self._leave()

    def _take(self, depth: int) -> None:
        task = self._scheduler.current
        while self._owner not in (None, task):
            self._entering.append(task)
            self._scheduler.block()
        self._owner = task
        self._depth += depth

    def _leave(self) -> None:
        self._owner = None
        entering, self._entering = self._entering, []
        for task in entering:
            self._scheduler.wake(task)

    def wait(self, timeout: float | None = None) -> bool:
        """Whether it was notified in time."""
        return self._wait(None if timeout is None else self._scheduler.now + timeout)

    def _wait(self, until: float | None) -> bool:
        task = self._scheduler.current
        assert self._owner is task, "a wait without the lock"
        depth, self._depth = self._depth, 0
        self._waiting.append(task)
        self._leave()
        while task in self._waiting:
            if until is not None and self._scheduler.now >= until:
                self._waiting.remove(task)
                self._take(depth)
                return False
            self._scheduler.block(until)
        self._take(depth)
        return True

    def wait_for(self, predicate: Callable[[], Any], timeout: float | None = None) -> Any:
        until = None if timeout is None else self._scheduler.now + timeout
        while not (found := predicate()):
            if until is not None and self._scheduler.now >= until:
                return found
            self._wait(until)
        return found

    def notify_all(self) -> None:
        waiting, self._waiting = self._waiting, []
        for task in waiting:
            self._scheduler.wake(task)


class _SimMailbox:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._items: deque[Any] = deque()
        self._waiting: list[Task] = []

    def put(self, item: Any) -> None:
        self._scheduler.point("put")
        self._items.append(item)
        waiting, self._waiting = self._waiting, []
        for task in waiting:
            self._scheduler.wake(task)

    def get(self) -> Any:
        self._scheduler.point("get")
        while not self._items:
            self._waiting.append(self._scheduler.current)
            self._scheduler.block()
        return self._items.popleft()


class SimClock:
    """Virtual time; `wall` is what a host's clock shows, which may jump."""

    def __init__(self, scheduler: Scheduler, jump_s: Callable[[], float]) -> None:
        """`jump_s`: by how much the host's clock has jumped so far."""
        self._scheduler = scheduler
        self._jump_s = jump_s

    def now(self) -> float:
        return self._scheduler.now

    def wall(self) -> float:
        return _WALL_AT_START + self._scheduler.now + self._jump_s()

    def sleep(self, seconds: float) -> None:
        self._scheduler.point("sleep")
        self._scheduler.sleep(seconds)
