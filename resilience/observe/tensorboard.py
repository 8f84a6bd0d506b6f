"""Metrics for TensorBoard, through `torch.utils.tensorboard`: rank 0's, in the run `resilience` of the directory given.

A run of its own, since TensorBoard expects one writer per directory. A restart goes on in the same run: what lies above
the iteration resumed from is purged there, as it is done again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from resilience.observe.figures import Figures

__all__ = ["TensorBoard"]

#: What is drawn at the iteration that an event names: its field, and the tag.
_OF_EVENTS: Final = {
    "snapshot": (("stall_s", "save/stall_seconds"), ("bytes", "save/bytes")),
    "committed": (("seconds", "save/commit_seconds"),),
    "protected": (("seconds", "save/protect_seconds"),),
    "resume": (("seconds", "restore/seconds"), ("retrieved_bytes", "restore/fetched_bytes")),
}


class TensorBoard:
    """An outlet of the feed. Imports torch's writer at once, so that no import falls into the training."""

    name = "TensorBoard"

    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # type: ignore[attr-defined, unused-ignore]

        self._make = SummaryWriter
        self._directory = directory / "resilience"
        self._writer: Any = None

    def write(self, events: Sequence[Mapping[str, Any]], figures: Figures) -> None:
        if figures.base is None or figures.iteration is None:
            return  # the start is not over: where to go on is not known
        if self._writer is None:
            again_from = figures.base + 1 if figures.base else None
            self._writer = self._make(str(self._directory), purge_step=again_from)
        for event in events:
            self._draw(event)
        gauges = {
            "job/goodput": figures.goodput,
            "job/last_complete_iteration": figures.last_complete,
            "job/last_protected_iteration": figures.last_protected,
            "job/last_persistent_iteration": figures.last_persistent,
            "job/cautions": len(figures.cautions),
            "save/failed": figures.saves["failed"],
            "save/skipped": figures.saves["skipped"],
        }
        for tag, value in gauges.items():
            if value is not None:
                self._writer.add_scalar(tag, value, figures.iteration)
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()

    def _draw(self, event: Mapping[str, Any]) -> None:
        for field, tag in _OF_EVENTS.get(str(event["event"]), ()):
            value = event.get(field)
            if value is not None:
                self._writer.add_scalar(tag, value, event["iteration"], walltime=float(event["t"]))
