"""The report: what it computes from events is right, and the page stands alone, whatever the events."""

from __future__ import annotations

import argparse
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience import cli_report
from resilience.errors import CommandError
from resilience.observe.report import render
from resilience.observe.svg import ticks
from resilience.observe.timeline import DRILL_RANK, natural, run_of


def event(t: float, what_: str, rank: int = 0, attempt: str = "", node: str = "", **fields: Any) -> dict[str, Any]:
    pid = 100 * int(attempt[1:5] or 0) + rank if attempt else 0
    named = {"node": node or f"node{rank}", "rank": rank, "pid": fields.pop("pid", pid)}
    return {"v": 1, "t": float(t), **named, "attempt": attempt, "event": what_, **fields}


def a_run(ranks: int = 2, *, told: bool = True) -> list[dict[str, Any]]:
    """Ten iterations of a second each, cut off after 7, resumed at 5, with saves at 5 and 10."""
    one, two = "g0001-aaaaaaaa", "g0002-bbbbbbbb"
    events = []
    for rank in range(ranks):
        events.append(event(0, "start", rank, "", pid=100 + rank, world_size=ranks, run_id="<b>run</b>", generation=1))
        events.append(event(3, "fresh", rank, one, reason="no save was found"))
        events += [event(3 + i, "step", rank, one, iteration=i, step_s=1.0) for i in range(1, 8)]
        events.append(event(8, "snapshot", rank, one, iteration=5, kind="non_persistent", stall_s=0.1, bytes=100))
        events.append(event(8.5, "complete", rank, one, iteration=5, generation=1, tier="local"))
        events.append(event(14, "start", rank, two, world_size=ranks, run_id="<b>run</b>", generation=2))
        passed = [{"iteration": 6, "tier": "local", "reason": "torn <file>"}]
        events.append(
            event(16, "resume", rank, two, iteration=5, generation=1, tier="local", seconds=0.5, own_copies=2,
                  retrieved_bytes=20, passed_over=passed)
        )  # fmt: skip
        events += [event(16 + i - 5, "step", rank, two, iteration=i, step_s=1.0) for i in range(6, 11)]
        events.append(event(21, "snapshot", rank, two, iteration=10, kind="persistent", stall_s=0.3, bytes=100))
        events.append(event(22, "finished", rank, two, iteration=10))
    if told:
        events += [
            event(10.5, "fault", DRILL_RANK, node="drill", spec="lose:node=1@7", what="node1 is lost", restarts=True),
            event(4, "metric", DRILL_RANK, node="drill", name="loss", iteration=1, value=5.0),
            event(9, "metric", DRILL_RANK, node="drill", name="loss", iteration=6, value=4.0),
            event(17, "metric", DRILL_RANK, node="drill", name="loss", iteration=6, value=4.0),
            event(11, "gone", DRILL_RANK, node="drill"),
            event(11.5, "predicted", DRILL_RANK, node="drill", explained=True,
                  decision={"iteration": 5, "generation": 1, "tier": "local"}),
            event(23, "verdict", DRILL_RANK, node="drill", passed=True, bit_identical=True, final_digest="aa",
                  reference_digest="aa", problems=[]),
        ]  # fmt: skip
    return sorted(events, key=lambda entry: entry["t"])


def test_an_interruption_tells_what_was_lost_and_how_long_each_part_took() -> None:
    run = run_of(a_run())
    (broken,) = run.interruptions
    assert (broken.reached, broken.base, broken.lost) == (7, 5, 2)
    assert (broken.broke, broken.gone, broken.stepped) == (10.5, 11.0, 17.0)
    assert broken.what == ("node1 is lost",)
    assert broken.predicted is True
    assert (broken.total("own_copies"), broken.total("retrieved_bytes")) == (2, 20)
    assert [attempt.kept_until for attempt in run.attempts] == [5, float("inf")]
    assert run.reached == run.finished == 10


def test_without_a_drills_events_the_interruption_is_seen_all_the_same() -> None:
    (broken,) = run_of(a_run(told=False)).interruptions
    assert (broken.broke, broken.gone, broken.lost, broken.what) == (10.0, None, 2, ())
    crashed = [*a_run(told=False), event(10.2, "exception", 1, "g0001-aaaaaaaa", error="loss is nan")]
    (broken,) = run_of(sorted(crashed, key=lambda entry: entry["t"])).interruptions
    assert broken.what == ("rank 1 raised loss is nan",)


def test_time_is_useful_lost_waited_or_away_and_adds_up() -> None:
    spent = run_of(a_run()).spent
    # Iteration 5 waited 0.1 s and 10 waited 0.3 s; 6 and 7 were done twice; 22 s from first to last event.
    assert spent.useful == pytest.approx(10 - 0.4)
    assert (spent.again, spent.stalled) == (pytest.approx(2.0), pytest.approx(0.4))
    assert spent.wall == pytest.approx(22)


def test_saves_are_complete_failed_or_unknown() -> None:
    failed = event(21.5, "save_failed", 1, "g0002-bbbbbbbb", iteration=10, tier="local", error="disk full")
    first, second = run_of(sorted([*a_run(), failed], key=lambda entry: entry["t"])).saves
    assert (first.complete, first.complete_after_s, first.bytes, first.stall_s) == (True, 0.5, 200, 0.1)
    assert (second.persistent, second.complete, second.failed_on) == (True, False, [("node1", "disk full")])


class Page(HTMLParser):
    """Collects what matters: balanced tags, ids, links, and everything that would load something."""

    VOID = frozenset({"meta", "br", "link", "img", "rect", "line", "circle", "path"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.feed(page)

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.tags.append(name)
        self.ids += [given["id"] or ""] if "id" in given else []
        if "href" in given:
            self.links.append(given["href"] or "")
        if "src" in given or name in ("script", "link", "iframe", "img"):
            self.loads.append(name)
        if name not in ("meta", "br"):
            self.open.append(name)

    def handle_startendtag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(name)

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop() == name


def test_the_page_stands_alone_and_can_be_walked_by_keyboard() -> None:
    text = render(run_of(a_run()))
    page = Page(text)
    assert page.open == []
    assert page.loads == []
    assert "url(http" not in text
    assert "@import" not in text
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert "#break-1" in page.links
    for name in ("timeline", "loss", "spent", "stalls"):
        assert f'id="{name}-title"' in text
    assert "prefers-color-scheme: dark" in text
    assert text.count("<table>") >= 3  # attempts, passed over, saves: what the pictures show, as text


def test_what_a_job_said_is_text_and_never_markup() -> None:
    text = render(run_of(a_run()))
    assert "<b>run</b>" not in text
    assert "&lt;b&gt;run&lt;/b&gt;" in text
    assert "torn &lt;file&gt;" in text


def test_the_page_says_what_a_reader_wants_to_know_first() -> None:
    words = re.sub(r"<[^>]+>", " ", render(run_of(a_run())))
    assert "Rehearsal passed" in words
    assert "although it was interrupted once" in words
    assert "iteration 5, out of node disk" in words
    assert "2 iterations, done again" in words
    assert "yes, exactly this" in words
    failed = [*a_run(told=False), event(23, "verdict", DRILL_RANK, node="drill", passed=False, problems=["It hung."])]
    assert "Rehearsal failed" in render(run_of(failed))
    assert "It hung." in render(run_of(failed))


def test_a_restart_is_broken_down_from_the_fault_to_the_first_step() -> None:
    def shown(events: list[dict[str, Any]]) -> str:
        return re.sub(r"<[^>]+>", " ", render(run_of(events)))

    words = shown(a_run())
    assert "new processes start: 4.5 s" in words
    aged = [each | ({"process_s": 2.5 - each["rank"]} if each["event"] == "start" else {}) for each in a_run()]
    words = shown(aged)  # the last process was made at 12.5, the old ones ended at 11
    assert "noticed and ended: 500 ms" in words
    assert "the launcher makes new processes: 1.5 s" in words
    assert "imports, and joining the others: 3.0 s" in words
    assert "save found, verified and loaded: 500 ms" in words
    assert "first step: 1.0 s" in words
    odd = [each | ({"process_s": 1e6} if each["event"] == "start" else {}) for each in a_run()]
    assert "new processes start: 4.5 s" in shown(odd), "a clock that was set is not believed"


def test_the_loss_is_drawn_over_all_attempts_beside_that_of_an_undisturbed_run() -> None:
    events = [each | ({"world_size": 1} if each["event"] == "start" and each["t"] > 10 else {}) for each in a_run()]
    events = [each | ({"passed": True, "bit_identical": None} if each["event"] == "verdict" else {}) for each in events]
    events[-1] |= {"why_not_bits": "the number of ranks changed (2 → 1)", "loss_difference": 0.031}
    events += [
        event(1, "metric", DRILL_RANK, node="drill", name="undisturbed_loss", iteration=at, value=5.0 - at / 10)
        for at in range(1, 11)
    ]
    page = render(run_of(events))
    loss = page[page.index('class="chart loss"') : page.index("</svg>", page.index('class="chart loss"'))]
    assert loss.count("<polyline") == 3, "the undisturbed run's, and a piece for each attempt"
    assert loss.count('class="climb undisturbed"') == 1
    assert ("2 ranks" in loss, "1 rank<" in loss) == (True, True)
    assert "Its bits are not compared" in page
    assert "The loss stays within 3.1 % of that run’s" in page
    assert "every bit of it is equal" not in page


def test_many_nodes_are_drawn_as_those_with_a_story_and_the_rest() -> None:
    text = render(run_of(a_run(300)))
    lanes = re.findall(r'<g class="lane[^"]*">', text)
    assert len(lanes) == 2
    assert "299 others" in text
    assert len(text) < 60_000


@given(st.lists(st.tuples(st.sampled_from(["step", "resume", "snapshot", "complete", "finished", "start", "fresh"]),
                          st.integers(0, 2), st.integers(0, 20), st.sampled_from(["", "g0001-aa", "g0002-bb"])),
                max_size=40))  # fmt: skip
def test_any_order_of_events_makes_a_page(entries: list[tuple[str, int, int, str]]) -> None:
    events = [
        event(t, name, rank, attempt, iteration=iteration, tier="local", generation=1, stall_s=0.1, step_s=0.5)
        for t, (name, rank, iteration, attempt) in enumerate(entries)
    ]
    run = run_of(events)
    assert 0 <= run.goodput <= 1
    assert Page(render(run)).open == []


def test_nothing_at_all_makes_a_page_that_says_so() -> None:
    assert "No training in sight" in render(run_of([]))


@given(st.floats(0, 1e6), st.floats(1e-3, 1e6), st.integers(2, 10))
def test_ticks_are_few_and_within(low: float, length: float, about: int) -> None:
    found = ticks(low, low + length, about)
    assert len(found) <= about + 1
    assert all(low - 1e-6 * length <= tick <= low + length * (1 + 1e-6) for tick in found)


@given(st.lists(st.integers(0, 10**6), unique=True))
def test_names_with_numbers_sort_as_people_do(numbers: list[int]) -> None:
    names = [f"rack1-node{number}" for number in numbers]
    assert sorted(names, key=natural) == [f"rack1-node{number}" for number in sorted(numbers)]


def report(*arguments: str) -> tuple[int, dict[str, Any]]:
    parser = argparse.ArgumentParser()
    cli_report.arguments(parser)
    return cli_report.run(parser.parse_args(arguments))


def test_the_command_writes_the_page_from_a_drills_work_directory(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    for entry in a_run():
        name = "drill.jsonl" if entry["rank"] == DRILL_RANK else f"events/{entry['node']}.jsonl"
        with (tmp_path / name).open("a") as stream:
            stream.write(json.dumps(entry) + "\n")
    status, document = report(str(tmp_path), "-o", str(tmp_path / "run.html"))
    assert status == 0
    assert (document["iterations"], document["lost_iterations"], document["interruptions"]) == (10, 2, 1)
    assert "Rehearsal passed" in (tmp_path / "run.html").read_text()


def test_the_command_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="is not there") as missing:
        report(str(tmp_path / "none"), "-o", "x.html")
    assert missing.value.status == 2
    with pytest.raises(CommandError, match=r"holds no \*.jsonl file"):
        report(str(tmp_path), "-o", "x.html")


def test_steps_without_a_duration_of_their_own_last_since_the_one_before() -> None:
    events = a_run()
    for entry in events:
        entry.pop("step_s", None)
    spent = run_of(events).spent
    assert (spent.useful, spent.again) == (pytest.approx(10 - 0.4), pytest.approx(2.0))


def test_where_a_drill_tells_when_it_started_processes_their_loading_counts_as_time_away() -> None:
    launch = event(-4, "launch", DRILL_RANK, node="drill", nodes=["node0", "node1"])
    run = run_of([launch, *a_run()])
    assert run.began == -4
    assert run.spent.wall == pytest.approx(26)
    assert [attempt.spells["node0"].started for attempt in run.attempts] == [-4, 11]
