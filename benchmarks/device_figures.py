"""Snapshots of a device's memory: which measures are taken, and what is told of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import torch

from benchmarks.crew import Crew
from benchmarks.figures import Figure, Goal
from benchmarks.series import Series, as_series, note
from benchmarks.settings import Settings

__all__ = ["device_figures", "measure_device"]

_ORDER: Final = (
    "cross", "eager_large", "overlapped_large", "torch_save", "eager_small", "overlapped_small", "dcp_save", "loops",
    "dcp_async",
)  # fmt: skip
_BUSY: Final = 8.0  # a step takes so many times as long as the crossing: hashing is slower than the bus
_TIMES: Final = 8  # as many bytes as the other parts have


def measure_device(
    settings: Settings, directory: Path, say: Callable[[str], None], device: str = ""
) -> dict[str, Series]:
    """Seconds by measure; nothing where there is no device."""
    device = device or ("cuda" if torch.cuda.is_available() else "")
    if not device:
        say("device: left out, there is no CUDA device here")
        return {}
    options = {"device": device, "times": _TIMES if device == "cuda" else 1, "busy": _BUSY}
    found: dict[str, list[float]] = defaultdict(list)
    with Crew("device", settings, directory / "device", size=1, options=options) as crew:
        for number in range(-1, min(settings.rounds, 7)):
            say(f"device: round {number + 1}" if number >= 0 else "device: warm-up")
            turn = number % len(_ORDER)
            for measure in _ORDER[turn:] + _ORDER[:turn]:
                note(found if number >= 0 else defaultdict(list), measure, crew.ask(measure))
    return as_series(found)


def device_figures(found: Mapping[str, Series]) -> list[Figure]:
    """`found`: as `measure_device` gives it."""
    if not found:
        return []
    cross, bare = found["cross"], found["loops.loop_bare"]
    overlapped = found["overlapped_large.stall"] + found["overlapped_large.join"]
    figures = []
    for shape, words, goal in (("large", "192 large tensors", 0.03), ("small", "5,001 small tensors", None)):
        eager, stall = found[f"eager_{shape}.stall"], found[f"overlapped_{shape}.stall"]
        join = found[f"overlapped_{shape}.join"]
        figures += [
            Figure(f"device_eager_{shape}", f"eager stall, {words} on the device", eager, "one crossing", cross,
                   eager / cross),
            Figure(f"device_overlapped_{shape}", f"overlapped stall, join included, {words}", stall + join,
                   "one crossing", cross, (stall + join) / cross, None if goal is None else Goal("at most", goal)),
        ]  # fmt: skip
    for mode, goal in (("eager", None), ("overlapped", 1.03)):
        loop = found[f"loops.loop_{mode}"]
        figures.append(
            Figure(f"device_loop_{mode}", f"a save at every step, {mode}: the loop", loop, "the loop without saves",
                   bare, loop / bare, None if goal is None else Goal("at most", goal))
        )  # fmt: skip
    for name, words, base in (
        ("torch_save", "torch.save", found["torch_save"]),
        ("dcp_save", "DCP save", found["dcp_save"]),
        ("dcp_async", "DCP async_save, stall", found["dcp_async.stall"]),
    ):
        figures.append(
            Figure(f"device_{name}", "overlapped stall, times shorter than", overlapped, words, base,
                   base / overlapped, Goal("at least", 10.0), more_is_better=True)
        )  # fmt: skip
    return figures
