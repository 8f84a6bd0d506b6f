"""One operation, over and over, with a fault at its first, second, … last call: each time in a forked child.

The process that loops has imported torch and never starts a thread, so that a child is there in a few milliseconds and
as good as new. What the directories hold beforehand is made once and copied for each child.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tests.faults.edge import FAULTS, Edge, applies

__all__ = ["Operation", "Place", "Tried", "fault_loop", "forked", "full_loop", "together"]

CHILD_S = 90.0  # for one child on a busy machine; a second or less on an idle one
_BEYOND = 200  # calls more than were counted: the background's are not the same every time


@dataclass(frozen=True)
class Place:
    """Where the node's memory and its disk (and shared storage) are in this round."""

    memory: str
    disk: str

    @property
    def roots(self) -> tuple[str, str]:
        return self.memory, self.disk


class Operation(Protocol):
    """What is attacked. All three run in children of their own; an AssertionError or anything else raised is a defect.

    Picklable: it goes to the process that loops.
    """

    def prepare(self, place: Place) -> None:
        """Make what is there beforehand: a good, older save."""
        ...

    def attempt(self, place: Place, edge: Edge) -> dict[str, Any] | None:
        """Arm the edge, operate, disarm it, and see what came of it: the next save works, and nothing leaked.

        Where other processes do it, what they tell: `seen` and `struck` of the edge, whether one was `killed`.
        """
        ...

    def afterwards(self, place: Place) -> None:
        """In a fresh process after `attempt` was killed: something good is elected, and the next save works."""
        ...


@dataclass
class Tried:
    """What a loop did: how many calls the operation has, how many faults were tried, which of them went wrong."""

    calls: int = 0
    points: int = 0
    by_fault: dict[str, int] = field(default_factory=dict)
    defects: list[str] = field(default_factory=list)


def fault_loop(
    rank: int, operation: Operation, home: Place, sample: int | None = None, part: tuple[int, int] = (0, 1)
) -> Tried:
    """All faults at all calls, until the operation has no call left to fail; in a child of a forkserver.

    `sample`: so many calls only, spread over the operation, with one fault each, all kinds in their turn. `part`: else
    every nth call, from which one on.
    """
    tried = Tried()
    kept = _make_ready(operation, home)
    seen = _must(_round(operation, home, kept, Edge(home.roots)), "undisturbed")["seen"]
    tried.calls = len(seen)

    if sample is not None:
        for at, fault in _spread(seen, sample):
            _try(operation, home, kept, at, fault, tried)
        return tried
    for at in range(1 + part[0], len(seen) + _BEYOND, part[1]):
        call = seen[at - 1] if at <= len(seen) else "close"  # one more than was counted: lanes have a pace of their own
        struck = [_try(operation, home, kept, at, fault, tried) for fault in FAULTS if applies(fault, call)]
        if at > len(seen) and not any(struck):
            return tried
    raise AssertionError("the operation never came to its end")


def full_loop(operation: Operation, home: Place, edges: Sequence[Any]) -> list[str]:
    """One round of the operation for each of `edges`, whatever they do when they are armed. What went wrong."""
    kept = _make_ready(operation, home)
    told = [(edge.struck, _round(operation, home, kept, edge)) for edge in edges]
    return [f"{struck}: {each['error'] or 'it was killed'}" for struck, each in told if each["error"] or each["killed"]]


def _make_ready(operation: Operation, home: Place) -> Place:
    """What is there beforehand, made once; returns where it is kept."""
    for root in home.roots:
        os.makedirs(root, exist_ok=True)
    for name in _must(_forked(lambda: _prepared(operation, home)), "prepare")["modules"]:
        with contextlib.suppress(Exception):  # what cannot be imported here is imported by each child
            importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child looks at what is new: else it copies every page of what was imported
    kept = Place(f"{home.memory}.kept", f"{home.disk}.kept")
    for here, there in zip(home.roots, kept.roots, strict=True):
        shutil.copytree(here, there, symlinks=True)
    return kept


def _spread(seen: Sequence[str], sample: int) -> Iterator[tuple[int, str]]:
    """Each kind of fault in its turn, at the next call from there on that can give it."""
    faults = tuple(FAULTS)
    for turn in range(sample):
        fault, start = faults[turn % len(faults)], turn * len(seen) // sample
        order = [*range(start, len(seen)), *range(start)]
        found = next((at for at in order if applies(fault, seen[at])), None)
        if found is not None:
            yield found + 1, fault


def _prepared(operation: Operation, home: Place) -> dict[str, Any]:
    before = set(sys.modules)
    operation.prepare(home)
    return {"modules": sorted(set(sys.modules) - before)}


def _try(operation: Operation, home: Place, kept: Place, at: int, fault: str, tried: Tried) -> bool:
    """One fault at one call; whether it struck."""
    told = _round(operation, home, kept, Edge(home.roots, at, fault))
    struck = told.get("struck", "") or ("a crash" if told["killed"] else "")
    if told["killed"] and fault in ("crash", "torn"):
        told = _forked(lambda: operation.afterwards(home))
    if struck or told["error"]:
        tried.points += 1
        tried.by_fault[fault] = tried.by_fault.get(fault, 0) + 1
    if told["error"]:
        tried.defects.append(f"{fault} at call {at} of {tried.calls} ({struck}):\n{told['error']}")
    return bool(struck)


def forked(work: Callable[[], Any], bound_s: float = CHILD_S) -> Any:
    """What `work` returns in a forked child; AssertionError with its trace if it raises or does not come back."""
    return _must(_forked(lambda: {"value": work()}, bound_s), "forked")["value"]


def together(works: Sequence[Callable[[], dict[str, Any] | None]], bound_s: float = CHILD_S) -> list[dict[str, Any]]:
    """Run all of `works` at once, each in a forked child, and hear of each: see `_forked`."""
    children = [_fork(work, leads=False) for work in works]
    deadline = time.monotonic() + bound_s
    return [_heard(child, reader, deadline - time.monotonic()) for child, reader in children]


def _round(operation: Operation, home: Place, kept: Place, edge: Edge) -> dict[str, Any]:
    for here, there in zip(home.roots, kept.roots, strict=True):
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(there, here, symlinks=True)

    def attempt() -> dict[str, Any]:
        edge.install()
        error, told = "", None
        try:
            told = operation.attempt(home, edge)
        except BaseException:  # noqa: BLE001 - whatever it is, the loop has to hear of it
            error = traceback.format_exc()
        return {"seen": edge.seen, "struck": edge.struck, "error": error, **(told or {})}

    return _forked(attempt)


def _must(told: dict[str, Any], what: str) -> dict[str, Any]:
    if told["error"]:
        raise AssertionError(f"{what}: {told['error']}")
    return told


def _forked(work: Callable[[], dict[str, Any] | None], bound_s: float = CHILD_S) -> dict[str, Any]:
    """Run `work` in a forked child: what it returns, `error` (its trace, or that it hung), `killed` (by SIGKILL)."""
    return _heard(*_fork(work, leads=True), bound_s)


def _fork(work: Callable[[], dict[str, Any] | None], *, leads: bool) -> tuple[int, int]:
    """The child, and where it will be heard of. `leads`: a process group of its own, to be ended as a whole."""
    reader, writer = os.pipe()
    child = os.fork()
    if child != 0:
        os.close(writer)
        return child, reader
    status = 1
    try:
        os.close(reader)
        if leads:
            os.setpgid(0, 0)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 2)  # what thousands of starts say of themselves
        os.close(nowhere)
        try:
            told = {"error": "", **(work() or {})}
        except BaseException:  # noqa: BLE001 - whatever it is, the loop has to hear of it
            told = {"error": traceback.format_exc()}
        with os.fdopen(writer, "w") as stream:
            json.dump(told, stream)
        status = 0
    finally:
        os._exit(status)


def _heard(child: int, reader: int, bound_s: float) -> dict[str, Any]:
    said, deadline = b"", time.monotonic() + bound_s
    try:
        while True:
            ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                _end(child)
                return {"error": f"it was still running after {bound_s:g} s", "killed": False}
            part = os.read(reader, 1 << 16)
            if not part:
                break
            said += part
    finally:
        os.close(reader)
    _, status = os.waitpid(child, 0)
    killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
    if said:
        return {"killed": killed, **json.loads(said)}
    error = "" if killed else f"it ended without a word, with status {status}"
    return {"error": error, "killed": killed}


def _end(child: int) -> None:
    os.kill(child, signal.SIGCONT)
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:  # it leads no group
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
