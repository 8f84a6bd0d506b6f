"""One contract, two implementations: what users of NVRx's local checkpoints rely on holds for it, and for ours."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from benchmarks.nvrx_env import nvrx_python
from tests.integrations.local_checkpoints import CASES, QUEUES, run_case

BOUND_S = 240

ANSWERS = {
    "saves": ["another's"] * 2,
    "saves-async": ["another's"] * 2,
    "missing": [[-1, "CheckpointingException", True, 1]] * 2,
    "clique": [[True, [2, rank, "session"]] for rank in range(2)],
    "clique-lazy": [[True, [2, rank, "session"]] for rank in range(2)],
    "silent": [[True, True, -1, 1]] * 2,
    "silent-async": [[True, True, -1, 1]] * 2,
    "names": [["iter_0000123_4_local.pt", [123, 4], True]] * 2,
}


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


@pytest.mark.parametrize("which", CASES)
def test_ours_keeps_the_contract_without_nvrx(tmp_path: Path, which: str) -> None:
    assert plain(run_case("ours", which, 2, tmp_path)) == ANSWERS[which]


@pytest.fixture(scope="module")
def python(repository: Path) -> str:
    found, problem = nvrx_python(repository / ".venv-nvrx", beside=("defusedxml==0.7.1",))
    if not found:
        pytest.skip(f"NVRx cannot be had here: {problem}")
    return found


def run(python: str, repository: Path, implementation: str, root: Path, *which: str) -> dict[str, Any]:
    """What each rank of each case returned, all in one interpreter that has NVRx."""
    command = [python, "-W", "ignore", "-m", "tests.integrations.local_checkpoints", implementation, str(root), *which]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=BOUND_S, check=False, cwd=repository,
        env={**os.environ, "PYTHONPATH": str(repository)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.mark.long
@pytest.mark.timeout(2 * BOUND_S)
@pytest.mark.parametrize("implementation", ["nvrx", "ours"])
def test_nvrx_and_ours_keep_the_contract_side_by_side(
    python: str, repository: Path, tmp_path: Path, implementation: str
) -> None:
    assert run(python, repository, implementation, tmp_path, *CASES) == ANSWERS


@pytest.mark.long
@pytest.mark.timeout(2 * BOUND_S)
def test_nvrx_own_queue_takes_our_replicated_saves(python: str, repository: Path, tmp_path: Path) -> None:
    told = run(python, repository, "ours", tmp_path, *QUEUES)
    assert told == dict.fromkeys(QUEUES, [[2, 0, [[1, 1], [2, 2]], True, True]] * 2)
