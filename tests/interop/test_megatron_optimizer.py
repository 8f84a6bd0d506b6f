"""Megatron Core's real distributed optimizer and ours go on from each other's checkpoints in both layouts, to the bit.

Both run as a program of their own (`optimizer_program.py`) over the same Megatron GPT; every main parameter, moment and
step follows from its key and its place, so that each side knows what it has to find.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.interop.megatron_env import needed_python

LONGEST = pytest.mark.exhaustive
pytestmark = [pytest.mark.long, pytest.mark.timeout(1800)]

FULLY, BUCKETS = "fully_reshardable", "dp_reshardable"
EXPERTS = {"experts": 4}  # trained by an optimizer of their own, where they are divided


@pytest.fixture(scope="module")
def megatron(repository: Path) -> str:
    return needed_python(repository)


def program(
    python: str, repository: Path, what: str, folder: Path, *options: str, **sizes: int
) -> list[dict[str, Any]]:
    """What each rank tells."""
    given = [text for name, size in sizes.items() for text in (f"--{name}", str(size))]
    command = [python, str(repository / "tests" / "interop" / "optimizer_program.py"), what, str(folder)]
    done = subprocess.run(
        [*command, *options, *given], capture_output=True, text=True, timeout=600, check=False, cwd=repository
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return told


@pytest.mark.parametrize(
    ("layout", "options", "saved", "loaded"),
    [
        pytest.param(FULLY, (), {"tp": 2, "world": 4}, {"pp": 2, "world": 2}, marks=LONGEST),
        pytest.param(FULLY, ("--mem-efficient",), {"tp": 1, "world": 2}, {"tp": 2, "world": 2}, marks=LONGEST),
        pytest.param(
            BUCKETS,
            ("--bucket-size", "2000"),
            {"tp": 1, "world": 2},
            {"tp": 1, "world": 1},
            marks=LONGEST,
        ),
        (BUCKETS, (), {"tp": 2, "world": 4}, {"tp": 2, "world": 2}),
        pytest.param(BUCKETS, ("--bf16-gradients",), {"world": 2}, {"world": 1}, marks=LONGEST),
        pytest.param(FULLY, (), {"ep": 2, "world": 2, **EXPERTS}, {"world": 1, **EXPERTS}, marks=LONGEST),
        (BUCKETS, (), {"ep": 2, "pp": 2, "world": 4, **EXPERTS}, {"ep": 2, "pp": 2, "world": 4, **EXPERTS}),
    ],
)
def test_ours_goes_on_from_megatrons(
    megatron: str,
    repository: Path,
    tmp_path: Path,
    layout: str,
    options: tuple[str, ...],
    saved: dict[str, int],
    loaded: dict[str, int],
) -> None:
    program(megatron, repository, "save", tmp_path / "iter_0000007", "--layout", layout, *options, **saved)
    for rank in program(megatron, repository, "ours-load", tmp_path, **loaded):
        assert rank["iteration"] == 7
        assert rank["checked"] > 0
        assert {lr for lr, _ in rank["groups"]} == {0.125}


@pytest.mark.parametrize(
    ("layout", "saved", "loaded"),
    [
        pytest.param(FULLY, {"tp": 2, "world": 4}, {"pp": 2, "world": 2}, marks=LONGEST),
        pytest.param(FULLY, {"tp": 1, "world": 2}, {"tp": 2, "world": 4}, marks=LONGEST),
        (BUCKETS, {"tp": 1, "world": 2}, {"tp": 1, "world": 1}),
        pytest.param(BUCKETS, {"tp": 2, "world": 2}, {"tp": 2, "world": 4}, marks=LONGEST),
        (FULLY, {"ep": 2, "world": 2, **EXPERTS}, {"ep": 2, "world": 4, **EXPERTS}),
        pytest.param(BUCKETS, {"ep": 2, "world": 2, **EXPERTS}, {"ep": 2, "world": 4, **EXPERTS}, marks=LONGEST),
    ],
)
def test_megatrons_goes_on_from_ours(
    megatron: str, repository: Path, tmp_path: Path, layout: str, saved: dict[str, int], loaded: dict[str, int]
) -> None:
    program(megatron, repository, "ours-save", tmp_path, "--layout", layout, **saved)
    for rank in program(megatron, repository, "load", tmp_path / "iter_0000007", **loaded):
        assert rank["layout"] == layout
        assert rank["checked"] > 0
        assert {lr for lr, _ in rank["groups"]} == {0.125}
