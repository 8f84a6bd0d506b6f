"""Which measures of the peers there are: each has to show first that it can save, in processes of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from benchmarks.crew import Crew, CrewError
from benchmarks.peers import Peer
from benchmarks.peers_env import peer_python
from benchmarks.settings import QUICK, Settings
from resilience.runtime.memory import available_bytes
from resilience.stores.filesystem import PosixFileSystem

__all__ = ["peer_turns"]

#: What saves, NVRx's and the peers' processes held together at most, of both ranks. Without a check the kernel ends
#: processes, and not always ours.
_MOST_SHARDS_HELD: Final = 80


def peer_turns(
    crews: ExitStack, peers: Sequence[Peer], settings: Settings, directory: Path, say: Callable[[str], None]
) -> list[tuple[Crew, str]]:
    """Of the peers that can be had and did save a small state; each other one is named with its reason.

    They share their processes: one half of the state for each of them would be much memory.
    """
    needed, free = _MOST_SHARDS_HELD * settings.shard_bytes, _free_bytes(directory)
    if free is not None and free < needed:
        say(f"{', '.join(each.name for each in peers)} are not compared: {free:,} bytes are free, {needed:,} needed")
        return []
    pythons: dict[Peer, str] = {}
    for peer in peers:
        python, reason = peer_python(peer)
        reason = reason or _why_not(peer, python, directory / peer.module)
        if reason:
            say(f"{peer.name} is not compared: {reason}")
        else:
            pythons[peer] = python
    if not pythons:
        return []
    options = {"peers": [peer.module for peer in pythons]}
    python = next(iter(pythons.values()))  # all stand in one environment
    crew = crews.enter_context(Crew("peers", settings, directory / "peers", python=python, options=options))
    return [(crew, measure) for peer in pythons for measure in peer.measures]


def _why_not(peer: Peer, python: str, directory: Path) -> str:
    """What it said last if one of its measures cannot be taken, or "". A hang or a crash takes nobody along."""
    try:
        with Crew("peers", QUICK, directory, python=python, options={"peers": [peer.module]}) as crew:
            for measure in peer.measures:
                crew.ask(measure)
    except CrewError as error:
        return str(error).splitlines()[-1]
    return ""


def _free_bytes(directory: Path) -> int | None:
    return available_bytes(directory, directory, PosixFileSystem())["memory"]
