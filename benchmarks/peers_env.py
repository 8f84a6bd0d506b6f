"""The environment for the peers, apart from ours: none of them may change what our own tests and users run with."""

from __future__ import annotations

from pathlib import Path

from benchmarks.crew import REPOSITORY
from benchmarks.environments import python_with
from benchmarks.peers import Peer

__all__ = ["peer_python"]


def peer_python(peer: Peer, home: Path = REPOSITORY / ".venv-peers") -> tuple[str, str]:
    """`(interpreter, "")`; `("", reason)` if this peer cannot be had, whatever is true of the others beside it."""
    packages = [f"{peer.name}=={peer.version}", *peer.beside]
    probe = f"import importlib.metadata as m, {peer.module}; assert m.version({peer.name!r}) == {peer.version!r}"
    return python_with(home, packages, probe, peer.pip_options)
