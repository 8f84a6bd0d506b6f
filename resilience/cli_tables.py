"""How answers look on a terminal: a table where there are rows, one line per fact elsewhere.

Into a pipe or a file nothing is coloured, folded or cut, so that `grep` and `cut` find what they look for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.table import Table
from rich.text import Text

__all__ = ["console_for", "rows", "say", "show_plainly", "size", "table"]

_PIPE_WIDTH = 10_000


def console_for(stream: TextIO) -> Console:
    """A console on a terminal's width, or a very wide one without colours for a pipe."""
    if stream.isatty():
        return Console(file=stream, highlight=False)
    return Console(file=stream, highlight=False, width=_PIPE_WIDTH, no_color=True)


def table(console: Console, columns: Sequence[str], values: Iterable[Sequence[object]], *, right: str = "") -> None:
    """Print rows under a heading; `right` names the columns of numbers."""
    console.print(rows(columns, values, right=right))


def rows(columns: Sequence[str], values: Iterable[Sequence[object]], *, right: str = "") -> Table:
    """Rows under a heading, to be printed; without any heading if all names are empty."""
    shown = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0), show_header=any(columns))
    numbers = right.split()
    for column in columns:
        shown.add_column(column, justify="right" if column in numbers else "left", overflow="fold")
    for row in values:
        # Text, not markup: names and reasons may hold brackets
        shown.add_row(*(Text(_text(value)) for value in row))
    return shown


def say(console: Console, line: str, style: str = "") -> None:
    """One line as it is."""
    console.print(Text(line, style=style), soft_wrap=True)


def size(nbytes: int | None) -> str:
    """`1.5 GiB`."""
    if nbytes is None:
        return "?"
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{nbytes} B" if unit == "B" else f"{value:.1f} {unit}"


def show_plainly(document: Mapping[str, Any], console: Console) -> None:
    """For answers without a form of their own: facts first, then each list of objects as a table."""
    facts = {key: value for key, value in document.items() if not _is_rows(value)}
    if facts:
        table(console, ("", ""), facts.items())
    for key, value in document.items():
        if _is_rows(value):
            say(console, f"\n{key}", "bold")
            columns = list(dict.fromkeys(column for row in value for column in row))
            table(console, columns, [[row.get(column) for column in columns] for row in value])


def _is_rows(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_text(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value)) or "-"
    return str(value)
