"""One training run under failures: an event per failure, everything between two of them by arithmetic.

A run trains from what it resumed until the next failure. Which saves are complete by then follows from the timetable
and from how long they take; which of them the failure leaves usable, from where their copies lie. It then waits until
the failure is noticed, the job is started again and the state restored; a failure during that begins it anew.

It knows nothing of bytes and of messages; the cluster simulator of `drill/` runs the real controller for that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

from resilience.foresight.exposure import Exposure
from resilience.foresight.failures import Failure
from resilience.foresight.timetable import Timetable

__all__ = ["Durations", "Outcome", "RunPlan", "Source", "simulate_run"]

Source = Literal["own_nodes", "peers", "persistent", "beginning"]


@dataclass(frozen=True)
class Durations:
    """Seconds that things take once; what training waits for at a save is in the timetable.

    `commit_s`: from a copied snapshot until every owner's copy is committed; `protect_s`: until other nodes have it
    too (not shorter); `persist_s`: until it is on shared storage. `refill_s`: from a restart until a node that came
    empty holds its copies again. A restart takes `detect_s + restart_s` and the restore from where the state is.
    """

    commit_s: float = 0.0
    protect_s: float = 0.0
    persist_s: float = 0.0
    refill_s: float = 0.0
    detect_s: float = 0.0
    restart_s: float = 0.0
    restore_s: float = 0.0
    peer_restore_s: float = 0.0
    persistent_restore_s: float = 0.0

    def away_s(self, source: Source) -> float:
        """From a failure until training goes on."""
        restore = {
            "own_nodes": self.restore_s,
            "peers": self.peer_restore_s,
            "persistent": self.persistent_restore_s,
            "beginning": 0.0,
        }
        return self.detect_s + self.restart_s + restore[source]


@dataclass(frozen=True)
class RunPlan:
    """All that fixes a run but its failures. `exposure` None: saves are not replicated, a lost node loses them.

    A run that has met `most_failures` is given up: it may never finish.
    """

    timetable: Timetable
    durations: Durations
    exposure: Exposure | None
    keep_last: int = 2
    most_failures: int = 100_000


@dataclass
class Outcome:
    """What became of a run; `wall_s` is the sum of the other seconds: useful, lost, stall, cut, away and end.

    `lost_s`: steps done again, `cut_s`: steps and waits in the middle of which something failed, `stall_s`: waits for
    saves, `away_s`: noticed, started and restored, `end_s`: the last save's way to shared storage. `unrecoverable`:
    failures that took every copy of all saves on the nodes, though there had been one.
    """

    finished: bool = False
    steps: int = 0
    failures: int = 0
    lost_steps: int = 0
    most_lost_steps: int = 0
    saves: int = 0
    unrecoverable: int = 0
    resumed_from: dict[Source, int] = field(
        default_factory=lambda: {"own_nodes": 0, "peers": 0, "persistent": 0, "beginning": 0}
    )
    wall_s: float = 0.0
    useful_s: float = 0.0
    lost_s: float = 0.0
    stall_s: float = 0.0
    cut_s: float = 0.0
    away_s: float = 0.0
    end_s: float = 0.0

    @property
    def goodput(self) -> float:
        return self.useful_s / self.wall_s if self.wall_s > 0 else 1.0


@dataclass
class _Kept:
    """A save on the nodes. `gone`: nodes that have lost their part of it since."""

    step: int
    protected: bool
    gone: set[int] = field(default_factory=set)


def simulate_run(plan: RunPlan, failures: Iterable[Failure]) -> Outcome:
    """Train to the end, or as far as the failures let it; after the last failure nothing fails any more."""
    return _Run(plan, iter(failures)).to_the_end()


class _Run:
    def __init__(self, plan: RunPlan, failures: Iterator[Failure]) -> None:
        self._plan = plan
        self._failures = failures
        self._now = 0.0
        self._base = 0
        self._reached = 0
        self._persisted = 0
        self._kept: list[_Kept] = []  # newest first
        self._done = Outcome()

    def to_the_end(self) -> Outcome:
        table, takes, done = self._plan.timetable, self._plan.durations, self._done
        failure = next(self._failures, None)
        end_s = takes.persist_s if table.persist_every else 0.0
        while True:
            ends = self._now + table.ready_s(table.steps) - table.ready_s(self._base)
            if failure is None or failure.at_s >= ends:
                self._count(table.steps, ends - self._now)
                self._now, self._base, done.finished = ends + end_s, table.steps, True
                done.end_s = end_s
                break
            if done.failures >= self._plan.most_failures:
                break
            self._train_until(failure)
            failure = self._come_back(failure)
        done.steps = self._base
        done.wall_s, done.useful_s = self._now, self._base * table.step_s
        done.lost_s = done.lost_steps * table.step_s
        return done

    def _train_until(self, failure: Failure) -> None:
        """The attempt up to the failure: what was done, and which saves came to be."""
        plan, table, takes = self._plan, self._plan.timetable, self._plan.durations
        place = table.ready_s(self._base) + failure.at_s - self._now
        reached = max(self._base, table.finished_by(place))  # rounding must not take back a step
        self._count(reached, failure.at_s - self._now)
        if failure.at_s - self._now >= takes.refill_s:
            for kept in self._kept:
                kept.gone.clear()
                kept.protected = True
        newest = table.persisted_by(place - takes.persist_s)
        if newest > self._base:
            self._persisted = newest
        for protected, by_s in ((True, place - takes.protect_s), (False, place - takes.commit_s)):
            step = table.saved_by(by_s)
            made = [step] if not protected else self._last_saves(step)
            fresh = [each for each in made if each > self._base and all(each > kept.step for kept in self._kept)]
            self._kept = [*(_Kept(each, protected) for each in fresh), *self._kept]
        self._kept = self._kept[: plan.keep_last + 1]
        self._now, self._reached = failure.at_s, reached

    def _last_saves(self, step: int) -> list[int]:
        every = self._plan.timetable.save_every
        if not every or not step:
            return []
        return [step - back * every for back in range(self._plan.keep_last) if step > back * every]

    def _count(self, reached: int, seconds: float) -> None:
        """Book the time of an attempt that came to `reached`."""
        table, done = self._plan.timetable, self._done
        whole = seconds >= table.ready_s(table.steps) - table.ready_s(self._base)
        copied = table.steps if whole else table.copied_by(table.ready_s(self._base) + seconds)
        copied = max(self._base, copied)
        waited = table.stalled_s(copied) - table.stalled_s(self._base)
        done.stall_s += waited
        done.cut_s += seconds - waited - (reached - self._base) * table.step_s
        done.saves += table.saves(self._base + 1, copied)

    def _come_back(self, failure: Failure | None) -> Failure | None:
        """Elect and restore, anew for each failure that comes meanwhile; returns the first one after that."""
        done = self._done
        while failure is not None and done.failures < self._plan.most_failures:
            done.failures += 1
            source = self._elect(failure)
            back = failure.at_s + self._plan.durations.away_s(source)
            following = next(self._failures, None)
            if following is not None and following.at_s < back:
                done.away_s += following.at_s - self._now
                self._now, self._reached, failure = following.at_s, self._base, following
                continue
            done.resumed_from[source] += 1
            done.away_s += back - self._now
            self._now, failure = back, None
            return following
        return failure

    def _elect(self, failure: Failure) -> Source:
        """Choose the newest save that is left, as `planning/election.py` would; the rest is forgotten."""
        had = bool(self._kept)
        for kept in self._kept:
            kept.gone.update(failure.nodes)
        self._kept = [kept for kept in self._kept if self._usable(kept)]
        if had and not self._kept:
            self._done.unrecoverable += 1
        source: Source = "persistent" if self._persisted else "beginning"
        chosen = self._persisted
        if self._kept and self._kept[0].step >= chosen:
            chosen = self._kept[0].step
            source = "peers" if self._kept[0].gone else "own_nodes"
        lost = self._reached - chosen
        self._done.lost_steps += lost
        self._done.most_lost_steps = max(self._done.most_lost_steps, lost)
        self._base = chosen
        return source

    def _usable(self, kept: _Kept) -> bool:
        if not kept.gone:
            return True
        exposure = self._plan.exposure
        return kept.protected and exposure is not None and exposure.survives(kept.gone)
