"""A drill told as it happens: one line per thing that happened, for a terminal or a log file."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TextIO

from rich.console import Console
from rich.text import Text

_STYLES = {
    "fault": "bold red",
    "recover": "bold cyan",
    "passed": "bold green",
    "failed": "bold red",
    "attempt": "bold",
    "reference": "bold",
}


class Story:
    """`tell("fault", "…")` writes a line with the seconds since the beginning."""

    def __init__(self, stream: TextIO, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._console = Console(file=stream, highlight=False, soft_wrap=True)
        self._monotonic = monotonic
        self._began = monotonic()

    def tell(self, who: str, sentence: str) -> None:
        line = Text(f"{self._monotonic() - self._began:7.1f} s  ", style="dim")
        line.append(f"{who:<10}", style=_STYLES.get(who, "dim"))
        line.append(" " + sentence, style=_STYLES.get(who, "") if who in ("passed", "failed") else "")
        self._console.print(line)

    def quote(self, lines: list[str]) -> None:
        """What a process said, indented."""
        for line in lines:
            self._console.print(Text(" " * 21 + "│ " + line, style="dim"))
