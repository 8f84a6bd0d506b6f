"""What importing this package adds to importing torch, in new processes, and whether it warns."""

from __future__ import annotations

import subprocess
import sys
from collections import defaultdict
from typing import Final

from benchmarks.crew import REPOSITORY

__all__ = ["import_seconds"]

#: What a user types, by name; each runs after `import torch` in a process of its own.
_STATEMENTS: Final = {
    "torch": "pass",
    "resilience": "import resilience",
    "names": "from resilience import CheckpointConfig, ResiliencyConfig, ResilientTrainer",
}
_PROGRAM: Final = """
import time
began = time.perf_counter()
import torch
{statement}
print(time.perf_counter() - began)
"""


def import_seconds(repeat: int) -> tuple[dict[str, list[float]], list[str]]:
    """Seconds by name, one of each per round; and what was said on standard error (warnings count as errors)."""
    seconds: dict[str, list[float]] = defaultdict(list)
    said: list[str] = []
    for attempt in range(repeat + 1):
        for name, statement in _STATEMENTS.items():
            command = [sys.executable, "-W", "always", "-c", _PROGRAM.format(statement=statement)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, cwd=REPOSITORY)
            if attempt:  # the first round fills the disk cache
                seconds[name].append(float(done.stdout.split()[-1]))
            if name != "torch" and done.stderr.strip():
                said.append(done.stderr.strip())
    return dict(seconds), said
