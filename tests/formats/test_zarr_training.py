"""Jobs that save as `zarr`: they resume to the bit, a killed save leaves the one before, and the commands know it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zarr

from resilience import load_checkpoint
from resilience.formats.registry import format_name
from resilience.stores.filesystem import PosixFileSystem
from tests.cli.stores import ask_json
from tests.core.training import World, reference
from tests.formats.jobs import Job, equal
from tests.formats.test_interrupted_saves import WAIT_S, Doomed, Fate, Place, alone, states
from tests.ranks import killed, run_ranks, values

pytestmark = pytest.mark.timeout(600)
FS = PosixFileSystem()
BOUND_S = 280.0  # of a world of ranks: no matter how busy the machine is
OPTIONS: dict[str, Any] = {"save_interval": 2, "ckpt_format": "zarr"}


def test_a_resume_from_zarr_on_the_same_ranks_is_bit_identical(tmp_path: Path, memory_mount: Path) -> None:
    world = World(memory_mount, tmp_path)
    options = {"ckpt_format": "zarr", "save_interval": 3, "load": str(tmp_path / "save")}
    options["ckpt_assume_constant_structure"] = True
    fields = {"kind": None, "save": True}
    values(world.run(world.plan("a", "b", steps=7, checkpoint=options, **fields), timeout_s=BOUND_S))
    assert format_name(tmp_path / "save" / "iter_0000006", FS) == "zarr"
    again = world.plan("a", "b", steps=12, checkpoint={**options, "ckpt_step": 6}, **fields)
    resumed = values(world.run(again, timeout_s=BOUND_S))
    assert [ran.resumed.iteration for ran in resumed] == [6, 6]
    assert tuple(ran.digest for ran in resumed) == reference(2, 12)


def save_twice(rank: int, root: str, kill_at: Place | None) -> int:
    """Train to iteration 4, where the save is watched; returns how many places there were."""
    fate = Fate(root, kill_at)
    fate.watch()
    job = Doomed(Path(root), options=OPTIONS)
    job.fate = fate
    job.run(4)
    return fate.count


def resume(rank: int, root: str) -> tuple[int, dict[str, Any]]:
    job = Job(Path(root), seed=1, options=OPTIONS).run()
    return job.step, {name: tensor.tolist() for name, tensor in job.loaded.items()}


@pytest.mark.parametrize(
    "part", [0.1, pytest.param(0.5, marks=pytest.mark.long), pytest.param(0.9, marks=pytest.mark.long)]
)
def test_a_save_that_is_killed_leaves_one_that_loads(tmp_path: Path, part: float) -> None:
    expected = states(tmp_path / "undisturbed")
    there_are = alone(save_twice, str(tmp_path / "counted" / "ckpt"), None)
    root = tmp_path / "killed" / "ckpt"
    place = Place(int(there_are * part))
    (outcome,) = run_ranks(1, save_twice, str(root), place, distributed=False, timeout_s=WAIT_S)
    assert killed(outcome), outcome
    found = load_checkpoint(root)
    iteration = int(found.folder.name.removeprefix("iter_"))
    assert iteration == 2 or part > 0.5
    assert equal(dict(found), {name: torch.tensor(entry) for name, entry in expected[iteration].items()})
    step, loaded = alone(resume, str(root))
    assert loaded == expected[step]


def test_the_commands_know_such_a_checkpoint(capsys: Any, tmp_path: Path) -> None:
    root = tmp_path / "ckpt"
    job = Job(root, options=OPTIONS).run(4)
    listed = ask_json(capsys, "ls", "--save", str(root))["saves"]
    assert [(each["iteration"], each["tier"], each["complete"]) for each in listed] == [
        (4, "persistent", True),
        (2, "persistent", True),
    ]
    assert ask_json(capsys, "verify", "--deep", "--save", str(root))["damaged"] == []
    assert ask_json(capsys, "explain", "--save", str(root), "--world-size", "1")["decision"]["iteration"] == 4
    folder = root / "iter_0000004"
    inspected = ask_json(capsys, "inspect", str(folder))
    items = {item["key"]: item for item in inspected["items"]}
    assert items["up.weight"]["global_shape"] == [4, 3]
    assert items["up.weight"]["path"] == "model/0/up.weight"
    assert inspected["records"][0]["format"] == "zarr"
    arrays = zarr.open(folder / "tensors.zarr", mode="r")
    assert arrays["up.weight"][...].tolist() == job.model.state_dict()["up.weight"].tolist()

    chunk = folder / "tensors.zarr" / "up.weight" / "c" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[5] ^= 1
    chunk.write_bytes(content)
    (damage,) = ask_json(capsys, "verify", "--deep", "--save", str(root), status=1)["damaged"]
    assert (damage["path"], damage["iteration"]) == (str(chunk), 4)
    again = Job(root, seed=1, options=OPTIONS).run()
    assert again.step == 2, "the damaged one is passed over"
