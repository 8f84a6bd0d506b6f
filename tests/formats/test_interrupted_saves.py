"""A save is killed at places spread over its whole life; what was saved before always loads, for us and for others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from resilience.formats.load import load_checkpoint
from tests.formats.fate import Fate, Place
from tests.formats.jobs import Job, equal
from tests.ranks import killed, run_ranks, values

PLACES = 20
LOG_PLACES = (0, 3)  # of those 20, these are in the attempt log, which another lane writes beside the save
WAIT_S = 130  # for a process; a second or two on an idle machine


class Doomed(Job):
    """Its second save, at iteration 4, is watched; with it goes the deletion of the first."""

    fate: Fate

    def train(self) -> None:
        super().train()
        self.done = getattr(self, "done", 0) + 1
        self.fate.armed = self.done == 4


OPTIONS: dict[str, Any] = {"save_interval": 2}


def save_twice(rank: int, root: str, kill_at: Place | None) -> int:
    """Train to iteration 4; returns how many places there were in the save."""
    fate = Fate(root, kill_at)
    fate.watch()
    job = Doomed(Path(root), options=OPTIONS, resiliency={"keep_persistent": 1})
    job.fate = fate
    job.run(4)
    return fate.count


def resume(rank: int, root: str) -> tuple[int, dict[str, Any]]:
    job = Job(Path(root), seed=1, options=OPTIONS).run()
    return job.step, {name: tensor.tolist() for name, tensor in job.loaded.items()}


def go_on(rank: int, root: str) -> dict[str, Any]:
    job = Job(Path(root), seed=1, options=OPTIONS).run(6)
    return {name: tensor.tolist() for name, tensor in job.model.state_dict().items()}


def alone(work: Any, *arguments: Any) -> Any:
    return values(run_ranks(1, work, *arguments, distributed=False, timeout_s=WAIT_S))[0]


def states(root: Path) -> dict[int, dict[str, Any]]:
    """The weights of an undisturbed run by iteration."""
    found = {}
    for steps in (2, 4, 6):
        job = Job(root / str(steps) / "ckpt", options=OPTIONS).run(steps)
        found[steps] = {name: tensor.tolist() for name, tensor in job.model.state_dict().items()}
    return found


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_save_is_killed_at_twenty_places_over_its_life_and_a_good_one_always_loads(tmp_path: Path) -> None:
    expected = states(tmp_path / "undisturbed")
    there_are = alone(save_twice, str(tmp_path / "counted" / "ckpt"), None)
    assert there_are > PLACES
    of_save = PLACES - len(LOG_PLACES)
    places = [Place(round(number * (there_are - 1) / (of_save - 1))) for number in range(of_save)]
    places += [Place(number, of_log=True) for number in LOG_PLACES]
    resumed_from = []
    for place in places:
        root = tmp_path / f"{place.number}-{place.of_log}" / "ckpt"
        (outcome,) = run_ranks(1, save_twice, str(root), place, distributed=False, timeout_s=WAIT_S)
        assert killed(outcome), f"place {place}: {outcome}"

        as_others_find_it = load_checkpoint(root)  # nobody has healed anything yet
        iteration = int(as_others_find_it.folder.name.removeprefix("iter_"))
        weights = {name: torch.tensor(entry) for name, entry in expected[iteration].items()}
        assert equal(dict(as_others_find_it), weights), f"place {place}"

        step, loaded = alone(resume, str(root))
        assert step in (2, 4), f"place {place}"
        assert loaded == expected[step], f"place {place}"
        if not place.of_log:
            resumed_from.append(step)

        assert alone(go_on, str(root)) == expected[6], f"place {place}: the run ends as the undisturbed one"
        leftovers = [path.name for path in root.iterdir() if path.name.startswith((".saving", ".aside", ".commit"))]
        assert leftovers == [], f"place {place}"
    assert resumed_from == sorted(resumed_from), "once the new one counts, it goes on counting"
    assert {2, 4} == set(resumed_from)


def test_a_save_that_is_killed_while_its_tensors_are_written_leaves_the_one_before(tmp_path: Path) -> None:
    """The quick sibling of the test above, at one place."""
    root = tmp_path / "ckpt"
    (outcome,) = run_ranks(1, save_twice, str(root), Place(7), distributed=False, timeout_s=WAIT_S)
    assert killed(outcome), outcome
    assert [path.name for path in root.glob("iter_*")] == ["iter_0000002"]
    assert list(root.glob(".saving-*")), "it was killed in the middle"
    assert load_checkpoint(root).folder.name == "iter_0000002"
    assert alone(resume, str(root))[0] == 2
