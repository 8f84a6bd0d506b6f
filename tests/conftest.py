"""What every test starts from: no settings of the machine or its launcher, quiet threads, bounded hypothesis runs."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

#: Plugins that say at the end of a run what it tried.
pytest_plugins = ["tests.hostile.summary"]

#: Variables that the code under test reads; one set on the machine must not decide what a test sees. They are dropped
#: on import, before any test module or worker process looks.
_READ_PREFIXES = ("RESILIENCE_", "SLURM_", "SLURMD_", "TORCHELASTIC_", "GROUP_", "ROLE_")
_READ_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

for _name in list(os.environ):
    if _name.startswith(_READ_PREFIXES) or _name in _READ_NAMES:
        del os.environ[_name]
os.environ.setdefault("OMP_NUM_THREADS", "1")

# No deadline: two cores are shared with other test processes, and a slow example is not a wrong one.
settings.register_profile("quick", deadline=None, max_examples=50, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("thorough", parent=settings.get_profile("quick"), max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture
def memory_mount() -> Iterator[Path]:
    """A private directory on a shared-memory mount, removed afterwards; skips where there is none."""
    mount = Path("/dev/shm")
    if not os.access(mount, os.W_OK):
        pytest.skip("this machine has no writable /dev/shm")
    directory = Path(tempfile.mkdtemp(prefix="resilience-test-", dir=mount))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The checkout's root: for tests of the files beside the package (docs, Makefile, examples)."""
    return Path(__file__).resolve().parent.parent


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How much was tried: the sums of what tests recorded under `record_property("tried: …", number)`."""
    sums: Counter[str] = Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if getattr(report, "when", "") == "call":
                sums.update({name: count for name, count in report.user_properties if name.startswith("tried: ")})
    for name, count in sorted(sums.items()):
        terminalreporter.write_line(f"{name}: {count:,}")
