"""`top`: it says of a real job what the job's events say, and leaves the terminal as it was."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from resilience import CheckpointConfig, ResiliencyConfig, ResilientTrainer
from resilience.cli_top import picture
from resilience.observe.events import EventLog, decode_line, encode_line, read_events
from resilience.observe.job_view import Follower
from resilience.observe.timeline import run_of
from resilience.runtime.clock import SystemClock
from tests.cli.stores import RUN, ask, ask_json
from tests.observe.test_event_schema import PROMISED

BOUND_S = 60.0


def job(root: Path, **resiliency: Any) -> ResilientTrainer:
    """A real job of one process."""
    model = torch.nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = ResilientTrainer(
        model,
        optimizer,
        checkpoint=CheckpointConfig(
            non_persistent_ckpt_type="local",
            non_persistent_save_interval=5,
            non_persistent_local_ckpt_dir=root / "disk",
        ),
        resiliency=ResiliencyConfig(
            run_id=RUN, node_id="n", memory_dir=root / "memory", events=root / "events", **resiliency
        ),
    )
    trainer.step = lambda: (model(torch.ones(2, 4)).sum().backward(), optimizer.step(), optimizer.zero_grad())  # type: ignore[attr-defined]
    return trainer


class Screen:
    """The command in a pseudo-terminal."""

    def __init__(self, *words: object) -> None:
        self.end, there = pty.openpty()
        self.before = termios.tcgetattr(there)
        env = {**os.environ, "TERM": "xterm", "COLUMNS": "120", "LINES": "40"}
        command = [sys.executable, "-m", "resilience.cli", "top", *map(str, words)]
        command = ["env", "--default-signal=INT", *command]  # a shell's background job, which this may be, ignores it
        self.process = subprocess.Popen(
            command, stdin=there, stdout=there, stderr=there, env=env, start_new_session=True
        )
        self.there = there
        self.shown = ""

    def read(self) -> str:
        while select.select([self.end], [], [], 0.0)[0]:
            self.shown += os.read(self.end, 65536).decode(errors="replace")
        return self.shown

    def iterations(self) -> list[int]:
        return [int(found.replace(",", "")) for found in re.findall(r"running.*? at iteration ([\d,]+)", self.read())]

    def leave(self, key: bytes) -> int:
        os.write(self.end, key)
        deadline = time.monotonic() + BOUND_S
        while self.process.poll() is None:
            self.read()
            assert time.monotonic() < deadline, "it does not leave"
            time.sleep(0.01)
        self.read()
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.end)
        os.close(self.there)


@pytest.fixture
def screens() -> Iterator[list[Screen]]:
    opened: list[Screen] = []
    yield opened
    for screen in opened:
        screen.close()


def test_top_follows_a_running_job_on_a_terminal_until_q(memory_mount: Path, screens: list[Screen]) -> None:
    deadline = time.monotonic() + BOUND_S
    with job(memory_mount) as trainer:
        for _ in trainer.iterations(1_000_000):
            if trainer.iteration == 6:
                screens.append(Screen("--events", memory_mount / "events", "--local", memory_mount / "disk"))
            if screens and len(set(screens[0].iterations())) >= 2:
                break
            trainer.step()  # type: ignore[attr-defined]
            time.sleep(0.005)
            assert time.monotonic() < deadline, screens[0].shown if screens else "never begun"
        (screen,) = screens
        assert screen.leave(b"q") == 0, screen.shown
    seen = screen.iterations()
    assert seen == sorted(seen), "it goes on as the job does"
    assert "newest save" in screen.shown
    assert screen.shown.rfind("\x1b[?1049l") > screen.shown.rfind("\x1b[?1049h"), "the other screen is left"
    assert termios.tcgetattr(screen.there) == screen.before, "the terminal is as it was"


def test_ctrl_c_ends_it_as_q_does(memory_mount: Path, screens: list[Screen]) -> None:
    with job(memory_mount) as trainer:
        for _ in trainer.iterations(6):
            trainer.step()  # type: ignore[attr-defined]
        screen = Screen("--local", memory_mount / "disk")
        screens.append(screen)
        deadline = time.monotonic() + BOUND_S
        while "\x1b[?1049h" not in screen.read():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        os.kill(screen.process.pid, signal.SIGINT)
        assert screen.leave(b"") == 0, screen.shown
    assert "Traceback" not in screen.shown
    assert termios.tcgetattr(screen.there) == screen.before


def test_one_snapshot_says_what_the_events_and_the_lock_say(capsys: Any, memory_mount: Path) -> None:
    where = ("--events", memory_mount / "events", "--local", memory_mount / "disk")
    with job(memory_mount) as trainer:
        for _ in trainer.iterations(23):
            trainer.step()  # type: ignore[attr-defined]
            if trainer.iteration == 21:
                trainer.wait()
                document = ask_json(capsys, "top", *where)
    events = read_events([memory_mount / "events"])
    stalls = sorted(event["stall_s"] for event in events if event["event"] == "snapshot" and event["iteration"] <= 20)
    assert (document["run_id"], document["state"]) == (RUN, "running")
    assert "holds" in document["reason"]
    assert document["complete"]["iteration"] == 20
    assert document["saves"] == {"complete": 4, "persistent": 0, "failed": 0, "skipped": 0}
    assert document["stall"]["worst_s"] == stalls[-1]
    assert document["held"][0]["iteration"] == 20
    assert [node["node"] for node in document["nodes"]] == ["n"]
    after = ask_json(capsys, "top", *where)
    assert (after["state"], after["iteration"], after["cautions"]) == ("finished", 23, [])
    alone = ask_json(capsys, "top", "--local", memory_mount / "disk")
    assert (alone["state"], alone["iteration"], alone["goodput"]) == ("finished", 23, None)
    assert f"run {RUN}: finished at iteration 23" in ask(capsys, "top", "--once", *where).out


def test_a_job_that_is_not_protected_is_said_to_be_so_and_is_bad_news(capsys: Any, tmp_path: Path) -> None:
    log = EventLog(tmp_path, "a", 0, SystemClock(), say=lambda line: None)
    log.attempt = "g0001-aaaaaaaa"
    log.emit("start", run_id="r", generation=1, world_size=1, local_rank=0)
    log.emit("fresh", reason="nothing")
    log.emit("caution", kind="not_protected", iteration=30, what="not protected right now.", advice="Look.")
    document = ask_json(capsys, "top", "--events", tmp_path, status=1)
    assert [each["kind"] for each in document["cautions"]] == ["not_protected"]
    assert "! not protected right now. Look." in ask(capsys, "top", "--once", "--events", tmp_path).out
    log.emit("caution_over", kind="not_protected", iteration=35)
    assert ask_json(capsys, "top", "--events", tmp_path)["cautions"] == []


@pytest.mark.parametrize("what", ["no directory", "no file", "no start", "no run"])
def test_where_nothing_is_there_it_says_so(capsys: Any, tmp_path: Path, what: str) -> None:
    if what == "no start":
        EventLog(tmp_path, "a", 0, SystemClock(), say=lambda line: None).emit("warning", what="w")
    option, path, found = {
        "no directory": ("--events", tmp_path / "gone", "is not there"),
        "no file": ("--events", tmp_path, r"no \*.jsonl file"),
        "no start": ("--events", tmp_path, "none of 1 files tells of a start"),
        "no run": ("--local", tmp_path, "No attempt of any run is in sight"),
    }[what]
    document = ask_json(capsys, "top", option, path, status=2)
    assert re.search(found, document["error"]["message"])
    assert document["error"]["advice"]


def tale(*steps: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Events of rank 0, one a second; "start" begins a new attempt."""
    told: list[dict[str, Any]] = []
    generation = 0
    for t, (name, fields) in enumerate(steps):
        generation += name == "start"
        extra = {"run_id": "r", "generation": generation, "world_size": 1} if name == "start" else {}
        told.append(
            {"v": 1, "t": 1000.0 + t, "node": "a", "rank": 0, "pid": generation,
             "attempt": f"g{generation:04d}-aaaaaaaa", "event": name, **extra, **fields}
        )  # fmt: skip
    return told


def test_over_restarts_it_counts_what_was_lost_as_the_report_does() -> None:
    events = tale(
        ("start", {}), ("fresh", {"reason": "nothing"}),
        *[("step", {"iteration": n}) for n in range(1, 8)],
        ("snapshot", {"iteration": 8, "stall_s": 0.25, "tiers": ["local"]}), ("step", {"iteration": 9}),
        ("complete", {"iteration": 8, "generation": 1, "tier": "local"}),
        *[("step", {"iteration": n}) for n in range(10, 15)],
        ("start", {}), ("resume", {"iteration": 8, "generation": 1, "tier": "local", "seconds": 1.0}),
        *[("step", {"iteration": n}) for n in range(9, 31)],
    )  # fmt: skip
    follower = Follower()
    for event in events:
        follower.take(event)
    view, run = follower.view, run_of(events)
    assert view is not None
    document = view.as_json(events[-1]["t"])
    assert document["goodput"] == pytest.approx(run.goodput, abs=0.02)
    assert document["lost_iterations"] == sum(each.lost for each in run.interruptions) == 6
    assert (document["attempts"], document["failures"], document["iteration"]) == (2, 1, 30)
    assert document["resumed_from"]["iteration"] == 8
    assert document["iterations_per_s"] == pytest.approx(1.0)
    assert json.loads(json.dumps(document)) == document


def test_failures_that_were_seen_tell_that_saves_are_too_far_apart() -> None:
    attempt = [("step", {"iteration": n}) for n in range(1, 60)]
    saves = [("snapshot", {"iteration": n, "stall_s": 0.01, "tiers": ["local"]}) for n in (60, 120)]
    start = [("start", {}), ("resume", {"iteration": 0, "generation": 1, "tier": "local", "seconds": 0.1})]
    follower = Follower()
    for event in tale(*(start + attempt + saves) * 3, *start, *attempt):
        follower.take(event)
    assert follower.view is not None
    (caution,) = follower.view.cautions()
    assert caution.kind == "interval_too_long"
    assert "a save every 60 iterations is too rare" in caution.what


EVENTS = st.fixed_dictionaries(
    {
        "t": st.integers(0, 1000),
        "node": st.sampled_from("ab"),
        "rank": st.integers(0, 2),
        "pid": st.just(1),
        "attempt": st.sampled_from(["g0001-aaaaaaaa", "g0002-bbbbbbbb"]),
        "event": st.sampled_from([*PROMISED]),
    },
    optional={
        "iteration": st.none() | st.integers(-5, 100),
        "generation": st.none() | st.integers(0, 3),
        "run_id": st.none() | st.sampled_from("rs"),
        "tier": st.none() | st.just("local"),
        "stall_s": st.none() | st.floats(0, 10),
        "kind": st.none() | st.integers() | st.lists(st.integers(), max_size=2) | st.just("not_protected"),
        "seconds": st.none() | st.floats(0, 10),
    },
)


@given(st.lists(EVENTS, max_size=30))
def test_whatever_lines_of_the_schema_say_top_has_an_answer(events: list[dict[str, Any]]) -> None:
    follower = Follower()
    for event in events:
        assert decode_line(encode_line(event)) is not None, "a reader would take it"
        follower.take(event)
    if follower.view is not None:
        document = follower.view.as_json(1000.0)
        json.dumps(document)
        Console(file=io.StringIO()).print(picture({"reason": "", "held": [], **document}))


def test_events_of_another_run_or_of_a_dead_attempt_change_nothing() -> None:
    events = tale(("start", {}), ("fresh", {}), ("step", {"iteration": 5}), ("start", {}), ("fresh", {}))
    follower = Follower("r")
    for event in events:
        follower.take(event)
    follower.take({**events[2], "iteration": 500})
    follower.take({**events[0], "run_id": "other", "attempt": "g0009-bbbbbbbb", "generation": 9})
    assert follower.view is not None
    assert (follower.view.run_id, follower.view.iteration, follower.view.attempts) == ("r", 0, 2)
