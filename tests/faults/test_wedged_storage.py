"""Storage that takes a call and never answers: training goes on, it is told, the job comes to its end."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resilience import restore
from resilience.observe import events, pen
from resilience.observe.events import EventLog, scan_events
from resilience.runtime.clock import SystemClock
from resilience.stores.filesystem import PosixFileSystem
from tests.core.training import RUN, Act, Training, World, reference
from tests.faults.edge import Edge
from tests.ranks import values

QUICK = {"exchange_timeout_s": 0.25}  # nothing is waited for longer than twelve times this


class Wedge:
    """From `close` on, calls below a directory do not come back, until `open`."""

    def __init__(self, root: str, *names: str) -> None:
        self.way = threading.Event()
        self.way.set()
        self.blocked = 0
        self._edge = Edge((root,))
        for name in names:
            self._replace(name)

    def _replace(self, name: str) -> None:
        real = getattr(os, name)

        def replaced(*arguments: Any, **options: Any) -> Any:
            if not self.way.is_set() and self._edge._place(arguments[0], options):
                self.blocked += 1
                self.way.wait()
            return real(*arguments, **options)

        setattr(os, name, replaced)


def with_a_wedge(training: Training) -> None:
    """Shared storage and the events' directory: what a cluster has on one mount."""
    calls = ("open", "write", "fsync", "rename", "mkdir", "listdir", "lstat")
    training.extra_facts = {"wedge": Wedge(training.plan.disk, *calls), "said": []}  # type: ignore[attr-defined]
    events._say_on_stderr = facts(training)["said"].append  # of this process, which is about to end
    report = training.report

    def with_what_was_said() -> Any:
        training.notes.append(tuple(facts(training)["said"]))
        return report()

    training.report = with_what_was_said  # type: ignore[method-assign]


def facts(training: Training) -> dict[str, Any]:
    return training.extra_facts  # type: ignore[attr-defined, no-any-return]


def wedge(training: Training) -> None:
    facts(training)["wedge"].way.clear()
    facts(training)["at"] = time.monotonic()


def note_how_long(training: Training) -> None:
    training.notes += [time.monotonic() - facts(training)["at"], facts(training)["wedge"].blocked]


@pytest.mark.parametrize(
    "asynchronous",
    [pytest.param(True, marks=pytest.mark.long, id="in the background"), pytest.param(False, id="synchronous")],
)
def test_a_shared_mount_that_hangs_never_stops_training_and_the_job_comes_to_its_end(
    world: World, asynchronous: bool
) -> None:
    plan = world.plan(
        "a", save=True, steps=12, every=2, make=with_a_wedge, paced=False,
        checkpoint={"save_interval": 4, "async_save": asynchronous}, resiliency=QUICK,
        settle=(6,), acts=(Act(6, wedge), Act(11, note_how_long)),
    )  # fmt: skip
    (ran,) = values(world.run(plan))
    assert ran.iteration == 12
    assert (ran.digest,) == reference(1), "training was left alone"
    waited_s, blocked, said = ran.notes
    assert blocked >= 1, "something hung"
    assert waited_s < 60, "and held up training for no longer than a save that does not move may"
    assert max(world.copies("a")) == 12, "saves on the node went on"
    told = " ".join(said)
    assert "events of node a cannot be written (the directory does not answer)" in told
    assert "No save moved for 3 s: that of iteration 8 waits for shared storage" in told
    assert asynchronous or "the save of iteration 8 has not moved for 3 s on this rank" in told
    assert "shared storage does not answer" in told, "and how the attempt ended is noted on the node alone"


# -- a start -----------------------------------------------------------------------------------------------------------

LOOKS = ("open", "listdir", "lstat", "stat", "mkdir", "rename")


def wedged_from_the_beginning(training: Training) -> None:
    """What another start would find: the directory is there, and nothing that asks for it comes back."""
    restore._RETRY_UNKNOWN_S = 1.0  # type: ignore[misc] # of this process, which is about to end
    Wedge(f"{training.plan.disk}/save", *LOOKS).way.clear()


def test_a_start_goes_on_from_its_nodes_while_the_directory_of_load_does_not_answer(world: World) -> None:
    values(world.run(world.plan("a", "b", steps=6)))
    plan = world.plan(
        "a", "b", seed=1, make=wedged_from_the_beginning, checkpoint={"load": f"{world.disk}/save"},
        resiliency={"exchange_timeout_s": 2.0},
    )  # fmt: skip
    ran = values(world.run(plan))
    assert [each.resumed.iteration for each in ran] == [6, 6]
    assert tuple(each.digest for each in ran) == reference(2)
    told = [event["what"] for event in world.events("warning")]
    assert any("save does not answer: a call did not come back within 2 s" in what for what in told), told


@pytest.mark.parametrize("run_id", [RUN, None], ids=["to claim it", "to learn the run's name"])
def test_a_start_whose_directory_of_saves_does_not_answer_ends_in_words_on_every_rank(
    world: World, run_id: str | None
) -> None:
    options = {"save": True, "checkpoint": {"save_interval": 3}}
    values(world.run(world.plan("a", "b", steps=6, **options, resiliency={"run_id": run_id})))
    quick = {"exchange_timeout_s": 1.0, "run_id": run_id}
    began = time.monotonic()
    outcomes = world.run(world.plan("a", "b", make=wedged_from_the_beginning, **options, resiliency=quick))
    assert time.monotonic() - began < 60
    for outcome in outcomes:
        assert "save does not answer" in outcome.message, outcome.message
        assert "raise exchange_timeout_s" in outcome.message
    assert values(world.run(world.plan("a", "b", seed=2, **options, resiliency={"run_id": run_id})))[0].iteration == 12


def stuck_while_it_reads(training: Training) -> None:
    """The files of tensors are there, and reading them does not come back: on rank 1 alone."""
    opened = PosixFileSystem.open_mapping

    def stuck(self: PosixFileSystem, path: Path, **options: Any) -> Any:
        if path.suffix == ".distcp" and training.rank == 1:
            threading.Event().wait()
        return opened(self, path, **options)

    PosixFileSystem.open_mapping = stuck  # type: ignore[method-assign] # of this process, which is about to end


def test_a_rank_that_is_stuck_while_it_reads_a_checkpoint_is_ended_and_the_others_hear_of_it(world: World) -> None:
    plan = world.plan("a", "b", kind=None, save=True, steps=6, checkpoint={"save_interval": 3})
    values(world.run(plan))
    quick = {"exchange_timeout_s": 1.0}
    began = time.monotonic()
    reads, is_stuck = world.run(replace(plan, make=stuck_while_it_reads, resiliency=quick))
    assert time.monotonic() - began < 90
    assert is_stuck.status == 1
    assert is_stuck.value is None
    assert reads.error == "PeerLostError", reads.message
    (hang,) = world.events("hang")
    assert (hang["rank"], hang["seconds"] >= 12) == (1, True)


# -- the event log ---------------------------------------------------------------------------------------------------


def test_events_of_a_directory_that_hangs_are_put_aside_and_written_in_order_when_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pen, "PATIENCE_S", 0.05)
    monkeypatch.setattr(pen, "_PUT_ASIDE", 20)
    monkeypatch.setattr(os, "write", os.write)  # put back what the wedge replaces
    said: list[str] = []
    log = EventLog(tmp_path, "a", 1, SystemClock(), say=said.append)
    log.emit("step", iteration=0)
    wedge = Wedge(str(tmp_path), "write")
    wedge.way.clear()
    for iteration in range(1, 31):
        log.emit("step", iteration=iteration)
    assert wedge.blocked == 1
    (told,) = said
    assert "does not answer" in told, "and that once"
    wedge.way.set()
    log._pen._lane.wait(30.0)  # type: ignore[union-attr]
    log.emit("step", iteration=31)
    log.close()
    written = [event["iteration"] for event in scan_events([tmp_path]).events]
    assert written == [*range(21), 31], "the bound is kept, what was kept is in order, and it goes on"
    assert log.failures == 11


def test_a_fifo_in_the_place_of_the_event_log_is_told_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jsonl")
    said: list[str] = []
    log = EventLog(tmp_path, "a", 1, SystemClock(), say=said.append)
    log.emit("step", iteration=1)
    reader = os.open(tmp_path / "a.jsonl", os.O_RDONLY | os.O_NONBLOCK)  # now it could be opened
    again = EventLog(tmp_path, "a", 1, SystemClock(), say=said.append)
    again.emit("step", iteration=1)
    assert os.read(reader, 1) == b"", "nothing is written to a pipe"
    os.close(reader)
    assert len(said) == 2
    log.close()
    again.close()


def test_after_half_a_line_the_next_event_is_still_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = EventLog(tmp_path, "a", 1, SystemClock(), say=lambda sentence: None)
    whole = os.write
    monkeypatch.setattr(os, "write", lambda fd, line: whole(fd, line[: len(line) // 2]))
    log.emit("step", iteration=1)
    monkeypatch.setattr(os, "write", whole)
    log.emit("step", iteration=2)
    log.close()
    scan = scan_events([tmp_path])
    assert ([event["iteration"] for event in scan.events], scan.skipped, log.failures) == ([2], 1, 1)
