"""Which measures are taken in which order: ours and the others in turn, in every round, so that drift hits all alike.

A sample is what the slowest rank took.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

from benchmarks.crew import Crew
from benchmarks.imports import import_seconds
from benchmarks.nvrx_env import nvrx_python
from benchmarks.peers import PEERS
from benchmarks.peers_rounds import peer_turns
from benchmarks.planning import plan_seconds
from benchmarks.series import Series, as_series, note, slowest
from benchmarks.settings import Settings

__all__ = [
    "measure_boundaries",
    "measure_imports",
    "measure_planning",
    "measure_redundancy",
    "measure_saves",
]

Say = Callable[[str], None]

_SAVES: Final = (
    "memcpy", "ours_local", "torch_save", "ours_replicated", "gloo", "hash", "dcp_save", "ours_device_bound",
    "dcp_async", "disk", "ours_in_flight", "dcp_process",
)  # fmt: skip
_NVRX: Final = (
    "nvrx_local", "drop_in_local", "nvrx_replicated", "drop_in_replicated", "nvrx_async", "drop_in_async",
)  # fmt: skip


def measure_saves(
    settings: Settings, directory: Path, say: Say, *, with_nvrx: bool, with_peers: bool
) -> dict[str, Series]:
    """Seconds by measure; `<measure>.stall` where the training thread's wait is another number."""
    with ExitStack() as crews:
        saves = crews.enter_context(Crew("saves", settings, directory / "saves"))
        order = [(saves, measure) for measure in _SAVES]
        order += _nvrx_turns(crews, settings, directory, say) if with_nvrx else []
        order += peer_turns(crews, PEERS, settings, directory, say) if with_peers else []
        found: dict[str, list[float]] = defaultdict(list)
        for number in range(-settings.warmups, settings.rounds):
            say(f"saves: round {number + 1} of {settings.rounds}" if number >= 0 else "saves: warm-up")
            turn = number % len(order)  # who follows whom changes from round to round
            for crew, measure in order[turn:] + order[:turn]:
                note(found if number >= 0 else defaultdict(list), measure, crew.ask(measure))
    return as_series(found)


def _nvrx_turns(crews: ExitStack, settings: Settings, directory: Path, say: Say) -> list[tuple[Crew, str]]:
    python, reason = nvrx_python()
    if reason:
        say(f"NVRx is not compared: {reason}")
        return []
    nvrx = crews.enter_context(Crew("nvrx", settings, directory / "nvrx", python=python))
    return [(nvrx, measure) for measure in _NVRX]


def measure_redundancy(settings: Settings, directory: Path, say: Say) -> dict[str, Series]:
    """Seconds by scheme and clique, as `benchmarks.redundancy` names them; `lanes` and the bytes of one stripe."""
    found: dict[str, list[float]] = defaultdict(list)
    with Crew("redundancy", settings, directory / "redundancy", size=4) as crew:
        order = ["replica_2", "replica_3", "xor_4", "rs_4", "lanes"]
        for number in range(-settings.warmups, settings.rounds):
            say(f"redundancy: round {number + 1} of {settings.rounds}" if number >= 0 else "redundancy: warm-up")
            turn = number % len(order)
            for measure in order[turn:] + order[:turn]:
                note(found if number >= 0 else defaultdict(list), measure, crew.ask(measure))
    return as_series(found)


def measure_boundaries(settings: Settings, directory: Path, say: Say) -> dict[int, dict[str, Series]]:
    """By number of processes: seconds per step without and with the trainer, of each boundary, and of the training
    thread's processor time in it."""
    found = {}
    blocks = 5
    steps = -(-settings.boundary_steps // blocks)
    for size in settings.boundary_processes:
        say(f"boundaries: {size} processes")
        samples: dict[str, list[float]] = defaultdict(list)
        with Crew("boundaries", settings, directory / f"boundaries-{size}", size=size) as crew:
            for block in range(-1, blocks):
                bare = slowest(crew.ask("bare", steps=steps))
                wrapped = crew.ask("wrapped", steps=steps)
                if block < 0:
                    continue
                samples["bare"].append(bare["step"])
                samples["wrapped"].append(max(each["step"] for each in wrapped))
                samples["boundary"] += _slowest_each(wrapped, "boundaries")
                samples["worked"] += _slowest_each(wrapped, "worked")
        found[size] = as_series(samples)
    return found


def measure_planning(settings: Settings, say: Say) -> dict[int, dict[str, Series]]:
    """By number of ranks: seconds to decode the records and to plan."""
    found = {}
    for ranks in settings.planning_ranks:
        say(f"planning: {ranks} ranks")
        seconds = plan_seconds(ranks)
        found[ranks] = {key: Series((seconds[key],)) for key in ("decode", "plan")}
    return found


def measure_imports(settings: Settings, say: Say) -> tuple[dict[str, Series], list[str]]:
    """Seconds by what is imported, and what that said on standard error."""
    say("imports")
    seconds, said = import_seconds(settings.imports)
    return as_series(seconds), said


def _slowest_each(answers: Iterable[Mapping[str, Any]], key: str) -> list[float]:
    """Of each of the things that all ranks measured one after the other, what the slowest took."""
    return [max(each) for each in zip(*(answer[key] for answer in answers), strict=True)]
