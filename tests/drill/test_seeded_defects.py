"""Mistakes that are put into a copy of the package on purpose are caught by the simulator, each of them.

The copy is imported in a process forked from this one, which has imported torch. A history that catches a defect keeps
all promises with the package as it is: so it is the defect that was caught.
"""

from __future__ import annotations

import multiprocessing
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint

import resilience
from tests.drill.seeded_defects import DEFECTS, Defect

PACKAGE = Path(resilience.__file__).parent
MOST_HISTORIES = 200


def patched_copy(defect: Defect, place: Path) -> Path:
    """A copy of the package with the defect in it."""
    copy = place / "resilience"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    for patch in defect.patches:
        path = copy / patch.file
        source = path.read_text()
        assert source.count(patch.find) == 1, f"{patch.file} has {source.count(patch.find)} places like {patch.find!r}"
        path.write_text(source.replace(patch.find, patch.replace))
    return place


def search(place: Path, defect: Defect, seeds: range, answer: Any) -> None:
    """In a process of its own: the first seed whose history breaks a promise, and which one."""
    for name in [name for name in sys.modules if name == "resilience" or name.startswith("resilience.")]:
        del sys.modules[name]
    sys.path.insert(0, str(place))
    torch.set_num_threads(1)
    import resilience.drill.simulator.cluster as cluster
    import resilience.drill.simulator.history as history

    assert Path(cluster.__file__).is_relative_to(place)
    for seed in seeds:
        make = defect.histories
        given = history.draw_history(seed, defect.focus) if make is None else make(history, seed)
        outcome = cluster.execute(given)
        if outcome.violation is not None:
            answer.put((seed, str(outcome.violation)))
            return
    answer.put((None, ""))


def first_broken(place: Path, defect: Defect, seeds: range) -> tuple[int | None, str]:
    context = multiprocessing.get_context("fork")
    answer: Any = context.SimpleQueue()
    process = context.Process(target=search, args=(place, defect, seeds, answer))
    process.start()
    process.join()
    assert process.exitcode == 0, f"the search for {defect.name!r} ended with {process.exitcode}"
    found: tuple[int | None, str] = answer.get()
    return found


@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name.replace(" ", "_"))
def test_every_patch_fits_the_source(defect: Defect, tmp_path: Path) -> None:
    patched_copy(defect, tmp_path)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("defect", DEFECTS, ids=lambda defect: defect.name.replace(" ", "_"))
def test_the_simulator_catches(defect: Defect, tmp_path: Path) -> None:
    seed, broken = first_broken(patched_copy(defect, tmp_path), defect, range(MOST_HISTORIES))
    assert seed is not None, f"{MOST_HISTORIES} histories did not show that {defect.name}"
    print(f"{defect.name}: seed {seed}: {broken[:200]}")
    assert first_broken(PACKAGE.parent, defect, range(seed, seed + 1)) == (None, "")
