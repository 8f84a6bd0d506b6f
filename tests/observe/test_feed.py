"""From events to figures and outlets: the training thread is never held up, and what fails is told once."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from resilience.config.metrics import metrics_target
from resilience.errors import ConfigError
from resilience.observe import feed as feed_module
from resilience.observe.events import EventLog, read_events
from resilience.observe.feed import Feed
from resilience.observe.figures import Figures
from resilience.observe.outlets import wants_progress_line
from resilience.observe.progress_line import progress_text, rendered
from resilience.observe.prometheus import PrometheusFile, exposition
from resilience.runtime.clock import SystemClock

BOUND_S = 60.0


class Recorder:
    """An outlet that remembers; fails while it is told to, and waits while it is told to."""

    name = "the recorder"

    def __init__(self) -> None:
        self.events: list[Mapping[str, Any]] = []
        self.iterations: list[int | None] = []
        self.failing = False
        self.tried = 0
        self.free = threading.Event()
        self.free.set()

    def write(self, events: Sequence[Mapping[str, Any]], figures: Figures) -> None:
        self.tried += 1
        self.free.wait(BOUND_S)
        if self.failing:
            raise OSError(28, "No space left on device")
        self.events += events
        self.iterations.append(figures.iteration)

    def close(self) -> None:
        pass


def event(name: str, t: float = 1.0, **fields: Any) -> dict[str, Any]:
    return {"v": 1, "t": t, "node": "n", "rank": 0, "pid": 1, "attempt": "g0001-aa", "event": name, **fields}


def wait_for(happened: Any) -> None:
    deadline = time.monotonic() + BOUND_S
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_an_outlet_that_fails_is_told_once_and_tried_again() -> None:
    outlet, told = Recorder(), []
    outlet.failing = True
    feed = Feed([outlet], lambda name, **fields: told.append((name, fields)), period_s=0.01)
    for tries in range(1, 4):
        feed.take(event("step", iteration=tries))
        wait_for(lambda tries=tries: outlet.tried >= tries)
    outlet.failing = False
    feed.take(event("step", iteration=9))
    feed.close()
    assert [each["iteration"] for each in outlet.events] == [9]
    ((name, fields),) = told
    assert (name, fields["outlet"]) == ("metrics_failed", "the recorder")
    assert "No space left" in fields["error"]


def test_an_outlet_that_hangs_holds_nobody_up_and_takes_no_more_than_the_queue(monkeypatch: Any) -> None:
    monkeypatch.setattr(feed_module, "_MOST_QUEUED", 50)
    monkeypatch.setattr(feed_module, "_CLOSE_BOUND_S", 0.05)
    outlet = Recorder()
    outlet.free.clear()
    feed = Feed([outlet], lambda name, **fields: None, period_s=0.01)
    feed.take(event("step", iteration=0))
    wait_for(lambda: outlet.tried)
    for iteration in range(1, 200):
        feed.take(event("step", iteration=iteration))
    assert feed.dropped == 149
    feed.close()  # returns although the thread hangs
    outlet.free.set()
    wait_for(lambda: len(outlet.events) == 51)


def test_what_rank_0_says_for_all_is_written_once_and_reaches_every_rank_s_metrics(tmp_path: Path) -> None:
    outlets = [Recorder(), Recorder()]
    for rank, outlet in enumerate(outlets):
        log = EventLog(tmp_path, "node0", rank, SystemClock(), say=lambda line: None)
        log.attach(Feed([outlet], log.emit, period_s=0.01))
        log.emit("replicated", iteration=5, generation=1, tier="local")
        log.feed("step", iteration=6)
        log.close()
    assert [[each["event"] for each in outlet.events] for outlet in outlets] == [["replicated", "step"]] * 2
    assert [(each["event"], each["rank"]) for each in read_events([tmp_path])] == [("replicated", 0)]


def test_the_prometheus_file_is_replaced_as_a_whole_and_never_a_link_followed(tmp_path: Path) -> None:
    outlet = PrometheusFile(tmp_path / "new" / "r.prom", "n", 3, lambda: 5.0)
    outlet.write([], Figures(iteration=1))
    before = outlet.path.stat().st_ino
    outlet.write([], Figures(iteration=2))
    assert outlet.path.stat().st_ino != before
    assert outlet.path.stat().st_mode & 0o444 == 0o444, "the collector is another user"
    victim = tmp_path / "victim"
    victim.write_text("mine")
    outlet.path.with_name(f".{outlet.path.name}.tmp").symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        outlet.write([], Figures(iteration=3))
    assert victim.read_text() == "mine"
    outlet.write([], Figures(iteration=4))
    assert "resilience_iteration{" in outlet.path.read_text()


@given(
    st.text(max_size=30),
    st.lists(st.floats(0, 1e5), max_size=30),
    st.integers(0, 2**50),
)
def test_any_name_and_any_stalls_are_read_back_by_prometheus(node: str, stalls: list[float], nbytes: int) -> None:
    figures = Figures()
    for iteration, stall_s in enumerate(stalls, 1):
        figures.take(event("snapshot", iteration=iteration, stall_s=stall_s, bytes=nbytes))
    families = {
        f.name: f for f in text_string_to_metric_families(exposition(figures, {"node": node, "rank": "0"}, 7.5))
    }
    stall = {(s.name, s.labels.get("le", "")): s for s in families["resilience_save_stall_seconds"].samples}
    assert all(s.labels["node"] == node for s in stall.values())
    assert stall["resilience_save_stall_seconds_sum", ""].value == pytest.approx(math.fsum(stalls))
    for bound in ("0.001", "0.3", "30.0"):
        below = sum(each <= float(bound) for each in stalls)
        assert stall["resilience_save_stall_seconds_bucket", bound].value == below
    assert families["resilience_copied_bytes"].samples[0].value == nbytes * len(stalls)


def test_goodput_is_the_share_of_time_in_which_training_did_not_wait() -> None:
    figures = Figures()
    figures.take(event("warning", 100.0))
    assert figures.goodput is None
    figures.take(event("resume", 110.0, iteration=40, tier="local", seconds=3.0))
    figures.take(event("snapshot", 150.0, iteration=50, stall_s=5.0))
    figures.take(event("step", 200.0, iteration=60))
    assert figures.goodput == pytest.approx((200 - 110 - 5) / 100)


def test_a_save_of_an_earlier_start_that_turns_out_complete_is_not_counted_as_one_of_this() -> None:
    figures = Figures()
    figures.take(event("start", run_id="r", generation=3, world_size=1))
    figures.take(event("complete", iteration=5, generation=2, tier="local"))
    figures.take(event("complete", iteration=7, generation=3, tier="persistent"))
    assert (figures.saves["complete"], figures.saves["persistent"]) == (0, 1)
    assert (figures.last_complete, figures.last_persistent) == (7, 7)


@pytest.mark.parametrize(
    ("given", "found"),
    [
        ("metrics.txt", "ends in .prom"),
        (".prom", "ends in .prom"),
        ("tensorbord:runs", "ends in .prom"),
        ("tensorboard:", "no directory"),
    ],
)
def test_metrics_that_nobody_would_read_are_refused(given: str, found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        metrics_target(given)


def test_without_tensorboard_its_extra_is_named(monkeypatch: Any) -> None:
    monkeypatch.setattr("resilience.config.metrics.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install torch-resilience\[tensorboard\]"):
        metrics_target("tensorboard:runs")


class Terminal:
    """A stream that says it is one."""

    def __init__(self, *, tty: bool = True) -> None:
        self.written = ""
        self.tty = tty

    def isatty(self) -> bool:
        return self.tty

    def write(self, text: str) -> int:
        self.written += text
        return len(text)

    def flush(self) -> None:
        pass


def test_a_progress_line_is_shown_where_a_person_sees_it_and_nowhere_else() -> None:
    seen: Any = Terminal()
    assert wants_progress_line({}, seen, 0)
    assert not wants_progress_line({}, seen, 1)
    assert not wants_progress_line({}, Terminal(tty=False), 0)  # type: ignore[arg-type]
    for off in ({"CI": "true"}, {"TERM": "dumb"}, {"RESILIENCE_PROGRESS": "0"}):
        assert not wants_progress_line(off, seen, 0)


def test_the_progress_line_says_what_is_safe() -> None:
    figures = Figures()
    for each in (
        event("fresh", 10.0),
        event("snapshot", 11.0, iteration=1200, stall_s=0.012, bytes=1),
        event("complete", 12.0, iteration=1200, generation=0, tier="local"),
        event("replicated", 12.0, iteration=1200, generation=0, tier="local"),
        event("step", 13.0, iteration=1204),
    ):
        figures.take(each)
    assert progress_text(figures).plain == (
        "iteration 1,204 · safe 1,200 (replicated) · stall 12 ms per save · goodput 99.6 %"
    )
    figures.take(event("caution", 14.0, kind="not_protected", what="w", advice="a"))
    assert progress_text(figures).plain.endswith("NOT PROTECTED")
    assert len(rendered(progress_text(figures), 40).split("\x1b")[0]) <= 39
