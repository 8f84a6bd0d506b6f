"""Inside the real in-process restart of NVIDIA's extension: ranks begin again in place, and go on from their saves."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.nvrx_env import nvrx_python
from resilience.observe.events import scan_events

STEPS, FAILS_AT = 12, 7  # as in the job, which only the other environment can import
BOUND_S = 120


def run(python: str, repository: Path, root: Path, how: str, dead: Sequence[int] = ()) -> list[list[str]]:
    """Of each rank but those that are `dead` in the end: its digest at the end, from which iteration it went on, how

    often it began again in place, its process.
    """
    root.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [python, "-W", "ignore", str(repository / "tests" / "integrations" / "inprocess_job.py"), str(root), how]
    said = [root / f"said-{rank}" for rank in range(2)]
    ranks = [
        subprocess.Popen(
            command, stdout=said[rank].open("w"), stderr=subprocess.STDOUT, text=True, process_group=0,
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(repository),
            },
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for rank in ranks:
            rank.wait(timeout=BOUND_S)
    finally:
        for rank in ranks:
            if rank.poll() is None:
                os.killpg(rank.pid, signal.SIGKILL)
    ended = [-signal.SIGKILL if rank in dead else 0 for rank in range(2)]
    assert [rank.returncode for rank in ranks] == ended, "\n".join(each.read_text()[-3000:] for each in said)
    alive = [rank for rank in range(2) if rank not in dead]
    ends = [(root / f"end-{rank}").read_text().split() for rank in alive]
    assert [int(end[3]) for end in ends] == [ranks[rank].pid for rank in alive]
    return ends


@pytest.mark.long
@pytest.mark.timeout(3 * BOUND_S)
def test_a_fault_inside_the_in_process_wrapper_costs_a_restart_in_place_and_ends_in_the_same_bits(
    repository: Path, tmp_path: Path
) -> None:
    python, problem = nvrx_python(repository / ".venv-nvrx", beside=("defusedxml==0.7.1",))
    if not python:
        pytest.skip(f"NVRx cannot be had here: {problem}")
    undisturbed = run(python, repository, tmp_path / "undisturbed", "go-on")
    failed = run(python, repository, tmp_path / "failed", "fail")
    assert [end[1:3] for end in undisturbed] == [["None", "0"]] * 2
    assert [end[1:3] for end in failed] == [[str(FAILS_AT - 1), "1"]] * 2
    assert [end[0] for end in failed] == [end[0] for end in undisturbed]
    events = scan_events([tmp_path / "failed" / "events"]).events
    starts = [event["pid"] for event in events if event["event"] == "start" and event["rank"] == 0]
    assert (len(starts), len(set(starts))) == (2, 1)
    assert any(event["event"] == "finished" and event["iteration"] == STEPS for event in events)


@pytest.mark.long
@pytest.mark.timeout(3 * BOUND_S)
def test_a_rank_that_is_killed_inside_the_wrapper_leaves_the_others_to_go_on_in_place(
    repository: Path, tmp_path: Path
) -> None:
    """In a world of one then, from the save that two had made."""
    python, problem = nvrx_python(repository / ".venv-nvrx", beside=("defusedxml==0.7.1",))
    if not python:
        pytest.skip(f"NVRx cannot be had here: {problem}")
    (end,) = run(python, repository, tmp_path / "killed", "die", dead=[1])
    assert end[1:3] == [str(FAILS_AT - 1), "1"]
    events = scan_events([tmp_path / "killed" / "events"]).events
    resumes = [event for event in events if event["event"] == "resume"]
    assert [(event["iteration"], event["rank"]) for event in resumes] == [(FAILS_AT - 1, 0)]
    assert [event["world_size"] for event in events if event["event"] == "start"] == [2, 2, 1]
    assert any(event["event"] == "finished" and event["iteration"] == STEPS for event in events)
