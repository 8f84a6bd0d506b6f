"""Looks at the processes and directories of a drill while it runs: what do they take, now and then?"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from resilience.drill.flatness import DirectorySample, ProcessSample
from resilience.drill.nodes import BALLAST
from resilience.drill.progress import RankProgress
from resilience.runtime.clock import Clock

__all__ = ["Sampler"]

_ATTEMPTS = "attempts"


class Sampler:
    """A `Watch` that samples until `seconds` have passed since training began: a slow start is no soak.

    `directories`: what the job keeps; asked anew each time, since nodes come and go.
    """

    def __init__(
        self,
        clock: Clock,
        seconds: float,
        directories: Callable[[], Iterable[Path]],
        *,
        processes_every_s: float = 0.25,
        directories_every_s: float = 2.0,
    ) -> None:
        self._clock = clock
        self._seconds = seconds
        self._until: float | None = None
        self._directories_of = directories
        self._processes_every_s = max(processes_every_s, seconds / 10_000)  # so that an hour, or a week, is bounded too
        self._directories_every_s = max(directories_every_s, seconds / 2_000)
        self._processes_at = self._directories_at = clock.now()
        self._iteration = 0
        self.processes: list[ProcessSample] = []
        self.directories: list[DirectorySample] = []

    def look(self, ranks: Mapping[int, RankProgress]) -> None:
        now = self._clock.now()
        if self._until is None and any(state.iteration for state in ranks.values()):
            self._until = now + self._seconds
        if now >= self._processes_at:
            self._processes_at = now + self._processes_every_s
            found = (_process(now, rank, state) for rank, state in ranks.items())
            self.processes += [sample for sample in found if sample is not None]
        if now >= self._directories_at:
            self._directories_at = now + self._directories_every_s
            self._iteration = max(self._iteration, *(state.iteration for state in ranks.values()), 0)
            self.directories.append(_kept(now, self._iteration, self._directories_of()))

    def write(self, path: Path) -> None:
        """All samples as JSON Lines, for whoever wants to plot them."""
        with path.open("w", encoding="ascii") as stream:
            for sample in (*self.processes, *self.directories):
                stream.write(json.dumps(vars(sample)) + "\n")

    def over(self) -> bool:
        return self._until is not None and self._clock.now() >= self._until


def _process(now: float, rank: int, state: RankProgress) -> ProcessSample | None:
    """None: it has ended, or does not train yet."""
    if not state.iteration:
        return None
    try:
        status = Path(f"/proc/{state.pid}/status").read_text(encoding="utf-8", errors="replace")
        descriptors = len(os.listdir(f"/proc/{state.pid}/fd"))
    except OSError:
        return None
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    if "RssAnon" not in fields:
        return None  # a process that is being reaped has no memory to tell of
    memory = int(fields["RssAnon"].split()[0]) * 1024
    return ProcessSample(now, rank, state.pid, state.iteration, memory, descriptors, int(fields["Threads"]))


def _kept(now: float, iteration: int, directories: Iterable[Path]) -> DirectorySample:
    total = files = 0
    for directory in directories:
        for place, folders, names in os.walk(directory):
            if _ATTEMPTS in folders:
                folders.remove(_ATTEMPTS)
            for name in names:
                if name == BALLAST:
                    continue  # the drill's own
                try:
                    total += os.lstat(os.path.join(place, name)).st_blocks * 512
                except OSError:
                    continue  # deleted meanwhile
                files += 1
    return DirectorySample(now, iteration, total, files)
