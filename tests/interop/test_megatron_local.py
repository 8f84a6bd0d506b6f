"""A loop of the real Megatron Core loses a node, and goes on from our local checkpoints to the same bits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.nvrx_env import nvrx_python
from resilience.config import CheckpointConfig
from resilience.integrations.megatron import checkpointing_context
from tests.interop.megatron_env import needed_python

BOUND_S = 300
STEPS, LAST_SAVED, DIES_AT = 8, 4, 5


def loop(python: str, beside: Path, repository: Path, root: Path, *options: str) -> Any:
    root.mkdir(exist_ok=True)
    command = [python, "-W", "ignore", str(repository / "tests" / "interop" / "megatron_local_program.py"), str(root)]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=BOUND_S, check=False, cwd=repository,
        env={**os.environ, "PYTHONPATH": f"{beside}:{repository}"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.long
@pytest.mark.timeout(3 * BOUND_S)
@pytest.mark.parametrize(("algo", "options"), [("atomic", ()), ("fully_parallel", ("--async-save",))])
def test_megatrons_loop_loses_a_node_and_ends_in_the_same_bits(
    repository: Path, tmp_path: Path, algo: str, options: tuple[str, ...]
) -> None:
    python = needed_python(repository)
    nvrx, problem = nvrx_python(repository / ".venv-nvrx", beside=("defusedxml==0.7.1",))
    if not nvrx:
        pytest.skip(f"NVRx, which Megatron's local checkpoints ask for, cannot be had here: {problem}")
    beside = next((repository / ".venv-nvrx").glob("lib/python*/site-packages"))
    given = ("--algo", algo, *options)
    whole = loop(python, beside, repository, tmp_path / "whole", *given)
    assert loop(python, beside, repository, tmp_path / "dying", *given, "--dies-at", str(DIES_AT)) == "died"
    shutil.rmtree(tmp_path / "dying" / "node1")
    after = loop(python, beside, repository, tmp_path / "dying", *given)
    files = [f"iter_{iteration:07d}_{owner}_local.pt" for iteration in (STEPS - 2, STEPS) for owner in (0, 1)]
    for one, other in zip(whole, after, strict=True):
        assert (one["from"], other["from"]) == (0, LAST_SAVED)
        assert other["losses"] == one["losses"][LAST_SAVED:]
        assert other["digest"] == one["digest"]
        assert one["files"] == other["files"] == files


def test_a_loop_of_ones_own_is_given_what_the_configuration_asks_for(tmp_path: Path) -> None:
    local = CheckpointConfig(
        non_persistent_ckpt_type="local", non_persistent_save_interval=5, non_persistent_local_ckpt_dir=str(tmp_path)
    )
    manager = checkpointing_context(local)["local_checkpoint_manager"]
    assert (manager.local_ckpt_dir, manager.repl_strategy) == (tmp_path / "0", None)
    assert checkpointing_context(CheckpointConfig(save=str(tmp_path))) == {}


def test_without_nvrx_megatrons_names_cannot_be_ours_and_that_is_said() -> None:
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "from resilience.integrations.megatron import use_local_checkpoints\nuse_local_checkpoints()",
        ],
        capture_output=True,
        text=True,
        timeout=BOUND_S,
        check=False,
    )
    assert said.returncode == 1
    assert "ConfigError: NVIDIA's Resiliency Extension cannot be imported" in said.stderr
