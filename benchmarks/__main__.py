"""`python -m benchmarks --out DIR [--quick] [--only PART]…`: measure, print the table, keep the JSON.

Exits 0 when all that was asked for was measured, whether or not goals are met: a goal missed on a busy machine is no
defect, and the table says so.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from benchmarks import figures as told
from benchmarks.device_figures import device_figures, measure_device
from benchmarks.growth_figures import growth_figures, measure_growth
from benchmarks.overlap_figures import measure_overlap, overlap_figures
from benchmarks.persistent_figures import persistent_figures
from benchmarks.persistent_rounds import measure_persistent
from benchmarks.report import document, table, write
from benchmarks.restore_rounds import measure_restores
from benchmarks.rounds import (
    measure_boundaries,
    measure_imports,
    measure_planning,
    measure_redundancy,
    measure_saves,
)
from benchmarks.settings import FULL, QUICK, Settings

_PARTS: Final = (
    "imports",
    "planning",
    "boundaries",
    "restores",
    "redundancy",
    "persistent",
    "device",
    "overlap",
    "growth",
    "saves",
)
_MOUNT: Final = Path("/dev/shm")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    settings = QUICK if options.quick else FULL
    settings = settings if options.rounds is None else replace(settings, rounds=options.rounds)
    parts = [part for part in _PARTS if not options.only or part in options.only]
    load = os.getloadavg()
    if load[0] > 1.0 and not options.quick:
        _say(f"the machine is busy (load {load[0]:.1f}): trust ratios, not times")
    directory = Path(tempfile.mkdtemp(prefix="resilience-bench-", dir=_MOUNT if _MOUNT.is_dir() else None))
    measured: dict[str, Any] = {}
    figures: list[told.Figure] = []
    try:
        for part in parts:
            measured[part], more = _PART[part](settings, directory, options)
            figures = more + figures  # told the other way round: saves first
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    write(options.out, document(settings, figures, measured, load), figures)
    Console(width=None if sys.stdout.isatty() else 160).print(table(figures))
    _say(f"kept in {options.out}/figures.json")
    return 0


def _imports(settings: Settings, directory: Path, options: argparse.Namespace) -> tuple[Any, list[told.Figure]]:
    found, said = measure_imports(settings, _say)
    return found, told.import_figures(found, said)


def _planning(settings: Settings, directory: Path, options: argparse.Namespace) -> tuple[Any, list[told.Figure]]:
    found = measure_planning(settings, _say)
    return found, told.planning_figures(found)


def _boundaries(settings: Settings, directory: Path, options: argparse.Namespace) -> tuple[Any, list[told.Figure]]:
    found = measure_boundaries(settings, directory, _say)
    return found, told.boundary_figures(found)


def _restores(settings: Settings, directory: Path, options: argparse.Namespace) -> tuple[Any, list[told.Figure]]:
    found = measure_restores(settings, directory, _say, **_others(options))
    return found, told.restore_figures(found)


def _redundancy(settings: Settings, directory: Path, options: argparse.Namespace) -> tuple[Any, list[told.Figure]]:
    found = measure_redundancy(settings, directory, _say)
    return found, told.redundancy_figures(found)


def _saves(settings: Settings, directory: Path, options: argparse.Namespace) -> tuple[Any, list[told.Figure]]:
    found = measure_saves(settings, directory, _say, **_others(options))
    return found, told.save_figures(found)


def _others(options: argparse.Namespace) -> dict[str, bool]:
    return {"with_nvrx": not options.without_nvrx, "with_peers": not options.without_peers}


def _persistent(settings: Settings, directory: Path, options: argparse.Namespace) -> tuple[Any, list[told.Figure]]:
    found = measure_persistent(settings, directory, _say)
    return found, persistent_figures(found)


def _device(settings: Settings, directory: Path, options: argparse.Namespace) -> tuple[Any, list[told.Figure]]:
    found = measure_device(settings, directory, _say)
    return found, device_figures(found)


def _overlap(settings: Settings, directory: Path, options: argparse.Namespace) -> tuple[Any, list[told.Figure]]:
    found = measure_overlap(settings, directory, _say)
    return found, overlap_figures(found)


def _growth(settings: Settings, directory: Path, options: argparse.Namespace) -> tuple[Any, list[told.Figure]]:
    found = measure_growth(settings, directory, _say)
    return found, growth_figures(found)


_Part = Callable[[Settings, Path, argparse.Namespace], tuple[Any, list[told.Figure]]]
_PART: Final[dict[str, _Part]] = {
    "imports": _imports,
    "planning": _planning,
    "boundaries": _boundaries,
    "restores": _restores,
    "redundancy": _redundancy,
    "persistent": _persistent,
    "device": _device,
    "overlap": _overlap,
    "growth": _growth,
    "saves": _saves,
}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="directory for figures.json and figures.txt")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it runs, its figures say nothing")
    parser.add_argument("--rounds", type=int, help="how often each thing is measured (default: 20, or less)")
    parser.add_argument("--only", action="append", choices=_PARTS, help="measure only this part (repeatable)")
    parser.add_argument("--without-nvrx", action="store_true", help="do not make an environment for NVRx")
    parser.add_argument("--without-peers", action="store_true", help="nor for the other packages that are compared")
    return parser.parse_args(arguments)


def _say(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
