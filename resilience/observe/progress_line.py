"""One line at the foot of the terminal: how far training is, what is safe, and what saving costs.

The terminal's last row is taken out of what scrolls (DECSTBM, as package managers do it), so that whatever else prints
there (the script's own prints and logs, other ranks, libraries) scrolls above it and never mixes with it. Nothing of
the process is redirected for that; rich renders the line. The row is given back when training ends.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any, Final, TextIO

from rich.console import Console
from rich.text import Text

from resilience.observe.figures import Figures
from resilience.observe.phrases import human_seconds

__all__ = ["ProgressLine", "progress_text"]

_WORDS: Final = {
    "not_protected": "NOT PROTECTED",
    "replica_missing": "REPLICAS MISSING",
    "interval_too_long": "SAVES TOO RARE",
}
_FEWEST_ROWS: Final = 4  # in a smaller terminal each row is needed
_SAVE, _RESTORE = "\x1b7", "\x1b8"  # of the cursor, which belongs to whoever else prints


class ProgressLine:
    """An outlet of the feed; appears with the first finished iteration. Follows the terminal's size."""

    name = "the progress line"

    def __init__(self, terminal: TextIO) -> None:
        self._terminal = terminal
        self._size: os.terminal_size | None = None  # for which the last row is taken

    def write(self, events: Sequence[Mapping[str, Any]], figures: Figures) -> None:
        if figures.base is None or figures.iteration in (None, figures.base):
            return
        size = os.get_terminal_size(self._terminal.fileno())
        if size.lines < _FEWEST_ROWS:
            self.close()
            return
        taking = "" if size == self._size else f"\n\x1b[A{_SAVE}\x1b[1;{size.lines - 1}r{_RESTORE}"
        self._size = size
        shown = rendered(progress_text(figures), size.columns)
        self._put(f"{taking}{_SAVE}\x1b[{size.lines};1H\x1b[2K{shown}{_RESTORE}")

    def close(self) -> None:
        if self._size is not None:
            rows, self._size = self._size.lines, None
            self._put(f"{_SAVE}\x1b[r\x1b[{rows};1H\x1b[2K{_RESTORE}")

    def _put(self, sequence: str) -> None:
        """In one write, so that nobody else's text comes between."""
        self._terminal.flush()
        os.write(self._terminal.fileno(), sequence.encode())


def rendered(text: Text, columns: int) -> str:
    """With colours, cut to the row."""
    console = Console(force_terminal=True, width=max(1, columns - 1), highlight=False, legacy_windows=False)
    with console.capture() as capture:
        console.print(text, end="", overflow="ellipsis", no_wrap=True, crop=True)
    return capture.get()


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
    line = Text(" · ".join(parts))
    failed = figures.saves["failed"] + figures.saves["skipped"]
    if failed:
        line.append(f" · {failed} failed or skipped", style="yellow")
    for kind in figures.cautions:
        line.append(f" · {_WORDS.get(kind, kind)}", style="bold red")
    return line
