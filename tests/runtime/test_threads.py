"""What is registered for a process's end: called by that process alone, last in first, unless it was taken back."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

_SCRIPT = """
import os, sys
from resilience.runtime.threads import SYSTEM_THREADS, uncaught
SYSTEM_THREADS.at_exit(lambda: print("first", repr(uncaught()), flush=True))
SYSTEM_THREADS.at_exit(lambda: print("second", flush=True))
SYSTEM_THREADS.at_exit(lambda: print("third", flush=True))()
if os.fork() == 0:
    sys.exit(0)
os.wait()
{end}
"""


def said(repository: Path, end: str) -> list[str]:
    command = [sys.executable, "-c", _SCRIPT.format(end=end)]
    return subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60).stdout.splitlines()


def test_a_process_calls_what_was_registered_and_a_forked_child_does_not(repository: Path) -> None:
    assert said(repository, "") == ["second", "first None"]


def test_an_exception_that_nobody_caught_is_known_at_the_end_and_an_exit_is_none(repository: Path) -> None:
    assert said(repository, "raise ValueError('x')") == ["second", "first ValueError('x')"]
    assert said(repository, "sys.exit(3)") == ["second", "first None"]
