"""A run's figures for people (a table) and for programs (JSON)."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.figures import Figure
from benchmarks.series import Series
from benchmarks.settings import RANKS, Settings

__all__ = ["document", "table", "write"]


def document(
    settings: Settings, figures: Sequence[Figure], measured: Mapping[str, Any], load: tuple[float, float, float]
) -> dict[str, Any]:
    """All of a run. `measured`: the samples in seconds, by part and measure; `load`: of the machine, before."""
    return {
        "machine": {
            "cores": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "system": platform.platform(),
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "load_before": load,
        },
        "settings": asdict(settings) | {"ranks": RANKS, "shard_bytes": settings.shard_bytes},
        "figures": [figure.to_json() for figure in figures],
        "measured_s": _plain(measured),
    }


def write(target: Path, content: dict[str, Any], figures: Sequence[Figure]) -> None:
    """`figures.json` and `figures.txt` in `target`."""
    target.mkdir(parents=True, exist_ok=True)
    (target / "figures.json").write_text(json.dumps(content, indent=1) + "\n")
    with (target / "figures.txt").open("w") as file:
        Console(file=file, width=160).print(table(figures))


def table(figures: Sequence[Figure]) -> Table:
    """One line per figure: median and 95th percentile of ours, what it is held against, the ratio, the goal."""
    made = Table(title="Figures: median (95th percentile; of a ratio its bad end); ratios are formed round by round")
    for title, justify in (
        ("what", "left"), ("ours, ms", "right"), ("against", "left"), ("ms", "right"), ("ratio", "right"),
        ("goal", "right"), ("met", "left"),
    ):  # fmt: skip
        made.add_column(title, justify="right" if justify == "right" else "left")
    for figure in figures:
        verdict = {None: "", True: "[green]yes[/]", False: "[red]no[/]"}[figure.met]
        made.add_row(
            figure.what,
            _milliseconds(figure.ours),
            figure.against,
            _milliseconds(figure.base) if figure.base else "",
            f"{figure.ratio.median:.2f} ({figure.worse_ratio:.2f})" if figure.ratio else "",
            (str(figure.goal) + ("" if figure.ratio else " s")) if figure.goal else "",
            verdict + (f" {figure.problem}" if figure.problem else ""),
        )
    return made


def _milliseconds(series: Series) -> str:
    return f"{_short(series.median * 1e3)} ({_short(series.p95 * 1e3)})"


def _short(value: float) -> str:
    return f"{value:.3f}" if value < 1 else f"{value:.1f}" if value < 1000 else f"{value:,.0f}"


def _plain(found: Any) -> Any:
    if isinstance(found, Series):
        return found.samples
    if isinstance(found, Mapping):
        return {str(key): _plain(value) for key, value in found.items()}
    if isinstance(found, list):
        return [_plain(each) for each in found]
    return found
