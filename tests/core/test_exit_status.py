"""What a launcher gets to see: the exit status of real interpreters, also when they end with a transfer under way."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.core.training import World
from tests.ranks import TIMEOUT_S


def start(world: World, repository: Path, rank: int, nodes: str, act: str, **env: str) -> subprocess.Popen[str]:
    arguments = [str(rank), nodes, str(world.memory / "store"), str(world.memory), str(world.disk), act]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.core.program", *arguments],
        cwd=repository,
        env={**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **env},
        stderr=subprocess.PIPE,
        text=True,
    )


def ends(*processes: subprocess.Popen[str]) -> list[tuple[int, str]]:
    """Exit status and last words of each."""
    told = []
    try:
        for process in processes:
            _, words = process.communicate(timeout=TIMEOUT_S)
            told.append((process.returncode, words))
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
                process.communicate()
    return told


def test_a_requested_stop_is_75_and_0_under_an_elastic_agent(world: World, repository: Path) -> None:
    plain = start(world, repository, 0, "a", "stop")
    elastic = start(world, repository, 0, "b", "stop", TORCHELASTIC_RUN_ID="job")
    (first, words), (second, _) = ends(plain, elastic)
    assert (first, second) == (75, 0), words
    assert "stopped on request at iteration 7" in words


@pytest.mark.parametrize(("act", "statuses"), [("none", {0}), ("stop", {75}), ("fail", {1}), ("fail@1", {1})])
def test_no_end_aborts_the_interpreter(world: World, repository: Path, act: str, statuses: set[int]) -> None:
    """A thread left in gloo when the interpreter ends is SIGABRT."""
    found = ends(*(start(world, repository, rank, "a,b", act) for rank in (0, 1)))
    assert {status for status, _ in found} == statuses, found
    if act == "fail@1":
        assert "the user's own loop failed" in found[1][1]
