"""Where a running job stands, as the events of all or some of its nodes tell: what `resilience top` shows. Pure.

Fed with events as they come; what it keeps is bounded, however long the run. Progress, stalls and goodput are rank 0's,
who writes its steps; from another node's events alone, what is known is what its own ranks saved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Final

from resilience.observe.phrases import ANYONE_MAY_SAY, phrase
from resilience.planning.caution import Caution, Standing, cautions

__all__ = ["Follower", "JobView"]

Event = Mapping[str, Any]

_RATE_OVER_S: Final = 60.0
_SILENT_AFTER_S: Final = 60.0
_FAILURES_TO_COUNT: Final = 2  # from so many on, their rate is more than chance
_PROGRESS: Final = frozenset({"step", "snapshot", "finished", "stopped"})
_ABOUT_AN_ITERATION: Final = frozenset({"resume", "step", "snapshot", "complete", "replicated"})
_SEGMENTS: Final = 100_000  # told steps that a restart could still undo


@dataclass
class NodeView:
    """One node of the present attempt."""

    ranks: set[int] = field(default_factory=set)
    iteration: int = 0
    last: float = 0.0


@dataclass
class _Attempt:
    """What is known of the present attempt only."""

    name: str
    generation: int
    world_size: int
    resume: Event | None = None
    ended: str = ""
    nodes: dict[str, NodeView] = field(default_factory=dict)
    cautions: dict[str, Caution] = field(default_factory=dict)
    rate: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=600))
    boundary: float | None = None  # rank 0's last told step, or when its state was loaded
    waited: float = 0.0  # rank 0's stalls since then
    speaker: int | None = None  # the lowest rank in sight


@dataclass
class JobView:
    """One run, over its attempts."""

    run_id: str
    began: float
    attempt: _Attempt
    last: float = 0.0
    iteration: int | None = None
    attempts: int = 1
    failures: int = 0
    lost_iterations: int = 0
    useful_s: float = 0.0
    newest: dict[str, tuple[int, str, float]] = field(default_factory=dict)  # "complete" …: iteration, tier, when
    saves: dict[str, int] = field(default_factory=lambda: {"complete": 0, "persistent": 0, "failed": 0, "skipped": 0})
    stalls: deque[float] = field(default_factory=lambda: deque(maxlen=1000))
    news: deque[tuple[float, str]] = field(default_factory=lambda: deque(maxlen=8))
    _segments: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=_SEGMENTS))
    _saved_at: deque[int] = field(default_factory=lambda: deque(maxlen=50))

    def begin(self, attempt: _Attempt) -> None:
        """A start of this run: a new attempt, or one more rank of the present one."""
        if attempt.name != self.attempt.name and attempt.generation >= self.attempt.generation:
            self.attempts += 1
            self.failures += not self.attempt.ended
            self.attempt = attempt

    def take(self, event: Event) -> None:
        """One more event. Of an attempt that is over: nothing."""
        attempt, rank, kind, t = self.attempt, int(event["rank"]), str(event["event"]), float(event["t"])
        if event.get("attempt") != attempt.name or (kind in _ABOUT_AN_ITERATION and event.get("iteration") is None):
            return
        self.last = max(self.last, t)
        node = attempt.nodes.setdefault(str(event["node"]), NodeView())
        node.ranks.add(rank)
        node.last = t
        if kind in _PROGRESS and event.get("iteration") is not None:
            node.iteration = max(node.iteration, int(event["iteration"]))
            self.iteration = max(self.iteration or 0, int(event["iteration"]))
        if rank == 0 or kind in ANYONE_MAY_SAY:
            self._hear(event)
        attempt.speaker = rank if attempt.speaker is None else min(attempt.speaker, rank)
        note = _NOTES.get(kind)
        if note is not None and rank == attempt.speaker:  # what all ranks tell alike is counted once
            note(self, attempt, event)

    # -- what is asked ------------------------------------------------------------------------------------------------

    @property
    def iterations_per_s(self) -> float | None:
        """Over the last minute that rank 0 told of."""
        told = self.attempt.rate
        recent = [each for each in told if each[0] >= told[-1][0] - _RATE_OVER_S] if told else []
        if len(recent) < 2 or recent[-1][0] <= recent[0][0]:
            return None
        return (recent[-1][1] - recent[0][1]) / (recent[-1][0] - recent[0][0])

    @property
    def goodput(self) -> float | None:
        """Share of the time since the run's first event in sight that went into iterations that count."""
        if not self._segments or self.last <= self.began:
            return None
        return min(1.0, max(0.0, self.useful_s) / (self.last - self.began))

    @property
    def interval(self) -> int | None:
        """Iterations from save to save, as it looks."""
        steps = [after - before for before, after in zip(self._saved_at, list(self._saved_at)[1:], strict=False)]
        return round(median(steps)) if steps else None

    def state(self, now: float) -> str:
        """finished, stopped, running, or silent: no event for a minute, by this machine's clock."""
        if self.attempt.ended:
            return self.attempt.ended
        return "running" if now - self.last <= _SILENT_AFTER_S else "silent"

    def cautions(self) -> tuple[Caution, ...]:
        """What the job itself said, and what the failures in sight add: an interval too long for their rate."""
        told = {} if self.attempt.ended else dict(self.attempt.cautions)
        rate, interval = self.iterations_per_s, self.interval
        if self.failures >= _FAILURES_TO_COUNT and rate and interval and "interval_too_long" not in told:
            iteration = self.iteration or 0
            standing = Standing(
                iteration, iteration, interval, False, None, None, step_s=1 / rate,
                save_s=median(self.stalls) if self.stalls else 0.0, mtbf_s=(self.last - self.began) / self.failures,
            )  # fmt: skip
            told |= {caution.kind: caution for caution in cautions(standing)}
        return tuple(told.values())

    def as_json(self, now: float) -> dict[str, Any]:
        """One document; ages by this machine's clock."""
        attempt = self.attempt
        resume = attempt.resume
        return {
            "run_id": self.run_id,
            "state": self.state(now),
            "attempt": attempt.name,
            "generation": attempt.generation,
            "world_size": attempt.world_size,
            "iteration": self.iteration,
            "iterations_per_s": self.iterations_per_s,
            **{kind: self._newest(kind, now) for kind in ("complete", "protected", "persistent")},
            "resumed_from": None
            if resume is None
            else {name: resume.get(name) for name in ("iteration", "tier", "seconds")},
            "attempts": self.attempts,
            "failures": self.failures,
            "lost_iterations": self.lost_iterations,
            "goodput": self.goodput,
            "saves": dict(self.saves),
            "stall": {
                "saves": len(self.stalls),
                "median_s": median(self.stalls) if self.stalls else None,
                "worst_s": max(self.stalls, default=None),
            },
            "cautions": [vars(caution) for caution in self.cautions()],
            "news": [{"age_s": now - t, "text": text} for t, text in self.news],
            "nodes": [
                {"node": name, "ranks": len(node.ranks), "iteration": node.iteration, "seen_s_ago": now - node.last}
                for name, node in sorted(attempt.nodes.items())
            ],
        }

    def _newest(self, kind: str, now: float) -> dict[str, Any] | None:
        if kind not in self.newest:
            return None
        iteration, tier, t = self.newest[kind]
        return {"iteration": iteration, "tier": tier, "age_s": now - t}

    # -- small parts --------------------------------------------------------------------------------------------------

    def _hear(self, event: Event) -> None:
        said = phrase(dict(event))
        if said and event["event"] not in ("caution", "complete"):  # those are shown as they stand
            self.news.append((float(event["t"]), said))

    def _loaded(self, attempt: _Attempt, event: Event) -> None:
        base = int(event.get("iteration") or 0)
        self.lost_iterations += max(0, (self.iteration or 0) - base) if self.attempts > 1 else 0
        self.iteration = base
        self.newest = {kind: newest for kind, newest in self.newest.items() if newest[0] <= base}
        while self._segments and self._segments[-1][0] > base:
            self.useful_s -= self._segments.pop()[1]
        attempt.boundary = float(event["t"])
        if event["event"] == "resume":
            attempt.resume = event
            self._keep("complete", base, str(event.get("tier")), float(event["t"]))

    def _step(self, attempt: _Attempt, event: Event) -> None:
        t, iteration = float(event["t"]), int(event["iteration"])
        attempt.rate.append((t, iteration))
        if attempt.boundary is not None:
            useful = max(0.0, t - attempt.boundary - attempt.waited)
            self.useful_s += useful
            self._segments.append((iteration, useful))
        attempt.boundary, attempt.waited = t, 0.0

    def _snapshot(self, attempt: _Attempt, event: Event) -> None:
        stall_s = float(event.get("stall_s") or 0.0)
        self.stalls.append(stall_s)
        attempt.waited += stall_s
        self._saved_at.append(int(event["iteration"]))

    def _joined(self, attempt: _Attempt, event: Event) -> None:
        waited_s = float(event.get("waited_s") or 0.0)
        attempt.waited += waited_s
        if self.stalls:
            self.stalls[-1] += waited_s

    def _complete(self, attempt: _Attempt, event: Event) -> None:
        tier, iteration = str(event.get("tier")), int(event["iteration"])
        self._keep("complete", iteration, tier, float(event["t"]))
        if tier == "persistent":
            self._keep("persistent", iteration, tier, float(event["t"]))
        if int(event.get("generation") or 0) == attempt.generation:
            self.saves["persistent" if tier == "persistent" else "complete"] += 1

    def _replicated(self, attempt: _Attempt, event: Event) -> None:
        self._keep("protected", int(event["iteration"]), str(event.get("tier")), float(event["t"]))

    def _failed(self, attempt: _Attempt, event: Event) -> None:
        self.saves["failed"] += 1

    def _skipped(self, attempt: _Attempt, event: Event) -> None:
        self.saves["skipped"] += 1

    def _caution(self, attempt: _Attempt, event: Event) -> None:
        kind = event.get("kind")
        if kind in ("not_protected", "replica_missing", "interval_too_long"):
            attempt.cautions[kind] = Caution(kind, str(event.get("what")), str(event.get("advice") or ""))

    def _caution_over(self, attempt: _Attempt, event: Event) -> None:
        attempt.cautions.pop(str(event.get("kind")), None)

    def _end(self, attempt: _Attempt, event: Event) -> None:
        attempt.ended = str(event["event"])

    def _keep(self, kind: str, iteration: int, tier: str, t: float) -> None:
        if iteration >= self.newest.get(kind, (-1,))[0]:
            self.newest[kind] = (iteration, tier, t)


_NOTES: Final[dict[str, Callable[[JobView, _Attempt, Event], None]]] = {
    "fresh": JobView._loaded,
    "resume": JobView._loaded,
    "step": JobView._step,
    "snapshot": JobView._snapshot,
    "joined": JobView._joined,
    "complete": JobView._complete,
    "replicated": JobView._replicated,
    "save_failed": JobView._failed,
    "save_skipped": JobView._skipped,
    "caution": JobView._caution,
    "caution_over": JobView._caution_over,
    "finished": JobView._end,
    "stopped": JobView._end,
}


class Follower:
    """Finds the run to look at among all events: the one that started last, or the one that was asked for."""

    def __init__(self, run_id: str | None = None) -> None:
        self._wanted = run_id
        self.view: JobView | None = None

    def take(self, event: Event) -> None:
        """Events by time."""
        if event["event"] == "start":
            run_id = str(event.get("run_id") or "")
            if self._wanted in (None, run_id):
                name, generation = str(event.get("attempt") or ""), int(event.get("generation") or 0)
                attempt = _Attempt(name, generation, int(event.get("world_size") or 0))
                if self.view is None or run_id != self.view.run_id:
                    self.view = JobView(run_id, float(event["t"]), attempt)
                self.view.begin(attempt)
        if self.view is not None:
            self.view.take(event)
