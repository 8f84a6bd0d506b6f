"""When the job's time is up, as Slurm tells it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from resilience.runtime.slurm import ask_squeue, job_end, stop_time

NEVER = pytest.fail


def test_slurm_s_own_variable_is_believed_and_nobody_is_asked() -> None:
    assert job_end({"SLURM_JOB_END_TIME": "1700000000", "SLURM_JOB_ID": "7"}, NEVER) == 1_700_000_000


def test_an_older_slurm_is_asked_for_the_end_of_this_job() -> None:
    now = int(time.time())
    told = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(now))
    asked: list[str] = []

    def ask(job: str) -> str:
        asked.append(job)
        return told

    assert stop_time(60.0, {"SLURM_JOB_ID": "7"}, ask) == now - 60
    assert asked == ["7"]


@pytest.mark.parametrize("told", ["", "N/A", "Unknown", "tomorrow"])
def test_a_job_without_a_limit_or_an_answer_is_not_stopped(told: str) -> None:
    assert stop_time(60.0, {"SLURM_JOB_ID": "7"}, lambda job: told) is None


def test_outside_of_slurm_or_where_it_is_not_wished_nobody_is_asked() -> None:
    assert stop_time(60.0, {}, NEVER) is None
    assert stop_time(None, {"SLURM_JOB_ID": "7"}, NEVER) is None


def test_a_command_that_is_not_there_or_fails_says_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ask_squeue("7") == ""
    (tmp_path / "squeue").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "squeue").chmod(0o755)
    assert ask_squeue("7") == ""
