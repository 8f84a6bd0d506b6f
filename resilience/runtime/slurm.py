"""What Slurm says about the job that this process belongs to. Asked with a bound: the controller may be gone."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Final

__all__ = ["ask_squeue", "job_end", "stop_time"]

_ASK_S: Final = 10.0
_FORMAT: Final = "%Y-%m-%dT%H:%M:%S"


def ask_squeue(job: str) -> str:
    """When a job's time is up, as `squeue` prints it (local time of the cluster); "" if it does not say."""
    command = ["squeue", "--noheader", f"--jobs={job}", "--format=%e"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return ran.stdout.strip()


def job_end(env: Mapping[str, str], ask: Callable[[str], str] = ask_squeue) -> float | None:
    """Unix seconds at which the job's time is up; None outside of Slurm, without a limit, or where nobody tells.

    `SLURM_JOB_END_TIME` where Slurm sets it (from 23.02 on); older ones are asked.
    """
    end, job = env.get("SLURM_JOB_END_TIME", ""), env.get("SLURM_JOB_ID", "")
    if end.isdigit():
        return float(end)
    if not job.isdigit():
        return None
    try:
        return time.mktime(time.strptime(ask(job), _FORMAT))
    except (ValueError, OverflowError):
        return None


def stop_time(
    stop_before_s: float | None, env: Mapping[str, str], ask: Callable[[str], str] = ask_squeue
) -> float | None:
    """When to stop so that `stop_before_s` are left of the job's time limit; None if there is none, or none is wished.

    For one rank of the job: what one asks for all do, and a controller is not to be asked by thousands at once.
    """
    end = None if stop_before_s is None else job_end(env, ask)
    return None if end is None or stop_before_s is None else end - stop_before_s
