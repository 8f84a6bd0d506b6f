"""Which measures of the peers there are: each has to show first that it can do them, in processes of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.crew import Crew, CrewError
from benchmarks.peers import Peer
from benchmarks.peers_env import peer_python
from benchmarks.settings import QUICK, Settings
from resilience.runtime.memory import available_bytes
from resilience.stores.filesystem import PosixFileSystem

__all__ = ["Tries", "peer_turns", "usable_peers"]

#: What saves, NVRx's and the peers' processes held together at most, of both ranks. Without a check the kernel ends
#: processes, and not always ours.
_MOST_SHARDS_HELD: Final = 80


def peer_turns(
    crews: ExitStack, peers: Sequence[Peer], settings: Settings, directory: Path, say: Callable[[str], None]
) -> list[tuple[Crew, str]]:
    """Of the peers that can be had and did save a small state; each other one is named with its reason.

    They share their processes: one half of the state for each of them would be much memory.
    """
    tries = Tries("peers", {peer: peer.measures for peer in peers}, QUICK, lambda peer: directory / peer.module)
    pythons = usable_peers(tries, _MOST_SHARDS_HELD * settings.shard_bytes, directory, say)
    if not pythons:
        return []
    options = {"peers": [peer.module for peer in pythons]}
    python = next(iter(pythons.values()))  # all stand in one environment
    crew = crews.enter_context(Crew("peers", settings, directory / "peers", python=python, options=options))
    return [(crew, measure) for peer in pythons for measure in peer.measures]


def usable_peers(tries: Tries, needed: int, directory: Path, say: Callable[[str], None]) -> dict[Peer, str]:
    """The interpreters of those that can be had and did what is asked of them once, each in processes of its own.

    Each other one is named with its reason; all of them where `needed` bytes of memory are not free.
    """
    free = _free_bytes(directory)
    if free is not None and free < needed:
        names = ", ".join(each.name for each in tries.measures)
        say(f"{names} are not compared: {free:,} bytes are free, {needed:,} needed")
        return {}
    pythons: dict[Peer, str] = {}
    for peer in tries.measures:
        python, reason = peer_python(peer)
        reason = reason or tries.why_not(peer, python)
        if reason:
            say(f"{peer.name} is not compared: {reason}")
        else:
            pythons[peer] = python
    return pythons


@dataclass(frozen=True)
class Tries:
    """What each peer is asked to do by a crew of `role`, with a state of which size, and where."""

    role: str
    measures: Mapping[Peer, Sequence[str]]
    settings: Settings
    where: Callable[[Peer], Path]

    def why_not(self, peer: Peer, python: str) -> str:
        """What it said last if one of its measures cannot be taken, or "". A hang or a crash takes nobody along."""
        options = {"peers": [peer.module]}
        try:
            with Crew(self.role, self.settings, self.where(peer), python=python, options=options) as crew:
                for measure in self.measures[peer]:
                    crew.ask(measure)
        except CrewError as error:
            return str(error).splitlines()[-1]
        return ""


def _free_bytes(directory: Path) -> int | None:
    return available_bytes(directory, directory, PosixFileSystem())["memory"]
