"""Asking a running job from outside: `resilience request save|stop` leaves a file in the node's directory of the run.

The node's leading rank finds it, takes it away and asks at the next boundary; all ranks follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from resilience.stores.filesystem import FileSystem
from resilience.stores.node_store import NodeStore

__all__ = ["leave_request", "take_request"]

_NAMES: Final = {"stop": "request-stop", "save": "request-save"}


def leave_request(root: Path, what: str, fs: FileSystem) -> None:
    """Ask the job whose directory of the run on this node is `root`. `what`: "stop" or "save"."""
    fs.write_atomic(root / _NAMES[what], b"", durable=False)


def take_request(stores: Sequence[NodeStore], fs: FileSystem) -> str:
    """What is asked for, taken away so that it is asked once; "" nearly always, and when the disk does not answer."""
    for store in stores:
        for what, name in _NAMES.items():
            try:
                if fs.unlink(store.root / name):
                    return what
            except OSError:
                continue
    return ""
