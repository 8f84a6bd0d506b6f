"""Overlapped snapshots: which measures are taken in which order, and what is told of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.crew import Crew
from benchmarks.figures import Figure, Goal
from benchmarks.series import Series, as_series, note
from benchmarks.settings import QUICK, Settings

__all__ = ["measure_overlap", "overlap_figures"]

_LIMITS: Final = ("memcpy", "gloo", "hash")
_MODES: Final = ("eager", "overlapped")
#: Small tensors, or none, and whether each rank stores all that it has. Of 1,667 with Adam's moments there are 5,001.
_SHAPES: Final = {"large": (0, False), "small": (1667, True), "halves": (3334, False)}
_QUICK: Final = {"large": (0, False)}
_LOOPS: Final = [(kind, mode) for kind in ("device", "cpu") for mode in ("bare", *_MODES)]
_PAIRS: Final = 7
_STEPS: Final = 12  # of a loop


def measure_overlap(settings: Settings, directory: Path, say: Callable[[str], None]) -> dict[str, Series]:
    """Seconds by measure: `<mode>_<shape>`, `loop_<kind>_<mode>` and, in saves, `skipped_<kind>_<mode>`; the limits'
    as `<limit>_<shape>`."""
    found: dict[str, list[float]] = defaultdict(list)
    quick = settings.layers == QUICK.layers
    for shape, (small, whole) in (_QUICK if quick else _SHAPES).items():
        options = {"small": small, "whole": whole}
        with Crew("overlap", settings, directory / f"overlap-{shape}", options=options) as crew:
            for number in range(-1, min(settings.rounds, 11)):
                say(f"overlap: {shape}, round {number + 1}" if number >= 0 else f"overlap: {shape}, warm-up")
                pause_s = 0.01 if quick else 4 * median(found["memcpy_large"] or [0.05])
                order = [*_LIMITS, *_MODES]
                turn = number % len(order)
                for measure in order[turn:] + order[:turn]:
                    given: dict[str, Any] = {} if measure in _LIMITS else {"mode": measure, "pause_s": pause_s}
                    answers = crew.ask(measure if measure in _LIMITS else "stall", **given)
                    note(found if number >= 0 else defaultdict(list), f"{measure}_{shape}", answers)
            if shape == "large":
                _loops(found, crew, settings, quick, say)
    return as_series(found)


def _loops(
    found: dict[str, list[float]], crew: Crew, settings: Settings, quick: bool, say: Callable[[str], None]
) -> None:
    # long enough to copy, hash and send in, with as much again to spare
    step_s = 0.02 if quick else 2 * sum(median(found[f"{limit}_large"]) for limit in _LIMITS)
    for number in range(-1, min(settings.rounds, _PAIRS)):
        say(f"overlap: loops, {number + 1} of {_PAIRS}" if number >= 0 else "overlap: loops, warm-up")
        turn = number % len(_LOOPS)
        for kind, mode in _LOOPS[turn:] + _LOOPS[:turn]:
            answers = crew.ask("loop", mode=mode, kind=kind, step_s=step_s, steps=_STEPS)
            skipped = [{"seconds": each.pop("skipped")} for each in answers]
            into = found if number >= 0 else defaultdict(list)
            note(into, f"loop_{kind}_{mode}", answers)
            note(into, f"skipped_{kind}_{mode}", skipped)


def overlap_figures(found: Mapping[str, Series]) -> list[Figure]:
    """`found`: as `measure_overlap` gives it."""
    figures = []
    for mode, shape, words, goal in (
        ("overlapped", "large", "overlapped stall, join included, 96 tensors of 2.7 MB", 0.03),
        ("overlapped", "small", "overlapped stall, join included, 5,001 tensors of 51 KB", None),
        ("overlapped", "halves", "overlapped stall, join included, 5,001 of 10,002 tensors of 51 KB", None),
        ("eager", "large", "eager stall, 96 tensors of 2.7 MB", 1.05),
        ("eager", "small", "eager stall, 5,001 tensors of 51 KB", 1.15),
        ("eager", "halves", "eager stall, 5,001 of 10,002 tensors of 51 KB", None),
    ):
        if f"{mode}_{shape}" not in found:
            continue
        stall, memcpy = found[f"{mode}_{shape}"], found[f"memcpy_{shape}"]
        bound = None if goal is None else Goal("at most", goal)
        figures.append(Figure(f"{mode}_{shape}", words, stall, "memcpy", memcpy, stall / memcpy, bound))
    for kind, words, goal in (("device", "device-bound", 1.03), ("cpu", "CPU-bound", None)):
        for mode in ("eager", "overlapped"):
            loop, bare = found[f"loop_{kind}_{mode}"], found[f"loop_{kind}_bare"]
            skipped = int(sum(found[f"skipped_{kind}_{mode}"].samples))
            bound = Goal("at most", goal) if goal is not None and mode == "overlapped" else None
            figures.append(
                Figure(f"loop_{kind}_{mode}", f"replicated save at every step, {words}, {mode}", loop,
                       "the loop without saves", bare, loop / bare, bound,
                       problem=f"{skipped} saves were skipped" if skipped and kind == "device" else "")
            )  # fmt: skip
    figures += [_overhead(found, mode) for mode in _MODES]
    return figures


def _overhead(found: Mapping[str, Series], mode: str) -> Figure:
    """What a save adds to a CPU-bound step, against the work that it is: both cores are busy with it."""
    added = (found[f"loop_cpu_{mode}"] + found["loop_cpu_bare"].times(-1)).times(1 / _STEPS)
    memcpy, digests, gloo = (found[f"{limit}_large"] for limit in ("memcpy", "hash", "gloo"))
    rounds = min(len(added.samples), len(gloo.samples))
    least = Series((memcpy + digests.times(2) + gloo).samples[:rounds])
    added = Series(added.samples[:rounds])
    words = f"what a replicated save adds to a CPU-bound step, {mode}"
    return Figure(
        f"overhead_cpu_{mode}", words, added, "memcpy + hash of two shards + gloo", least, added / least,
        Goal("at most", 1.15) if mode == "overlapped" else None,
    )  # fmt: skip
