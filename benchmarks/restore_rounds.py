"""Restores of new processes, ours and others' in turn in every round: each is a crew of its own.

The others put back the state that is all parameters (`in_place`); ours, both. A sample is what the slowest rank took.
"""

from __future__ import annotations

import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks.crew import Crew
from benchmarks.nvrx_env import nvrx_python
from benchmarks.peers import PEERS
from benchmarks.peers_rounds import Tries, usable_peers
from benchmarks.series import Series, as_series, note, slowest
from benchmarks.settings import Settings

__all__ = ["measure_restores"]

Say = Callable[[str], None]
Samples = dict[str, dict[str, list[float]]]

_EMPTY_NODE: Final = "node1"
#: What their saves and processes hold together at most, beside what ours and NVRx's left.
_MOST_SHARDS_HELD: Final = 40


@dataclass(frozen=True)
class _Others:
    """Ways that share a crew of `role`: what each puts back from its own node, and what when one node comes empty."""

    role: str
    own: Sequence[str]
    peer: Sequence[str] = ()
    options: Mapping[str, Any] | None = None
    python: str = sys.executable

    def crew(self, settings: Settings, directory: Path) -> Crew:
        return Crew(self.role, settings, directory / self.role, options=self.options, python=self.python)

    def prepare(self, settings: Settings, directory: Path) -> None:
        with self.crew(settings, directory) as crew:
            for way in (*self.own, *self.peer):
                crew.ask(f"save_{way}")

    def measure(self, settings: Settings, directory: Path, found: Samples) -> None:
        self._load(settings, directory, self.own, found["in_place/own"])
        for way in self.peer:
            shutil.rmtree(directory / self.role / _EMPTY_NODE / way)  # which it names its folder by
        if self.peer:
            self._load(settings, directory, self.peer, found["in_place/peer"])

    def _load(self, settings: Settings, directory: Path, ways: Sequence[str], found: dict[str, list[float]]) -> None:
        with self.crew(settings, directory) as crew:
            for way in ways:
                note(found, way, crew.ask(f"load_{way}"))


def measure_restores(
    settings: Settings, directory: Path, say: Say, *, with_nvrx: bool, with_peers: bool
) -> dict[str, dict[str, Series]]:
    """By "<state>/<where>": seconds of the restore, of the limits in the same processes, and of others."""
    found: Samples = defaultdict(lambda: defaultdict(list))
    for state in ("in_place", "adam"):
        place = directory / f"restores-{state}"
        options = {"state": state}
        with Crew("restores", settings, place, options=options) as crew:
            crew.ask("prepare")
        others: list[_Others] = []
        if state == "in_place":
            others += _of_torch(settings, place)
            others += _of_nvrx(settings, place, say) if with_nvrx else []
            others += _of_peers(settings, place, say) if with_peers else []
        for number in range(settings.restores):
            for where in ("own", "peer"):
                say(f"restore: {state}, {where}, {number + 1} of {settings.restores}")
                if where == "peer":
                    shutil.rmtree(place / _EMPTY_NODE)
                for key, seconds in _one_restore(settings, place, options).items():
                    found[f"{state}/{where}"][key].append(seconds)
            for each in others:
                say(f"restore: {', '.join((*each.own, *each.peer))}, {number + 1} of {settings.restores}")
                each.measure(settings, place, found)
        shutil.rmtree(place)
    return {name: as_series(samples) for name, samples in found.items()}


def _one_restore(settings: Settings, place: Path, options: Mapping[str, Any]) -> dict[str, float]:
    with Crew("restores", settings, place, options=options) as crew:
        before = slowest(crew.ask("limits", repeat=3))
        restored = slowest(crew.ask("restore"))
        after = slowest(crew.ask("limits", repeat=3))
    return restored | {key: (before[key] + after[key]) / 2 for key in before}


def _of_torch(settings: Settings, place: Path) -> list[_Others]:
    others = _Others("putting_back", ("torch", "dcp"))
    others.prepare(settings, place)
    return [others]


def _of_nvrx(settings: Settings, place: Path, say: Say) -> list[_Others]:
    python, reason = nvrx_python()
    if reason:
        say(f"NVRx's restores are not compared: {reason}")
        return []
    others = _Others("putting_back_nvrx", ("nvrx",), ("nvrx_replicated",), python=python)
    others.prepare(settings, place)
    return [others]


def _of_peers(settings: Settings, place: Path, say: Say) -> list[_Others]:
    """Each one's try leaves its save behind, for all that follows."""
    role = "putting_back_peers"
    asked = {peer: (f"save_{peer.module}", f"load_{peer.module}") for peer in PEERS if peer.restores}
    for peer in PEERS:
        if not peer.restores:
            say(f"{peer.name}'s restores are not compared: they take its adapter for a framework")
    tries = Tries(role, asked, settings, lambda _: place / role)
    pythons = usable_peers(tries, _MOST_SHARDS_HELD * settings.shard_bytes, place, say)
    if not pythons:
        return []
    ways = [peer.module for peer in pythons]
    return [_Others(role, ways, options={"peers": ways}, python=next(iter(pythons.values())))]
