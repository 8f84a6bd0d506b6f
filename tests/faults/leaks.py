"""What a process may have left behind: descriptors, mappings, threads, files."""

from __future__ import annotations

import gc
import os
import re
import threading
import time
from collections.abc import Iterable
from pathlib import Path

__all__ = ["Held", "stray_files"]

_ENDING_S = 20.0  # for threads that are about to end
_LEGITIMATE = re.compile(
    r"lock|complete\.json|rank_\d+-of-\d+\.(json|safetensors)|g\d+-[0-9a-f]{8}\.json|[\w.-]+\.jsonl"
    r"|resilience\.json|latest_train_state\.pt|latest_checkpointed_iteration\.txt"
)


class Held:
    """What this process holds now, to be compared with what it holds later."""

    def __init__(self, roots: Iterable[str]) -> None:
        self._roots = tuple(roots)
        self._descriptors = _descriptors()
        self._threads = set(threading.enumerate())  # another test of this process may not have ended its own

    def leaks(self) -> list[str]:
        """What is held now and was not before; mappings below the roots in any case."""
        deadline = time.monotonic() + _ENDING_S
        while self._new_threads() and time.monotonic() < deadline:
            time.sleep(0.005)
        gc.collect()
        new = {fd: what for fd, what in _descriptors().items() if self._descriptors.get(fd) != what}
        mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if self._ours(line)]
        found = [f"descriptor {fd}: {what}" for fd, what in new.items()]
        return found + [f"mapping {line}" for line in mapped] + [f"thread {name}" for name in self._new_threads()]

    def _new_threads(self) -> list[str]:
        there = [each for each in threading.enumerate() if each not in self._threads]
        return sorted(each.name for each in there if each.name.startswith("resilience"))

    def _ours(self, line: str) -> bool:
        return any(root in line for root in self._roots)


def stray_files(*roots: Path) -> list[str]:
    """Files below `roots` that belong to no committed save: to be called when nothing runs there."""
    found = []
    for root in roots:
        for path in root.rglob("*"):
            inside = path.relative_to(root).parts
            if path.is_dir():
                empty = not any(path.iterdir())
                if empty and path.name not in (".arenas", "attempts"):
                    found.append(str(path))
                if path.name.startswith("."):
                    found += [] if path.name == ".arenas" else [str(path)]
            elif any(part.startswith("iter_") for part in inside) and "save" in inside:
                continue  # what is in a checkpoint's folder is listed in it, and held against that list
            elif not _LEGITIMATE.fullmatch(path.name) or (
                path.suffix == ".safetensors" and not path.with_suffix(".json").exists()
            ):
                found.append(str(path))
    return found


def _descriptors() -> dict[int, str]:
    found = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        except OSError:
            continue  # that of the listing itself
    return found
