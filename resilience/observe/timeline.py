"""What a run went through, computed from its events: attempts, interruptions, saves, and where the time went. Pure.

A drill's own events (`drill.jsonl`: what was broken, when, and the verdict) are understood where they are given;
without them, as for a real job, an interruption is what lies between two attempts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

Event = dict[str, Any]

#: Rank that a drill itself speaks as.
DRILL_RANK = -1


@dataclass
class Spell:
    """One attempt as seen on one node: when it started there, trained, and was last heard of."""

    started: float
    ended: float
    #: Finished iterations with the time of the last rank of the node to finish them, ascending.
    steps: list[tuple[float, int]] = field(default_factory=list)


@dataclass
class Attempt:
    """One start of the training, over all its nodes. `resume` and `fresh` are the events that say how it began."""

    name: str
    started: float
    ended: float
    world_size: int = 0
    resume: Event | None = None
    resumes: list[Event] = field(default_factory=list)
    fresh: Event | None = None
    born: float | None = None  # when the last of its processes was made
    spells: dict[str, Spell] = field(default_factory=dict)
    #: First time that each iteration was finished by any rank, ascending.
    steps: list[tuple[float, int]] = field(default_factory=list)
    last_words: list[str] = field(default_factory=list)
    #: Iterations above this were done again later.
    kept_until: float = float("inf")

    @property
    def base(self) -> int:
        return int(self.resume["iteration"]) if self.resume else 0

    @property
    def reached(self) -> int:
        return self.steps[-1][1] if self.steps else self.base

    @property
    def training_from(self) -> float:
        """When it had restored (or begun afresh) and training went on."""
        told = [float(event["t"]) for event in (*self.resumes, *([self.fresh] if self.fresh else []))]
        return max(told, default=self.steps[0][0] if self.steps else self.ended)


@dataclass
class Save:
    """One save of one attempt. `stall_s` is the longest wait of any rank; `bytes` the sum over ranks."""

    attempt: str
    iteration: int
    t: float
    persistent: bool
    tiers: tuple[str, ...] = ()
    stall_s: float = 0.0
    bytes: int = 0
    complete: bool = False
    complete_after_s: float | None = None
    failed_on: list[tuple[str, str]] = field(default_factory=list)  # node, error


@dataclass(frozen=True)
class Interruption:
    """From what broke to the first new step. Times are seconds since the epoch; None where no event tells."""

    broke: float
    what: tuple[str, ...]
    specs: tuple[str, ...]
    reached: int
    gone: float | None
    before: Attempt
    after: Attempt | None
    stepped: float | None
    predicted: bool | None

    @property
    def base(self) -> int:
        return self.after.base if self.after else 0

    @property
    def lost(self) -> int:
        return max(0, self.reached - self.base)

    def total(self, name: str) -> int:
        """A figure of the resume events, of which every rank tells the job's total."""
        return max((int(event.get(name) or 0) for event in (self.after.resumes if self.after else ())), default=0)

    @property
    def restore_s(self) -> float | None:
        seconds = [
            float(e["seconds"]) for e in (self.after.resumes if self.after else ()) if e.get("seconds") is not None
        ]
        return max(seconds, default=None)


@dataclass(frozen=True)
class Spent:
    """Where the wall time went, in seconds; adds up to `wall`."""

    useful: float
    again: float
    stalled: float
    away: float

    @property
    def wall(self) -> float:
        return self.useful + self.again + self.stalled + self.away


@dataclass
class Run:
    """All of it. `faults` are those that interrupted nothing (a full disk); `verdict` is a drill's, if it was one."""

    began: float
    ended: float
    run_id: str
    world_size: int
    attempts: list[Attempt]
    interruptions: list[Interruption]
    saves: list[Save]
    faults: list[Event]
    spent: Spent
    finished: int | None
    stopped: int | None
    verdict: Event | None
    warnings: list[Event]
    metrics: list[tuple[float, int, float]]  # time, iteration, loss
    undisturbed: list[tuple[float, int, float]]  # the same of a run to which nothing happened, where there was one

    @property
    def nodes(self) -> list[str]:
        """In order of first appearance."""
        seen: dict[str, None] = {}
        for attempt in self.attempts:
            for node in sorted(attempt.spells, key=natural):
                seen.setdefault(node)
        return sorted(seen, key=natural)

    @property
    def goodput(self) -> float:
        return min(1.0, self.spent.useful / self.spent.wall) if self.spent.wall > 0 else 0.0

    @property
    def reached(self) -> int:
        return max((attempt.reached for attempt in self.attempts), default=0)


def natural(name: str) -> list[tuple[int, str]]:
    """Sorts node2 before node10."""
    parts = re.split(r"([0-9]+)", name)
    return [(int(part), part) if place % 2 else (-1, part) for place, part in enumerate(parts)]


def run_of(events: Sequence[Event]) -> Run:
    """The run that these events (by time) tell of. Without any event of a rank: a run of nothing."""
    told = [event for event in events if event["rank"] != DRILL_RANK]
    drill = [event for event in events if event["rank"] == DRILL_RANK]
    attempts = _attempts(told)
    interruptions, quiet = _interruptions(attempts, drill)
    saves = _saves(told)
    began = min(
        (float(event["t"]) for event in events if event["rank"] != DRILL_RANK or event["event"] == "launch"),
        default=0.0,
    )
    _start_earlier(attempts, drill)
    ended = max((attempt.ended for attempt in attempts), default=began)
    last: dict[str, Event] = {
        event["event"]: event for event in told if event["event"] in ("finished", "stopped", "start")
    }
    return Run(
        began=began,
        ended=ended,
        run_id=str(last.get("start", {}).get("run_id") or ""),
        world_size=int(last.get("start", {}).get("world_size") or 0),
        attempts=attempts,
        interruptions=interruptions,
        saves=saves,
        faults=quiet,
        spent=spent_of(events),
        finished=_iteration_of(last.get("finished")),
        stopped=_iteration_of(last.get("stopped")),
        verdict=next((event for event in reversed(drill) if event["event"] == "verdict"), None),
        warnings=[event for event in told if event["event"] in ("warning", "unequal_items", "save_skipped")],
        metrics=_metric(events, "loss"),
        undisturbed=_metric(events, "undisturbed_loss"),
    )


def _metric(events: Sequence[Event], name: str) -> list[tuple[float, int, float]]:
    return [
        (float(event["t"]), int(event["iteration"]), float(event["value"]))
        for event in events
        if event["event"] == "metric" and event.get("name") == name and event.get("value") is not None
        and event.get("iteration") is not None
    ]  # fmt: skip


def _iteration_of(event: Event | None) -> int | None:
    return int(event["iteration"]) if event and event.get("iteration") is not None else None


def _attempts(events: Sequence[Event]) -> list[Attempt]:
    named: dict[tuple[str, int, int], str] = {}  # processes, by the attempt they came to belong to
    for event in events:
        if event.get("attempt"):
            named[_process(event)] = str(event["attempt"])
    attempts: dict[str, Attempt] = {}
    steps: dict[str, dict[int, float]] = defaultdict(dict)
    node_steps: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for event in events:
        name, t, node = named.get(_process(event)), float(event["t"]), str(event["node"])
        if name is None:
            continue  # ended before it knew its attempt
        attempt = attempts.setdefault(name, Attempt(name, t, t))
        attempt.ended = t
        spell = attempt.spells.setdefault(node, Spell(t, t))
        spell.ended = t
        _note(attempt, event)
        if event["event"] == "step" and event.get("iteration") is not None:
            iteration = int(event["iteration"])
            steps[name].setdefault(iteration, t)
            node_steps[name, node][iteration] = t
    for (name, node), times in node_steps.items():
        attempts[name].spells[node].steps = sorted((t, iteration) for iteration, t in times.items())
    ordered = sorted(attempts.values(), key=lambda attempt: attempt.started)
    for attempt in ordered:
        attempt.steps = sorted((t, iteration) for iteration, t in steps[attempt.name].items())
    kept_until = float("inf")
    for attempt in reversed(ordered):
        attempt.kept_until = kept_until
        kept_until = min(kept_until, attempt.base)
    return ordered


def _start_earlier(attempts: Sequence[Attempt], drill: Sequence[Event]) -> None:
    """A process is heard of only when it has loaded its libraries; a drill knows when it was started."""
    for place, attempt in enumerate(attempts):
        since = attempts[place - 1].ended if place else float("-inf")
        starts = [e for e in drill if e["event"] in ("launch", "gone") and since <= e["t"] <= attempt.started]
        if not starts:
            continue
        nodes = starts[-1].get("nodes")
        for node, spell in attempt.spells.items():
            if nodes is None or node in nodes:
                spell.started = float(starts[-1]["t"])


def _process(event: Event) -> tuple[str, int, int]:
    return str(event["node"]), int(event["rank"]), int(event["pid"])


def _note(attempt: Attempt, event: Event) -> None:
    kind = event["event"]
    if kind == "start":
        attempt.world_size = int(event.get("world_size") or 0)
        if event.get("process_s") is not None:
            attempt.born = max(attempt.born or 0.0, float(event["t"]) - float(event["process_s"]))
    elif kind == "resume" and event.get("iteration") is not None:
        attempt.resumes.append(event)
        if attempt.resume is None or event["rank"] == 0:
            attempt.resume = event
    elif kind == "fresh":
        attempt.fresh = event
    elif kind == "exception":
        attempt.last_words.append(f"rank {event['rank']} raised {event.get('error')}")
    elif kind == "hang":
        attempt.last_words.append(f"rank {event['rank']} made no progress and was ended by the watchdog")


def _interruptions(attempts: Sequence[Attempt], drill: Sequence[Event]) -> tuple[list[Interruption], list[Event]]:
    """What broke between attempts; and the drill's faults that interrupted nothing."""
    found: list[Interruption] = []
    faults = [event for event in drill if event["event"] == "fault"]
    used: set[int] = set()
    for before, after in pairwise(attempts):
        since = found[-1].broke if found else float("-inf")
        here = [e for e in faults if since < e["t"] < after.started and e.get("restarts", True) and id(e) not in used]
        used |= {id(event) for event in here}
        found.append(_interruption(before, after, here, drill))
    rest = [event for event in faults if id(event) not in used]
    if attempts and (open_ended := [event for event in rest if event.get("restarts", True)]):
        found.append(_interruption(attempts[-1], None, open_ended, drill))
        rest = [event for event in rest if not event.get("restarts", True)]
    return found, rest


def _interruption(
    before: Attempt, after: Attempt | None, faults: Sequence[Event], drill: Sequence[Event]
) -> Interruption:
    broke = min((float(event["t"]) for event in faults), default=before.ended)
    until = after.started if after else float("inf")
    gone = [float(e["t"]) for e in drill if e["event"] == "gone" and broke <= e["t"] <= until]
    said = [e for e in drill if e["event"] == "predicted" and broke <= e["t"]]
    predicted: bool | None = None
    if said and said[0].get("explained") and after is not None:
        now = {key: (after.resume or {}).get(key) for key in ("iteration", "generation", "tier")}
        then = {key: (said[0].get("decision") or {}).get(key) for key in now}
        predicted = now == then
    reached = max((iteration for t, iteration in before.steps if t <= broke), default=before.reached)
    return Interruption(
        broke=broke,
        what=tuple(str(event.get("what")) for event in faults) or tuple(_first_few(before.last_words)),
        specs=tuple(str(event.get("spec")) for event in faults),
        reached=reached,
        gone=gone[0] if gone else None,
        before=before,
        after=after,
        stepped=after.steps[0][0] if after and after.steps else None,
        predicted=predicted,
    )


def _first_few(words: Sequence[str]) -> list[str]:
    return [*words[:2], *([f"and {len(words) - 2} more ranks likewise"] if len(words) > 2 else [])]


def _saves(events: Iterable[Event]) -> list[Save]:
    found: dict[tuple[str, int], Save] = {}
    finished: dict[tuple[str, int], float] = {}
    for event in events:
        kind = event["event"]
        if (
            kind not in ("snapshot", "joined", "complete", "protected", "committed", "save_failed")
            or event.get("iteration") is None
        ):
            continue
        attempt, iteration, t = str(event.get("attempt", "")), int(event["iteration"]), float(event["t"])
        if kind == "complete" and f"g{int(event.get('generation') or 0):04d}" != attempt.partition("-")[0]:
            continue  # of a save that an earlier attempt had made
        save = found.setdefault((attempt, iteration), Save(attempt, iteration, t, persistent=False))
        if kind in ("snapshot", "joined"):
            save.stall_s = max(save.stall_s, float(event.get("stall_s") or 0.0))
        if kind == "snapshot":
            save.persistent |= event.get("kind") == "persistent" or "persistent" in (event.get("tiers") or ())
            save.tiers = tuple(dict.fromkeys((*save.tiers, *map(str, event.get("tiers") or ()))))
            save.bytes += int(event.get("bytes") or 0)
        elif kind == "save_failed":
            save.failed_on.append((str(event["node"]), str(event.get("error"))))
        elif kind == "complete":
            save.complete = True
            finished[attempt, iteration] = max(finished.get((attempt, iteration), t), t)
    for key, t in finished.items():
        found[key].complete_after_s = max(0.0, t - found[key].t)
    return sorted(found.values(), key=lambda save: save.t)


def spent_of(events: Sequence[Event]) -> Spent:
    """Split the wall time, from the first start to the last word of training, by what it was good for.

    Useful is the time of each iteration the last time that it was done, without what a save made it wait. A step's
    time is the median over its ranks; a save's wait is the longest of any rank.
    """
    told = [event for event in events if event["rank"] != DRILL_RANK]
    if not told:
        return Spent(0.0, 0.0, 0.0, 0.0)
    seconds: dict[tuple[str, int], list[float]] = defaultdict(list)
    stalls: dict[tuple[str, int], float] = {}
    last_done: dict[int, str] = {}
    before: dict[tuple[str, int, int], float] = {}  # each process's last boundary
    for event in told:
        if event["event"] in ("resume", "fresh"):
            before[_process(event)] = float(event["t"])
        if event.get("iteration") is None:
            continue
        key = (str(event.get("attempt", "")), int(event["iteration"]))
        if event["event"] == "step":
            since = float(event["t"]) - before.get(_process(event), float(told[0]["t"]))
            before[_process(event)] = float(event["t"])
            seconds[key].append(min(since, float(event["step_s"])) if event.get("step_s") is not None else since)
            last_done[key[1]] = key[0]
        elif event["event"] in ("snapshot", "joined") and event.get("stall_s") is not None:
            stalls[key] = max(stalls.get(key, 0.0), float(event["stall_s"]))
    useful = again = stalled = 0.0
    for key, of_ranks in seconds.items():
        step = median(of_ranks)
        waited = min(step, stalls.get(key, 0.0))
        stalled += waited
        if last_done[key[1]] == key[0]:
            useful += step - waited
        else:
            again += step - waited
    wall = float(told[-1]["t"]) - min(
        float(e["t"]) for e in events if e["rank"] != DRILL_RANK or e["event"] == "launch"
    )
    return Spent(useful, again, stalled, max(0.0, wall - useful - again - stalled))


def stalls_of(saves: Iterable[Save]) -> list[float]:
    """Seconds that training waited, one figure per save, ascending."""
    return sorted(save.stall_s for save in saves if save.bytes or save.stall_s)
