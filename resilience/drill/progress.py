"""Where a drilled job stands, as its events tell: who runs where, how far each rank is, who waits to be killed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from resilience.drill.scenario import Fault

Event = dict[str, Any]


@dataclass
class RankProgress:
    """One rank's present process."""

    node_id: str
    pid: int
    iteration: int = 0  # finished in this process, or what it resumed from
    holding: int | None = None
    finished: bool = False
    hung: bool = False  # ended by its watchdog


@dataclass
class JobProgress:
    """Fed with events in order; knows the newest process of each rank only."""

    ranks: dict[int, RankProgress] = field(default_factory=dict)
    last_event_t: float = 0.0

    def take(self, event: Event) -> None:
        rank, pid = int(event["rank"]), int(event["pid"])
        self.last_event_t = max(self.last_event_t, float(event["t"]))
        if event["event"] == "start":
            self.ranks[rank] = RankProgress(str(event["node"]), pid)
        state = self.ranks.get(rank)
        if state is None or state.pid != pid:
            return  # the last words of a process that was replaced
        if event["event"] in ("step", "resume"):
            state.iteration = max(state.iteration, int(event["iteration"]))
        elif event["event"] == "hold":
            state.holding = int(event["iteration"])
        elif event["event"] == "finished":
            state.finished = True
        elif event["event"] == "hang":
            state.hung = True

    @property
    def iteration(self) -> int:
        """The newest iteration that any rank has finished."""
        return max((state.iteration for state in self.ranks.values()), default=0)

    @property
    def pids(self) -> list[int]:
        return [state.pid for state in self.ranks.values()]

    def all_finished(self, world_size: int) -> bool:
        return len(self.ranks) == world_size and all(state.finished for state in self.ranks.values())

    def is_due(self, fault: Fault) -> bool:
        """Whether the job stands where this fault is to happen."""
        if fault.kind == "join":
            whose = list(self.ranks.values())
        elif fault.on_node:
            whose = [state for state in self.ranks.values() if state.node_id == f"node{fault.index}"]
        else:
            whose = [state for rank, state in self.ranks.items() if rank == fault.index]
        if not whose:
            return False
        if fault.kind == "hang" and any(state.hung and state.iteration == fault.iteration for state in whose):
            return True  # the watchdog saw it before we did
        return all(state.holding == fault.iteration for state in whose)
