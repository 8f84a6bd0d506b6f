"""One line at the foot of the terminal: how far training is, what is safe, and what saving costs.

rich draws it below whatever else is printed: while it is shown, what this process prints goes through rich and appears
above it. It is gone when training ends.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from resilience.observe.figures import Figures
from resilience.observe.phrases import human_seconds

__all__ = ["ProgressLine", "progress_text"]

_WORDS: Final = {
    "not_protected": "NOT PROTECTED",
    "replica_missing": "REPLICAS MISSING",
    "interval_too_long": "SAVES TOO RARE",
}


class ProgressLine:
    """An outlet of the feed; appears with the first finished iteration."""

    name = "the progress line"

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal
        self._live: Live | None = None

    def write(self, events: Sequence[Mapping[str, Any]], figures: Figures) -> None:
        if not figures.iteration or figures.base is None or figures.iteration == figures.base:
            return
        if self._live is None:
            console = Console(file=self._terminal, highlight=False)
            self._live = Live(
                console=console, auto_refresh=False, transient=True, redirect_stderr=True,
                redirect_stdout=sys.stdout.isatty(),  # what goes to a file stays there
            )  # fmt: skip
            self._live.start()
        self._live.update(progress_text(figures), refresh=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def progress_text(figures: Figures) -> Text:
    """`iteration 1,204 · safe 1,200 (replicated) · stall 12 ms per save · goodput 98.7 %`."""
    replicated = figures.last_protected is not None and figures.last_protected == figures.last_complete
    parts = [f"iteration {figures.iteration:,}"]
    if figures.last_complete is None:
        parts.append("nothing saved yet")
    else:
        parts.append(f"safe {figures.last_complete:,}" + (" (replicated)" if replicated else ""))
    if figures.stall.count:
        parts.append(f"stall {human_seconds(figures.stall.total / figures.stall.count)} per save")
    if figures.goodput is not None:
        parts.append(f"goodput {100 * figures.goodput:.1f} %")
    line = Text(" · ".join(parts), no_wrap=True, overflow="ellipsis")
    failed = figures.saves["failed"] + figures.saves["skipped"]
    if failed:
        line.append(f" · {failed} failed or skipped", style="yellow")
    for kind in figures.cautions:
        line.append(f" · {_WORDS.get(kind, kind)}", style="bold red")
    return line
