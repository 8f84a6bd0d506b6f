"""The event log: nothing it does may harm training, and whatever a killed process leaves can still be read."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.observe.events import (
    MAX_LINE_BYTES,
    EventLog,
    EventTail,
    decode_line,
    encode_line,
    read_events,
    scan_events,
)
from resilience.observe.phrases import human_bytes, human_seconds, phrase


class Clock:
    def __init__(self) -> None:
        self.t = 1000.0

    def now(self) -> float:
        return self.t

    def wall(self) -> float:
        self.t += 1
        return self.t

    def sleep(self, seconds: float) -> None:
        self.t += seconds


def log(directory: Path | None, rank: int = 0, said: list[str] | None = None) -> EventLog:
    lines: list[str] = [] if said is None else said
    return EventLog(directory, "node0", rank, Clock(), say=lines.append)


def test_what_was_emitted_is_read_back_with_who_and_when(tmp_path: Path) -> None:
    events = log(tmp_path, rank=3)
    events.attempt = "g0001-3f9ac01b"
    events.emit("snapshot", iteration=5, tiers=("local",), stall_s=0.25)
    (event,) = read_events([tmp_path])
    assert event == {
        "v": 1,
        "t": 1001.0,
        "node": "node0",
        "rank": 3,
        "pid": os.getpid(),
        "attempt": "g0001-3f9ac01b",
        "event": "snapshot",
        "iteration": 5,
        "tiers": ["local"],
        "stall_s": 0.25,
    }


def test_ranks_of_one_node_share_a_file_line_by_line(tmp_path: Path) -> None:
    logs = [log(tmp_path, rank) for rank in range(3)]
    for iteration in range(10):
        for events in logs:
            events.emit("step", iteration=iteration)
    assert [path.name for path in tmp_path.iterdir()] == ["node0.jsonl"]
    assert len(read_events([tmp_path])) == 30


def test_a_line_torn_by_a_killed_process_is_skipped_and_counted(tmp_path: Path) -> None:
    events = log(tmp_path)
    events.emit("step", iteration=1)
    events.emit("step", iteration=2)
    path = tmp_path / "node0.jsonl"
    path.write_bytes(path.read_bytes()[:-9])
    scan = scan_events([path])
    assert [event["iteration"] for event in scan.events] == [1]
    assert scan.skipped == 1


@pytest.mark.parametrize(
    "broken",
    [
        b"[1, 2]",
        b'{"t": 1, "node": "a", "rank": 0, "pid": 1}',
        b'{"t": "now", "node": "a", "rank": 0, "pid": 1, "event": "step"}',
        b'{"t": 1, "node": "a", "rank": true, "pid": 1, "event": "step"}',
        b'{"t": 1, "node": "a", "rank": 0, "pid": 1, "event": "step", "iteration": "7"}',
        b'{"t": NaN, "node": "a", "rank": 0, "pid": 1, "event": "step"}',
        b"[" * 5000,
    ],
)
def test_what_is_not_of_the_schema_is_not_taken_for_an_event(broken: bytes) -> None:
    assert decode_line(broken) is None


@given(st.binary(max_size=300))
def test_no_bytes_whatsoever_break_the_reader(line: bytes) -> None:
    assert decode_line(line) is None or b'"event"' in line


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=50),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=10), inner, max_size=5),
)


@given(
    st.dictionaries(st.text(st.characters(codec="ascii", categories=["Ll"]), min_size=1, max_size=8), PLAIN, max_size=6)
)
def test_any_plain_fields_make_one_line_of_json(fields: dict[str, Any]) -> None:
    line = encode_line({"event": "warning", **{f"x_{name}": value for name, value in fields.items()}})
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert json.loads(line)["event"] == "warning"


@given(st.lists(st.text(min_size=0, max_size=300), min_size=50, max_size=200), st.integers(0, 100_000))
def test_a_line_is_bounded_and_says_what_was_cut(reasons: list[str], long: int) -> None:
    entry = {"t": 1.0, "node": "n", "rank": 0, "pid": 1, "event": "resume", "passed_over": reasons, "what": "x" * long}
    line = encode_line(entry)
    assert len(line) <= MAX_LINE_BYTES
    event = json.loads(line)
    assert event["event"] == "resume"
    if event["passed_over"] != reasons:
        assert "passed_over" in event["cut"]


def test_a_failing_disk_is_counted_and_said_once_and_never_raises(tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "file").write_text("in the way")
    events = log(tmp_path / "file" / "events", said=said)
    events.emit("step", iteration=1)
    assert events.failures == 1
    broken = log(tmp_path, said=said)
    assert broken._pen is not None
    assert broken._pen._fd is not None
    os.close(broken._pen._fd)
    broken._pen._fd = os.open("/dev/full", os.O_WRONLY)
    for iteration in range(5):
        broken.emit("step", iteration=iteration)
    assert broken.failures == 5
    assert len([line for line in said if "cannot be written" in line]) == 2  # once per log
    broken.close()


def test_a_file_that_cannot_be_looked_at_is_closed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def descriptors() -> list[str]:
        return sorted(os.readlink(each.path) for each in os.scandir("/proc/self/fd") if os.path.lexists(each.path))

    def broken(fd: int) -> os.stat_result:
        raise OSError(errno.EIO, "Input/output error")

    said: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr("resilience.observe.pen.os.fstat", broken)
        events = log(tmp_path, said=said)
    assert len([line for line in said if "cannot be written" in line]) == 1
    assert not [name for name in descriptors() if name.startswith(str(tmp_path))]
    events.close()


def test_rank_0_speaks_for_all_and_others_only_of_their_own_troubles(tmp_path: Path) -> None:
    said: list[str] = []
    zero, two = log(None, 0, said), log(None, 2, said)
    for events in (zero, two):
        events.emit("finished", iteration=60)
        events.emit("save_failed", iteration=20, tier="local", error="disk full")
        events.emit("save_failed", iteration=30, tier="local", error="it failed on another rank", elsewhere=True)
        events.emit("step", iteration=60)
    assert said == [
        "finished at iteration 60",
        "the save of iteration 20 failed: disk full; training goes on",
        "the save of iteration 30 failed: it failed on another rank; training goes on",
        "rank 2: the save of iteration 20 failed: disk full; training goes on",
    ]


def test_a_tail_gives_each_line_once_and_only_when_it_is_whole(tmp_path: Path) -> None:
    tail = EventTail(tmp_path)
    assert tail.poll() == []
    events = log(tmp_path)
    events.emit("step", iteration=1)
    assert [event["iteration"] for event in tail.poll()] == [1]
    assert tail.poll() == []
    events.emit("step", iteration=2)
    path = tmp_path / "node0.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert tail.poll() == []
    path.write_bytes(whole)
    assert [event["iteration"] for event in tail.poll()] == [2]
    assert tail.skipped == 0


def test_a_resume_reads_as_a_sentence() -> None:
    sentence = phrase(
        {
            "event": "resume",
            "iteration": 35,
            "tier": "local",
            "seconds": 0.42,
            "retrieved_bytes": 12_300_000,
            "passed_over": [
                {"iteration": 40, "reason": "owner 2 has no copy that verifies"},
                {"iteration": 38, "reason": "running"},
            ],
        }
    )
    assert sentence == (
        "resumed at iteration 35 from node disk in 420 ms, 12.3 MB fetched from other nodes; "
        "passed over iteration 40: owner 2 has no copy that verifies (and 1 more save)"
    )


@given(st.sampled_from(["resume", "start", "hang", "warning", "complete", "save_failed", "unheard-of"]), PLAIN)
def test_odd_fields_never_break_a_sentence(name: str, value: Any) -> None:
    odd = {"event": name, "seconds": value, "world_size": value, "passed_over": value, "retrieved_bytes": value}
    assert "\n" not in phrase(odd)


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1_500_000, "1.5 MB"), (2e15, "2000 TB")])
def test_bytes_for_people(count: float, text: str) -> None:
    assert human_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.00085, "850 µs"), (0.0042, "4.2 ms"), (0.12, "120 ms"), (1.25, "1.2 s"), (200, "3 min 20 s"), (9000, "2.5 h")],
)
def test_seconds_for_people(seconds: float, text: str) -> None:
    assert human_seconds(seconds) == text
