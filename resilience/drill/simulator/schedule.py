"""Which thread of the simulated cluster runs, and what time it is: one thread at a time, chosen by the seed.

Every simulated thread is a real one that runs only while it holds the baton. It gives the baton away at *points*: calls
of a simulated disk, network, clock, lock or lane. Time stands still while anybody can run and then jumps to the next
timer; if there is none, everybody waits for ever, which is a violation. So an execution is a function of its seed.
"""

from __future__ import annotations

import heapq
import itertools
import math
import random
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, partial
from typing import Final, NoReturn

import xxhash

from resilience.drill.simulator.runners import idle_runner

__all__ = ["Killed", "Process", "Scheduler", "Task", "Violation"]

_MOST_POINTS: Final = 60_000  # of one history: one that goes beyond is not getting anywhere
_UNLOCKED: Final[set[str]] = set()  # modules that were looked through, which takes a tenth of a history's time


class Killed(BaseException):
    """Raised in the threads of a simulated process that is no more; nothing that it runs may catch this."""


class Violation(BaseException):
    """A promise was broken."""

    def __init__(self, promise: str, what: str) -> None:
        super().__init__(f"{promise}: {what}")
        self.promise = promise
        self.what = what


class Process:
    """One simulated process of an operating system. `points` counts what it did since its `phase` began."""

    def __init__(self, name: str, on_point: Callable[[Process, str], None] | None = None) -> None:
        """`on_point` sees what it is about to do, and may kill it, or anybody else."""
        self.name = name
        self.dead = False
        self.phase = ""
        self.points = 0
        self.on_point = on_point

    def enter(self, phase: str) -> None:
        self.phase, self.points = phase, 0


class Task:
    """One simulated thread."""

    baton: threading.Lock  # of the real thread that it runs in

    def __init__(self, name: str, process: Process, run: Callable[[], None], on_end: Callable[[], None] | None) -> None:
        self.name = name
        self.process = process
        self.run = run
        self.on_end = on_end
        self.done = False
        self.ready = False
        self.waits = 0  # counts its waits, so that a timer of an earlier one does not wake it
        self.doing = ""
        self.joining: list[Task] = []


class Scheduler:
    """The baton and the virtual time of one history."""

    def __init__(self, seed: int, eagerness: float) -> None:
        """`eagerness`: how often a point gives the baton away although its thread could go on."""
        self.random = random.Random(seed)
        self.now = 0.0
        self.points = 0
        self.violation: BaseException | None = None
        self._eagerness = eagerness
        self._trace = xxhash.xxh3_64()
        self._tasks: dict[Task, None] = {}
        self._ready: list[Task] = []
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._finished = threading.Event()
        self._ending = False
        self._current: Task | None = None

    # -- from outside -------------------------------------------------------------------------------------------------

    def run(self, world: Callable[[], None]) -> None:
        """Run `world` as the first thread, and all that it starts, until it returns. Raises what ended the history."""
        _unlock_cached_properties()
        self.spawn("world", Process("world"), world, self._end)
        self._pass_on(None)
        self._finished.wait()
        if self.violation is not None:
            raise self.violation

    @property
    def trace(self) -> str:
        """All that happened and was written, in one number: two executions of a seed have the same."""
        return self._trace.hexdigest()

    # -- threads ------------------------------------------------------------------------------------------------------

    def spawn(
        self, name: str, process: Process, run: Callable[[], None], on_end: Callable[[], None] | None = None
    ) -> Task:
        task = Task(f"{process.name}/{name}", process, run, on_end)
        self._tasks[task] = None
        task.baton = idle_runner(partial(self._live, task)).baton
        self._make_ready(task)
        return task

    def _live(self, task: Task) -> None:
        try:
            if not (task.process.dead or self._ending):
                task.run()
        except Killed:
            pass
        except BaseException as error:  # noqa: BLE001 - a mistake of the simulator's: it must be seen
            traceback.print_exception(error)
            self.violate(error)
        task.done = True
        del self._tasks[task]
        for waiting in task.joining:
            self.wake(waiting)
        if task.on_end is not None:
            task.on_end()
        if self._tasks:
            self._pass_on(None)
        else:
            self._finished.set()

    def kill(self, process: Process) -> None:
        """As SIGKILL: none of its threads does anything any more. The caller goes on, unless it is one of them."""
        process.dead = True
        for task in self._tasks:
            if task.process is process and task is not self._current:
                task.waits += 1
                self._make_ready(task)

    def fail(self, promise: str, what: str) -> NoReturn:
        """A promise was broken, as the running thread found: the history ends here."""
        self.violate(Violation(promise, what))
        raise Killed

    def violate(self, error: BaseException) -> None:
        """The history ends here, with its first violation."""
        self.violation = self.violation or error
        self._end()

    def _end(self) -> None:
        self._ending = True
        for task in self._tasks:
            if task is not self._current:
                self._make_ready(task)

    # -- what the running thread calls --------------------------------------------------------------------------------

    @property
    def current(self) -> Task:
        assert self._current is not None, "only simulated threads come here"
        return self._current

    def point(self, what: str) -> None:
        """The running thread is about to do `what`: others may come first, or its end."""
        task = self.current
        self._check(task)
        self.note(what)
        task.doing = what
        self.points += 1
        process = task.process
        process.points += 1
        if self.points > _MOST_POINTS:
            self.violate(Violation("nobody hangs", f"more than {_MOST_POINTS} points and no end; {self.where()}"))
        if process.on_point is not None:
            process.on_point(process, what)
        self._check(task)
        if self._ready and self.random.random() < self._eagerness:
            self._pass_on(task, ready=True)
            self._check(task)

    def note(self, what: str, content: bytes | memoryview = b"") -> None:
        """Make it part of the trace."""
        self._trace.update(f"{self.current.name} {what}\n".encode())
        self._trace.update(content)

    def block(self, until: float | None = None) -> None:
        """The running thread waits: to be woken, or for the time `until`."""
        task = self.current
        self._check(task)
        task.waits += 1
        if until is not None:
            which = task.waits
            self.at(until, lambda: self.wake(task) if task.waits == which else None)
        self._pass_on(task)
        self._check(task)

    def sleep(self, seconds: float) -> None:
        until = max(self.now + seconds, math.nextafter(self.now, math.inf))  # it does take time
        while True:
            self.block(until)
            if self.now >= until:
                return

    def wake(self, task: Task) -> None:
        """Let it look again at what it waits for."""
        if not task.done:
            task.waits += 1
            self._make_ready(task)

    def at(self, time: float, act: Callable[[], None]) -> None:
        """Do something at a time, in whichever thread runs then; it must neither wait nor raise."""
        heapq.heappush(self._timers, (time, next(self._numbers), act))

    def where(self) -> str:
        """Who waits, and what for."""
        return "; ".join(f"{task.name}: {task.doing}" for task in self._tasks if task.doing and not task.process.dead)

    # -- the baton ----------------------------------------------------------------------------------------------------

    def _make_ready(self, task: Task) -> None:
        if not task.ready and task is not self._current:
            task.ready = True
            self._ready.append(task)

    def _pass_on(self, giver: Task | None, *, ready: bool = False) -> None:
        """Give the baton to somebody who can run, perhaps to `giver` if it is `ready`, who waits to have it again."""
        self._current = None
        if giver is not None and ready:
            self._make_ready(giver)
        while not self._ready:
            if not self._timers:
                self.violate(Violation("nobody hangs", f"everybody waits for ever; {self.where()}"))
                if giver is not None:
                    self._make_ready(giver)
                continue
            time, _, act = heapq.heappop(self._timers)
            self.now = max(self.now, time)
            act()
        number = self.random.randrange(len(self._ready)) if len(self._ready) > 1 else 0
        self._ready[number], self._ready[-1] = self._ready[-1], self._ready[number]
        chosen = self._ready.pop()
        chosen.ready = False
        self._current = chosen
        if chosen is giver:
            return
        chosen.baton.release()
        if giver is not None:
            giver.baton.acquire()

    def _check(self, task: Task) -> None:
        if self._ending or task.process.dead:
            raise Killed


def _unlock_cached_properties() -> None:
    """Until Python 3.12 one lock guards a property of all objects of a class, in all simulated processes:

    whoever waited for it would wait with the baton.
    """
    for name in [each for each in sys.modules if each.startswith("resilience.") and each not in _UNLOCKED]:
        _UNLOCKED.add(name)
        for kind in [each for each in vars(sys.modules[name]).values() if isinstance(each, type)]:
            for found in vars(kind).values():
                if isinstance(found, cached_property) and hasattr(found, "lock"):
                    found.lock = nullcontext()
