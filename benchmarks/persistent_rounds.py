"""The order in which persistent checkpoints are measured: ours and the others in turn in every round.

What a rank's memory grows by is measured in processes of their own, where nobody else has made the heap large before.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Final

from benchmarks.crew import Crew
from benchmarks.persistent_figures import FORMATS
from benchmarks.series import Series, as_series, slowest
from benchmarks.settings import Settings

__all__ = ["measure_persistent"]

_MEASURES: Final = (
    "memcpy", "ours_torch_dist", "undigested_torch_dist", "dcp", "ours_zarr", "undigested_zarr", "zarr_own",
    "ours_fsdp_dtensor", "undigested_fsdp_dtensor", "torch", "ours_waited", "ours_async",
)  # fmt: skip


def measure_persistent(settings: Settings, directory: Path, say: Callable[[str], None]) -> dict[str, Series]:
    """Seconds (and bytes) by "<measure>.<what>"; a sample is that of the slowest rank."""
    found: dict[str, list[float]] = defaultdict(list)
    for name in FORMATS:
        say(f"persistent: memory of {name}")
        with Crew("persistent", settings, directory / f"alone-{name}", options={"alone": True}) as crew:
            _measure(crew, f"ours_{name}", found, called=f"alone_{name}")
    rounds = max(1, settings.rounds // 4)
    with Crew("persistent", settings, directory / "persistent") as crew:
        for number in range(-settings.warmups, rounds):
            say(f"persistent: round {number + 1} of {rounds}" if number >= 0 else "persistent: warm-up")
            turn = number % len(_MEASURES)
            for measure in _MEASURES[turn:] + _MEASURES[:turn]:
                _measure(crew, measure, found if number >= 0 else defaultdict(list))
    return as_series(found)


def _measure(crew: Crew, measure: str, found: dict[str, list[float]], *, called: str = "") -> None:
    for key, most in slowest(crew.ask(measure)).items():
        found[f"{called or measure}.{key}"].append(most)
