"""Metrics as a Prometheus text file, in the style of node_exporter's textfile collector: whole at any moment.

Every rank writes a file of its own beside the name that was given (`DIR/resilience.prom` becomes
`DIR/resilience-rank3.prom`), so that the ranks of a node neither overwrite each other nor wait for each other; the
collector reads them all. The format: https://prometheus.io/docs/instrumenting/exposition_formats/.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from resilience.observe.figures import Figures, Histogram

__all__ = ["PrometheusFile", "exposition", "rank_file"]

Labels = Mapping[str, str]


@dataclass(frozen=True)
class Family:
    """One metric: its samples are (suffix of the name, labels, value)."""

    name: str
    kind: Literal["gauge", "counter", "histogram"]
    help: str
    samples: tuple[tuple[str, Labels, float], ...]


class PrometheusFile:
    """An outlet of the feed. The directory is made if it is not there."""

    name = "the Prometheus file"

    def __init__(self, given: Path, node: str, rank: int, wall: Callable[[], float]) -> None:
        self.path = rank_file(given, rank)
        self._labels = {"node": node, "rank": str(rank)}
        self._wall = wall

    def write(self, events: Sequence[Mapping[str, Any]], figures: Figures) -> None:
        text = exposition(figures, self._labels, self._wall())
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.tmp")  # the collector takes only names that end in .prom
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(beside, flags, 0o644), "wb") as stream:  # the collector is another user
                stream.write(text.encode())
            os.replace(beside, self.path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise

    def close(self) -> None:
        """The last figures stay, as those of any job that ended."""


def rank_file(given: Path, rank: int) -> Path:
    """`DIR/resilience.prom` → `DIR/resilience-rank3.prom`."""
    return given.with_name(f"{given.stem}-rank{rank}{given.suffix}")


def exposition(figures: Figures, labels: Labels, now: float) -> str:
    """The whole file. Families that nothing is known of yet are left out."""
    lines: list[str] = []
    for family in _families(figures, now):
        lines.append(f"# HELP {family.name} {family.help}")
        lines.append(f"# TYPE {family.name} {family.kind}")
        for suffix, own, value in family.samples:
            named = ",".join(f'{name}="{_escaped(text)}"' for name, text in {**labels, **own}.items())
            lines.append(f"{family.name}{suffix}{{{named}}} {_number(value)}")
    return "\n".join([*lines, ""])


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


def _gauge(name: str, help_: str, value: float | None) -> Iterator[Family]:
    if value is not None:
        yield Family(f"resilience_{name}", "gauge", help_, (("", {}, value),))


def _counter(name: str, help_: str, by: Mapping[str, float], label: str = "") -> Iterator[Family]:
    if by:
        samples = tuple(("", {label: key} if label else {}, value) for key, value in by.items())
        yield Family(f"resilience_{name}_total", "counter", help_, samples)


def _histogram(name: str, help_: str, by: Mapping[str, Histogram], label: str = "") -> Iterator[Family]:
    samples: list[tuple[str, Labels, float]] = []
    for key, histogram in by.items():
        own = {label: key} if label else {}
        below = 0
        for bound, count in zip((*map(repr, histogram.bounds), "+Inf"), histogram.counts, strict=True):
            below += count
            samples.append(("_bucket", {**own, "le": bound}, below))
        samples += [("_sum", own, histogram.total), ("_count", own, histogram.count)]
    if samples:
        yield Family(f"resilience_{name}", "histogram", help_, tuple(samples))


def _families(figures: Figures, now: float) -> Iterator[Family]:
    about = {"run_id": figures.run_id, "attempt": figures.attempt, "world_size": str(figures.world_size)}
    yield Family("resilience_job_info", "gauge", "The run that this rank takes part in.", (("", about, 1),))
    yield from _gauge("updated_timestamp_seconds", "When this file was written.", now)
    yield from _gauge("generation", "Starts of the run so far; it grows by one at every restart.", figures.generation)
    yield from _gauge("iteration", "Finished iterations, over all restarts.", figures.iteration)
    yield from _gauge("last_complete_iteration", "Iteration of the newest complete save.", figures.last_complete)
    yield from _gauge(
        "last_protected_iteration", "Iteration of the newest save with every replica.", figures.last_protected
    )
    yield from _gauge(
        "last_persistent_iteration", "Iteration of the newest persistent checkpoint.", figures.last_persistent
    )
    yield from _gauge("protected", "1 unless a caution says that a failure would cost too much now.",
                      "not_protected" not in figures.cautions)  # fmt: skip
    yield from _gauge(
        "replicas_missing", "1 while the newest save lacks replicas.", "replica_missing" in figures.cautions
    )
    yield from _gauge("interval_too_long", "1 while saves are too far apart for the rate of failures.",
                      "interval_too_long" in figures.cautions)  # fmt: skip
    yield from _gauge("goodput_ratio", "Share of this process's time in which training did not wait.", figures.goodput)
    yield from _counter("saves", "Saves of this process by outcome.", figures.saves, "outcome")
    yield from _counter("replication_failures", "Times that the links to the clique broke.",
                        {"": figures.replication_failures})  # fmt: skip
    yield from _counter("copied_bytes", "Bytes copied into snapshots.", {"": figures.bytes_copied})
    yield from _counter("sent_bytes", "Bytes sent to other nodes for replicas.", {"": figures.bytes_sent})
    yield from _counter("spared_bytes", "Bytes of replicas that did not have to be sent.", {"": figures.bytes_spared})
    yield from _counter("fetched_bytes", "Bytes fetched from other nodes at the start, of the whole job.",
                        {"": figures.fetched_bytes})  # fmt: skip
    yield from _counter("resumes", "Starts of this process by the tier resumed from; none: afresh.",
                        figures.resumed_from, "tier")  # fmt: skip
    yield from _gauge("restore_seconds", "Seconds that the restore of this start took.", figures.restore_s)
    yield from _histogram("save_stall_seconds", "Seconds that training waited for a save.", {"": figures.stall})
    yield from _histogram("commit_seconds", "Seconds to this rank's copy being committed.", figures.commit, "tier")
    yield from _histogram("protect_seconds", "Seconds to this rank's replicas being committed.", {"": figures.protect})
