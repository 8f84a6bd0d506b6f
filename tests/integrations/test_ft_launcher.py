"""Under the real `ft_launcher` of NVIDIA's extension: a rank that stands still is found, and the job goes on."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.nvrx_env import nvrx_python
from resilience.observe.events import scan_events
from resilience.runtime.clock import SystemClock
from resilience.runtime.launcher_reports import LauncherReports
from tests.integrations.ft_launcher_job import STEPS, STILL_AT

BOUND_S = 240


@pytest.fixture(scope="module")
def launcher(repository: Path) -> list[str]:
    """The command that starts it, in its own environment."""
    python, problem = nvrx_python(repository / ".venv-nvrx", beside=("defusedxml==0.7.1",))
    if not python:
        pytest.skip(f"NVRx cannot be had here: {problem}")
    return [python, "-W", "ignore", str(Path(python).with_name("ft_launcher"))]


def launch(launcher: list[str], repository: Path, root: Path, limits: str, how: str) -> str:
    """Until the job is over; what it said."""
    (root / "limits.yaml").write_text(f"fault_tolerance:\n  workload_check_interval: 1\n{limits}")
    command = [
        *launcher, "--nproc-per-node", "2", "--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
        "--max-restarts", "2", "--monitor-interval", "1", "--fault-tol-cfg-path", str(root / "limits.yaml"),
        str(repository / "tests" / "integrations" / "ft_launcher_job.py"), str(root), how,
    ]  # fmt: skip
    env = {
        **os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
    }  # fmt: skip
    job = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0
    )
    try:
        said, _ = job.communicate(timeout=BOUND_S)
    except subprocess.TimeoutExpired:
        os.killpg(job.pid, signal.SIGKILL)
        said, _ = job.communicate()
        pytest.fail(f"it was still running after {BOUND_S} s:\n{said[-4000:]}")
    assert job.returncode == 0, said[-4000:]
    return said


@pytest.fixture(scope="module")
def undisturbed(launcher: list[str], repository: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The ranks' digests at the end of a run in which nobody stands still."""
    root = tmp_path_factory.mktemp("undisturbed")
    launch(launcher, repository, root, "  rank_heartbeat_timeout: 60\n", "go on")
    return [(root / f"end-{rank}").read_text().split()[0] for rank in range(2)]


LIMITS = {
    "by its heartbeats": "  initial_rank_heartbeat_timeout: 60\n  rank_heartbeat_timeout: 8\n",
    "by its sections": "  initial_rank_heartbeat_timeout: null\n  rank_heartbeat_timeout: null\n"
    "  rank_section_timeouts:\n    setup: 60\n    step: 8\n    checkpointing: 30\n",
}


@pytest.mark.long
@pytest.mark.timeout(3 * BOUND_S)
@pytest.mark.parametrize("how", LIMITS)
def test_ft_launcher_finds_a_rank_that_stands_still_and_the_job_goes_on_to_the_same_bits(
    launcher: list[str], repository: Path, tmp_path: Path, undisturbed: list[str], how: str
) -> None:
    said = launch(launcher, repository, tmp_path, LIMITS[how], "stand-still")
    assert "the launcher hears of this rank no more" not in said
    ends = [(tmp_path / f"end-{rank}").read_text().split() for rank in range(2)]
    assert [digest for digest, _ in ends] == undisturbed
    assert [resumed for _, resumed in ends] == [str(STILL_AT - 1)] * 2
    events = scan_events([tmp_path / "events"]).events
    assert sum(event["event"] == "start" and event["rank"] == 0 for event in events) == 2
    assert any(event["event"] == "finished" and event["iteration"] == STEPS for event in events)


# -- without it -------------------------------------------------------------------------------------------------------


class Heard:
    """A launcher that notes what it hears; breaks when told to."""

    def __init__(self) -> None:
        self.said: list[str] = []
        self.broken = False

    def _hear(self, what: str) -> None:
        if self.broken:
            raise OSError("the monitor is gone")
        self.said.append(what)

    def heartbeat(self) -> None:
        self._hear("heartbeat")

    def begin(self, section: str) -> None:
        self._hear(f"begin {section}")

    def end(self, section: str) -> None:
        self._hear(f"end {section}")

    def close(self) -> None:
        self._hear("close")


class Clock(SystemClock):
    at = 0.0

    def now(self) -> float:
        return self.at


def test_quick_steps_are_one_section_for_a_second_and_a_save_is_one_of_its_own() -> None:
    heard, clock = Heard(), Clock()
    reports = LauncherReports(heard, clock, lambda *_, **__: None)
    for _ in range(10):
        reports.step()
        clock.at += 0.3
    reports.saving()
    reports.saving()
    reports.step()
    reports.close()
    reports.step()
    begun = [what for what in heard.said if what.startswith("begin")]
    assert begun == ["begin setup", "begin step", "begin step", "begin step", "begin checkpointing", "begin step"]
    assert [what for what in heard.said if what != "heartbeat"] == [
        "begin setup", "end setup", "begin step", *(2 * ["end step", "begin step"]), "end step", "begin checkpointing",
         "end checkpointing", "begin step", "end step", "close",
    ]  # fmt: skip
    assert heard.said.count("heartbeat") == len(begun)


def test_a_launcher_that_breaks_is_told_of_once_and_training_goes_on() -> None:
    heard, told = Heard(), list[Any]()
    reports = LauncherReports(heard, Clock(), lambda event, **fields: told.append((event, fields["what"])))
    heard.broken = True
    reports.step()
    reports.saving()
    reports.close()
    assert told == [("warning", "the launcher hears of this rank no more: OSError: the monitor is gone")]
