"""What is told of persistent checkpoints: from the seconds and bytes of `persistent` to figures with verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from benchmarks.figures import Figure, Goal
from benchmarks.series import Series

__all__ = ["FORMATS", "persistent_figures"]

FORMATS: Final = ("torch_dist", "zarr", "fsdp_dtensor")
_GROWTH_MB: Final = 64.0


def persistent_figures(found: Mapping[str, Series]) -> list[Figure]:
    """`found`: as `persistent_rounds.measure_persistent` gives it, seconds and bytes by measure."""
    stall, memcpy = found["ours_async.stall"], found["memcpy.seconds"]
    figures = [
        Figure(
            "persistent_stall", "stall of async_save, torch_dist", stall, "memcpy", memcpy, stall / memcpy,
            Goal("at most", 1.25),
        ),
        Figure("persistent_waited", "stall of a synchronous save, snapshot to commit", found["ours_waited.stall"]),
    ]  # fmt: skip
    for name in FORMATS:
        figures.append(
            _faster(f"persistent_{name}_undigested", f"{name} save without digests, times faster than",
                    found[f"undigested_{name}.save"], "DCP", found["dcp.save"], 1.5)
        )  # fmt: skip
        for what in ("save", "load"):
            goal = 1.5 if what == "load" else None  # what digests cost is told apart
            others = ("dcp", "torch", "zarr_own") if name == "torch_dist" else ("dcp", "zarr_own")
            for other in others:
                figures.append(
                    _faster(
                        f"persistent_{name}_{what}_{other}", f"{name} {what}, times faster than",
                        found[f"ours_{name}.{what}"], _WORDS[other], found[f"{other}.{what}"],
                        goal if other == "dcp" else None,
                    )
                )  # fmt: skip
        figures.append(Figure(f"persistent_{name}_proof", f"{name}, proof before a load", found[f"ours_{name}.proof"]))
        figures += [_grows(name, what, found[f"alone_{name}.{what}_bytes"]) for what in ("save", "load")]
    return figures


_WORDS: Final = {"dcp": "DCP", "torch": "torch.save and load", "zarr_own": "zarr's own"}


def _faster(name: str, what: str, ours: Series, against: str, base: Series, at_least: float | None) -> Figure:
    goal = None if at_least is None else Goal("at least", at_least)
    return Figure(name, what, ours, against, base, base / ours, goal, more_is_better=True)


def _grows(name: str, what: str, grown: Series) -> Figure:
    """Megabytes stand in the column of the ratio."""
    ratio = grown.times(1e-6)
    return Figure(
        f"persistent_{name}_{what}_growth", f"{name} {what}, memory of a rank above its shard, MB as ratio",
        Series((0.0,)), "", None, ratio, Goal("at most", _GROWTH_MB),
    )  # fmt: skip
