"""What happened, when, on which rank: the event log of a job, one JSON Lines file per node.

Writing never harms training: one `O_APPEND` write per line (whole even when several ranks of a node share the file),
a bounded line, a disk that fails is counted and mentioned once, and one that hangs is not waited for (`pen.py`).
Reading is tolerant: a line torn by a killed process is skipped and counted. Events that a person wants to know of are
also said on stderr (`phrases.py`).
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from resilience.observe.pen import Pen
from resilience.observe.phrases import ANYONE_MAY_SAY, phrase
from resilience.runtime.clock import Clock
from resilience.runtime.threads import SYSTEM_THREADS, Threads

SCHEMA_VERSION = 1
MAX_LINE_BYTES = 16 * 1024

#: Fields that readers compute with, and what they must be; an event that breaks this is skipped and counted.
_NUMBER = (int, float)
_TYPES: dict[str, tuple[type, ...]] = {
    "v": (int,),
    "t": _NUMBER,
    "node": (str,),
    "rank": (int,),
    "pid": (int,),
    "attempt": (str,),
    "event": (str,),
    "iteration": (int,),
    "generation": (int,),
    "world_size": (int,),
    "tier": (str,),
    "seconds": _NUMBER,
    "step_s": _NUMBER,
    "stall_s": _NUMBER,
    "waited_s": _NUMBER,
    "process_s": _NUMBER,
    "bytes": (int,),
    "retrieved_bytes": (int,),
    "own_copies": (int,),
    "replica_copies": (int,),
    "rebuilt": (int,),
    "passed_over": (list,),
    "tiers": (list,),
    "nodes": (list,),
    "problems": (list,),
    "decision": (dict,),
    "value": _NUMBER,
    "name": (str,),
    "digest": (str,),
}
_BEYOND_ANY_NUMBER = 1 << 63
_REQUIRED = ("t", "node", "rank", "pid", "event")

#: What all ranks know alike: rank 0 writes it for all, to every rank's sinks it goes all the same.
FOR_ALL = frozenset({"replicated", "caution", "caution_over"})


class Sink(Protocol):
    """Where events go besides the file: metrics, the progress line."""

    def take(self, event: Mapping[str, Any], /) -> None:
        """One event. Called by whichever thread emits it, training's too: must return at once, and never raise."""
        ...

    def close(self) -> None:
        """Nothing comes after; within a bound."""
        ...


class EventLog:
    """Appends this rank's events to `<directory>/<node_id>.jsonl`; without a directory only speaks.

    Not collective. `emit` may be called from any thread and never raises. `failures` counts lines that could not
    be written.
    """

    def __init__(
        self,
        directory: Path | None,
        node_id: str,
        rank: int,
        clock: Clock,
        *,
        say: Callable[[str], None] | None = None,
        threads: Threads = SYSTEM_THREADS,
    ) -> None:
        self.attempt = ""
        self.failures = 0
        self._node_id = node_id
        self._rank = rank
        self._clock = clock
        self._say = say if say is not None else _say_on_stderr
        self._pen: Pen | None = None
        self._sinks: list[Sink] = []
        if directory is not None:
            self._pen = Pen(directory / f"{node_id.replace('/', '_')}.jsonl", self._failed, threads)

    def attach(self, sink: Sink) -> None:
        """Give `sink` every event from now on; it is closed with the log."""
        self._sinks.append(sink)

    def emit(self, event: str, /, **fields: Any) -> None:
        """Write one event. `fields` hold plain values; what JSON lacks is written as its text."""
        entry = self._entry(event, fields)
        for sink in self._sinks:
            sink.take(entry)
        if self._pen is not None and (self._rank == 0 or event not in FOR_ALL):
            try:
                self._pen.write(encode_line(entry))
            except ValueError as error:
                self._failed(error)
        if self._rank == 0 or (event in ANYONE_MAY_SAY and not fields.get("elsewhere")):
            sentence = phrase(entry)
            if sentence:
                self._say(sentence if self._rank == 0 else f"rank {self._rank}: {sentence}")

    def feed(self, event: str, /, **fields: Any) -> None:
        """For the sinks only: what is too frequent to be written down by every rank."""
        if self._sinks:
            entry = self._entry(event, fields)
            for sink in self._sinks:
                sink.take(entry)

    def _entry(self, event: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "v": SCHEMA_VERSION,
            "t": round(self._clock.wall(), 6),
            "node": self._node_id,
            "rank": self._rank,
            "pid": os.getpid(),
            "attempt": self.attempt,
            "event": event,
            **fields,
        }

    def close(self) -> None:
        sinks, self._sinks = self._sinks, []
        for sink in sinks:
            sink.close()
        pen, self._pen = self._pen, None
        if pen is not None:
            pen.close()

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        if self.failures == 1:
            self._say(f"events of node {self._node_id} cannot be written ({error}); training goes on without them")


def _say_on_stderr(sentence: str) -> None:
    try:
        sys.stderr.write(f"[resilience] {sentence}\n")
        sys.stderr.flush()
    except (OSError, ValueError):
        return  # a closed stderr must not end a training job, and there is nowhere left to say so


def encode_line(entry: dict[str, Any]) -> bytes:
    """One line of at most `MAX_LINE_BYTES`: what is long is cut, with a note of what was cut."""
    line = _dump(entry)
    if len(line) <= MAX_LINE_BYTES:
        return line
    entry = dict(entry)
    cut: list[str] = []
    for name in sorted(entry, key=lambda name: -len(_dump(entry[name]))):
        value = entry[name]
        if isinstance(value, str):
            entry[name] = value[:1000]
        elif isinstance(value, list):
            entry[name] = [item for item in value[:20] if len(_dump(item)) <= 400]
        else:
            entry[name] = None
        cut.append(name)
        line = _dump({**entry, "cut": cut})
        if len(line) <= MAX_LINE_BYTES:
            return line
    raise ValueError("an event has too many fields for one line")


def _dump(value: Any) -> bytes:
    text = json.dumps(_plain(value), separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.encode("ascii") + b"\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None  # JSON has no NaN; readers skip a missing number
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return str(value)


@dataclass
class EventScan:
    """What was read: events by time, and how many lines were torn or not of this schema."""

    events: list[dict[str, Any]] = field(default_factory=list)
    skipped: int = 0


def read_events(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Events of these files (or of all `*.jsonl` in these directories), by time. Raises `OSError` for a bad path."""
    return scan_events(paths).events


def scan_events(paths: Iterable[Path]) -> EventScan:
    """Like `read_events`, with the number of skipped lines."""
    scan = EventScan()
    for path in event_files(paths):
        for line in path.read_bytes().split(b"\n"):
            _take(line, scan)
    scan.events.sort(key=lambda event: float(event["t"]))  # stable: each process's own order is kept
    return scan


def event_files(paths: Iterable[Path]) -> list[Path]:
    """Files as given; a directory stands for the `*.jsonl` in it and in its `events/`, if it is a drill's.

    What has that name in a directory and is no file is left out: a pipe would be waited for.
    """
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            there = [*sorted(path.glob("*.jsonl")), *sorted((path / "events").glob("*.jsonl"))]
            files.extend(each for each in there if each.is_file())
        else:
            files.append(path)
    return files


class EventTail:
    """Follows the files of an events directory while jobs write them; each `poll` returns what is new."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._offsets: dict[Path, int] = {}
        self.skipped = 0

    def poll(self) -> list[dict[str, Any]]:
        """New whole lines of all files, by time."""
        scan = EventScan()
        for path in event_files([self._directory]):
            offset = self._offsets.get(path, 0)
            with path.open("rb") as stream:
                stream.seek(offset)
                new = stream.read()
            whole = new.rfind(b"\n") + 1  # a line still being written is left for the next poll
            self._offsets[path] = offset + whole
            for line in new[:whole].split(b"\n"):
                _take(line, scan)
        self.skipped += scan.skipped
        scan.events.sort(key=lambda event: float(event["t"]))
        return scan.events


def _take(line: bytes, scan: EventScan) -> None:
    if not line.strip():
        return
    event = decode_line(line)
    if event is None:
        scan.skipped += 1
    else:
        scan.events.append(event)


def decode_line(line: bytes) -> dict[str, Any] | None:
    """The event in one line, or None where it is torn or not of this schema."""
    if len(line) > 2 * MAX_LINE_BYTES:
        return None
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(event, dict) or any(name not in event for name in _REQUIRED):
        return None
    for name, types in _TYPES.items():
        value = event.get(name)
        if value is None and name not in _REQUIRED:
            continue
        if not isinstance(value, types) or isinstance(value, bool):
            return None
        if isinstance(value, int | float) and not abs(value) < _BEYOND_ANY_NUMBER:  # nor is it NaN
            return None
    return event
