"""The loss that a drilled script prints, read from its output: `iteration 35  loss 3.02`, or much like it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from pathlib import Path

_LINE = re.compile(
    r"(?:iteration|iter|step)[\s:=#\[]{0,12}(\d+).*?\bloss[\s:=]{0,12}(\d+(?:\.\d+)?(?:e[-+]?\d+)?)", re.IGNORECASE
)


class LossTail:
    """Follows log files; `poll` returns (iteration, loss) of the new whole lines that tell both, each iteration once.

    `forget` when training goes back: what it does again is told again.
    """

    def __init__(self, logs: Sequence[Path]) -> None:
        self._offsets = dict.fromkeys(logs, 0)
        self._told: set[int] = set()

    def forget(self) -> None:
        self._told.clear()

    def poll(self) -> list[tuple[int, float]]:
        found: list[tuple[int, float]] = []
        for log, offset in self._offsets.items():
            if not log.exists():
                continue
            with log.open("rb") as stream:
                stream.seek(offset)
                new = stream.read()
            whole = new.rfind(b"\n") + 1
            self._offsets[log] = offset + whole
            for line in new[:whole].decode("utf-8", "replace").splitlines():
                match = _LINE.search(line)
                if match is None or int(match[1]) in self._told or not math.isfinite(loss := float(match[2])):
                    continue
                self._told.add(int(match[1]))
                found.append((int(match[1]), loss))
        return found
