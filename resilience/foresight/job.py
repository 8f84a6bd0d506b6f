"""What a job's shape and settings mean for a simulated run: its cliques, the saves it really takes, what to be told."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from resilience.errors import ConfigError
from resilience.foresight.exposure import exposure_of
from resilience.foresight.simulation import Durations, RunPlan
from resilience.foresight.timetable import Timetable
from resilience.planning.schemes import SCHEMES
from resilience.planning.topology import make_topology

__all__ = ["Job", "PlannedJob", "Redundancy", "plan_job"]

Redundancy = Literal["none", "replica", "xor", "rs"]


@dataclass(frozen=True)
class Job:
    """A job as its user sets it up; the names are those of the configuration.

    `factor`: copies of each shard, or a clique's size for xor and rs. `racks_apart`: racks are the failure domains, so
    that a clique has at most one node of each. Intervals in steps; None: no such saves.
    """

    ranks: int
    steps: int
    step_s: float
    ranks_per_node: int = 8
    nodes_per_rack: int = 1
    racks_apart: bool = False
    save_every: int | None = None
    persist_every: int | None = None
    redundancy: Redundancy = "replica"
    factor: int = 2
    jump: int | None = None
    keep_last: int = 2
    stall_s: float = 0.0
    persist_stall_s: float = 0.0

    def __post_init__(self) -> None:
        for name in ("ranks", "steps", "ranks_per_node", "nodes_per_rack", "factor", "keep_last"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: at least 1 is needed.")
        for name in ("save_every", "persist_every", "jump"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: at least 1 is needed.", advice="Or leave it out.")
        if not 0 < self.step_s < math.inf:
            raise ConfigError(f"step_s={self.step_s:g}: the seconds of a step must be above 0.")

    @property
    def nodes(self) -> int:
        return -(-self.ranks // self.ranks_per_node)


@dataclass(frozen=True)
class PlannedJob:
    """`save_every`: the interval that can be kept up, which `notes` explain where it is not the one asked for."""

    run: RunPlan
    notes: tuple[str, ...]


def plan_job(job: Job, durations: Durations) -> PlannedJob:
    """Raises ConfigError where the job itself would, and for saves that take no time to become safe but negative."""
    if durations.protect_s < durations.commit_s:
        raise ConfigError(
            f"saves protected {durations.protect_s:g} s after the snapshot, but committed {durations.commit_s:g} s "
            "after it: what other nodes hold is committed by then."
        )
    notes: list[str] = []
    takes_s = durations.commit_s if job.redundancy == "none" else durations.protect_s
    every = _kept_up("non-persistent", job.save_every, job.stall_s, takes_s, job, notes)
    persist = _kept_up("persistent", job.persist_every, job.persist_stall_s, durations.persist_s, job, notes)
    table = Timetable(job.steps, job.step_s, every, job.stall_s, persist, job.persist_stall_s)
    node_of = [rank // job.ranks_per_node for rank in range(job.ranks)]
    exposure = None
    if job.redundancy != "none" and job.nodes > 1:
        names = [f"node{node:05d}" for node in node_of]
        domains = {name: f"rack{node // job.nodes_per_rack:05d}" for name, node in zip(names, node_of, strict=True)}
        topology = make_topology(
            job.ranks,
            names,
            jump=job.jump,
            factor=job.factor,
            domains=domains if job.racks_apart else None,
            restart=False,
        )
        notes += topology.notes
        exposure = exposure_of(topology, node_of, SCHEMES[job.redundancy])
    return PlannedJob(RunPlan(table, durations, exposure, job.keep_last), tuple(notes))


def _kept_up(kind: str, every: int | None, stall_s: float, takes_s: float, job: Job, notes: list[str]) -> int | None:
    """The interval, or the multiple of it that saves come to when each takes longer than they are apart.

    The background lane works on one save at a time, so that others find no room and are skipped meanwhile.
    """
    if every is None:
        return None
    apart_s = every * job.step_s + stall_s
    times = max(1, math.ceil(takes_s / apart_s - 1e-9))
    if times > 1:
        notes.append(
            f"a {kind} save takes {takes_s:.3g} s in the background, but they are {apart_s:.3g} s apart: "
            f"only every {times}. one is made"
        )
    return every * times
