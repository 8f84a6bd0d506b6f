"""How old a process is, imports included."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from resilience.runtime import process_age
from resilience.runtime.process_age import process_age_s


def test_a_process_is_as_old_as_since_it_was_made() -> None:
    code = (
        "import time; began = time.monotonic(); time.sleep(0.5)\n"
        "from resilience.runtime.process_age import process_age_s\n"
        "print(process_age_s(), time.monotonic() - began)"
    )
    before = time.monotonic()
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    outside = time.monotonic() - before
    age, inside = map(float, told.split())
    assert inside - 0.05 <= age <= outside + 0.05, "clock ticks are hundredths of a second"


def test_where_the_kernel_does_not_tell_nothing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(process_age, "Path", lambda name: tmp_path / "missing")
    assert process_age_s() is None
    (tmp_path / "missing").write_bytes(b"1 (odd) name) R 1 2")
    assert process_age_s() is None
