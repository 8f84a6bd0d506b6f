"""Which measures of the peers there are: each peer has processes of its own and has to show first that it can save."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.crew import Crew, CrewError
from benchmarks.peers import Peer
from benchmarks.peers_env import peer_python
from benchmarks.settings import Settings

__all__ = ["peer_turns"]

Turn = tuple[Crew, str]


def peer_turns(
    crews: ExitStack, peers: Sequence[Peer], settings: Settings, directory: Path, say: Callable[[str], None]
) -> list[Turn]:
    """Of the peers that can be had and whose first saves went well; each other one is named with its reason."""
    turns: list[Turn] = []
    for peer in peers:
        python, reason = peer_python(peer)
        try:
            turns += _tried_turns(crews, peer, python, settings, directory) if python else []
        except CrewError as error:
            reason = str(error).splitlines()[-1]
        if reason:
            say(f"{peer.name} is not compared: {reason}")
    return turns


def _tried_turns(crews: ExitStack, peer: Peer, python: str, settings: Settings, directory: Path) -> list[Turn]:
    """Raises CrewError, with its processes ended, if one of its measures cannot be taken."""
    with ExitStack() as trial:
        options = {"peer": peer.module}
        crew = trial.enter_context(Crew("peers", settings, directory / peer.module, python=python, options=options))
        for measure in peer.measures:
            crew.ask(measure)
        crews.push(trial.pop_all())
    return [(crew, measure) for measure in peer.measures]
