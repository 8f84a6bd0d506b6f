"""Which outlets this rank's events have beside the event file: metrics as configured, and the progress line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TextIO

from resilience.config.metrics import MetricsTarget
from resilience.observe.events import EventLog
from resilience.observe.feed import Feed, Outlet
from resilience.observe.prometheus import PrometheusFile
from resilience.runtime.clock import Clock
from resilience.runtime.threads import Threads

__all__ = ["attach_outlets"]


def attach_outlets(
    log: EventLog,
    metrics: MetricsTarget | None,
    *,
    node: str,
    rank: int,
    clock: Clock,
    threads: Threads,
    env: Mapping[str, str],
    terminal: TextIO | None,
) -> None:
    """Attach what is wanted; without any of it no thread is started. `terminal`: where a progress line would go."""
    outlets: list[Outlet] = []
    if metrics is not None:
        outlets += _METRICS[metrics.kind](metrics, node, rank, clock)
    if terminal is not None and wants_progress_line(env, terminal, rank):
        from resilience.observe.progress_line import ProgressLine

        outlets.append(ProgressLine(terminal))
    if outlets:
        log.attach(Feed(outlets, log.emit, threads))


def _prometheus(target: MetricsTarget, node: str, rank: int, clock: Clock) -> list[Outlet]:
    return [PrometheusFile(target.path, node, rank, clock.wall)]


def _tensorboard(target: MetricsTarget, node: str, rank: int, clock: Clock) -> list[Outlet]:
    if rank != 0:
        return []  # 2,048 runs in one TensorBoard help nobody
    from resilience.observe.tensorboard import TensorBoard

    return [TensorBoard(target.path)]


_METRICS: dict[str, Callable[[MetricsTarget, str, int, Clock], list[Outlet]]] = {
    "prometheus": _prometheus,
    "tensorboard": _tensorboard,
}


def wants_progress_line(env: Mapping[str, str], terminal: TextIO, rank: int) -> bool:
    """Rank 0's, where a person sees it: not in a file, not under CI, not where it was turned off."""
    if rank != 0 or env.get("RESILIENCE_PROGRESS") == "0" or env.get("CI") or env.get("TERM") == "dumb":
        return False
    try:
        return terminal.isatty()
    except ValueError:  # closed
        return False
