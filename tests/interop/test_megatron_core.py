"""The real Megatron Core and this package read each other's checkpoints, at other layouts, bit for bit.

Megatron Core runs as a program of its own (`megatron_program.py`), whole sharded state dicts with it: tensors, objects,
gated projections, experts. On our side stands its own model in our trainer; and, in this environment, a model that
keeps its layers stacked, as Megatron Core stores them, cut by hand along the layers or along the rows.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

import resilience
from resilience.config import CheckpointConfig, ResiliencyConfig
from resilience.controller import ResiliencyController
from resilience.formats.keys import stored_key
from resilience.formats.protocol import Target
from resilience.formats.registry import open_checkpoint
from resilience.state.training_state import TrainingState
from resilience.stores.filesystem import PosixFileSystem
from tests.interop.megatron_env import OTHER_VERSIONS, needed_python
from tests.interop.megatron_gpt import Layout, whole
from tests.ranks import run_ranks, values

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

FOLDER = "iter_0000003"
Shapes = dict[str, list[int]]


class Megatron:
    """Its interpreter, and what it says that it saved, or loaded and found right: shapes by key, None for objects."""

    def __init__(self, python: str, repository: Path) -> None:
        self._python = python
        self._environment = {**os.environ, "PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}

    def __call__(self, what: str, path: Path, layout: Layout) -> dict[str, Any]:
        program = Path(__file__).with_name("megatron_program.py")
        done = subprocess.run(
            [self._python, str(program), what, str(path), *layout.options],
            capture_output=True, text=True, timeout=300, check=False, env=self._environment,
        )  # fmt: skip
        assert done.returncode == 0, f"{what} {layout}: {done.stderr[-3000:]}"
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told


@pytest.fixture(scope="module")
def megatron(repository: Path) -> Megatron:
    return Megatron(needed_python(repository), repository)


# -- Megatron Core's model in our trainer -----------------------------------------------------------------------------

PLAIN = Layout(tp=2, world=4)
GATED = Layout(tp=2, world=4, gated=True)
EXPERTS = Layout(ep=2, world=2, gated=True, experts=4)
TIED = Layout(pp=2, world=2, tied=True)
_SOME = [
    pytest.param(GATED, id="gated"),
    pytest.param(EXPERTS, id="experts", marks=pytest.mark.exhaustive),
    pytest.param(TIED, id="tied", marks=pytest.mark.exhaustive),
]


def at(saved: Layout, **sizes: int) -> Layout:
    """The same model at another layout."""
    return Layout(**sizes, gated=saved.gated, experts=saved.experts, tied=saved.tied)


@pytest.fixture(scope="module", params=_SOME)
def trained(request: pytest.FixtureRequest, megatron: Megatron, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of our trainer with Megatron Core's model."""
    root = tmp_path_factory.mktemp("trained") / "run"
    return root, request.param, megatron("train", root, request.param)


def test_megatron_core_loads_what_our_trainer_saved_of_its_model_as_it_was_and_otherwise_divided(
    megatron: Megatron, trained: Any
) -> None:
    root, saved, told = trained
    for layout in (saved, at(saved, pp=1 if saved.tied else 2, world=1 if saved.tied else 2)):
        found = megatron("load", root / FOLDER, layout)
        assert {key for key in found if not key.startswith(("optimizer.", "rng_state"))} == told.keys()
        assert {key for key in told if told[key]} == {key.split(".exp_avg.")[-1] for key in found if ".exp_avg." in key}
        assert any(key.startswith("rng_state/") for key in found) == (layout == saved)


def test_our_trainer_goes_on_from_there_as_it_was_and_otherwise_divided(megatron: Megatron, trained: Any) -> None:
    root, saved, told = trained
    for layout in (saved, at(saved, tp=1 if saved.experts else 2, pp=2, world=4)):
        assert megatron("resume", root, layout) == told


@pytest.mark.parametrize("saved", _SOME)
def test_our_trainer_goes_on_from_what_megatron_core_saved(megatron: Megatron, tmp_path: Path, saved: Layout) -> None:
    """Weights, extra state, and random numbers where these stood for the same place."""
    told = megatron("save", tmp_path / "run" / FOLDER, saved)
    of_model = {key: shape for key, shape in told.items() if not key.startswith(("optimizer.", "rng_state/"))}
    for layout in (saved, at(saved, tp=1 if saved.experts else 2, pp=2, world=4)):
        assert megatron("resume", tmp_path / "run", layout) == of_model
    assert megatron("evaluate", tmp_path / "run", at(saved, world=1)) == of_model


@pytest.mark.exhaustive
@pytest.mark.parametrize("version", OTHER_VERSIONS)
def test_other_versions_of_megatron_core_read_ours_and_are_read(
    megatron: Megatron, repository: Path, tmp_path: Path, version: str
) -> None:
    other, saved = Megatron(needed_python(repository, version), repository), Layout(tp=2, world=2, gated=True)
    ours = megatron("train", tmp_path / "ours", saved)
    assert ours.keys() <= other("load", tmp_path / "ours" / FOLDER, at(saved, pp=2, world=2)).keys()
    other("save", tmp_path / "theirs" / FOLDER, saved)
    assert (tmp_path / "theirs" / FOLDER / "common.pt").exists() == (version < "0.19")
    assert (b"MCoreMetadata" in (tmp_path / "theirs" / FOLDER / ".metadata").read_bytes()) == (version < "0.16")
    assert megatron("resume", tmp_path / "theirs", at(saved, pp=2, world=2)) == ours


# -- a model that keeps its layers stacked ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(megatron: Megatron, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Shapes]:
    """A checkpoint by Megatron Core with two tensor-parallel and two data-parallel ranks, and its tensors' shapes."""
    root = tmp_path_factory.mktemp("megatron")
    told = megatron("save", root / FOLDER, PLAIN)
    return root, {key: shape for key, shape in told.items() if shape is not None}


def test_every_tensor_that_megatron_core_saved_is_read_bit_for_bit(written: tuple[Path, Shapes]) -> None:
    root, shapes = written
    reader = open_checkpoint(root / FOLDER, PosixFileSystem())
    found = {stored_key(path): path for path in reader.index}
    assert found.keys() == shapes.keys()
    for key, shape in shapes.items():
        stored = reader.index[found[key]]
        out = torch.empty(stored.global_shape, dtype=stored.dtype)
        reader.read([Target(found[key], out, (0,) * out.dim(), tuple(shape))])
        assert torch.equal(out, whole(key, tuple(shape), out.dtype)), key
    reader.close()


@pytest.mark.parametrize("axis", [0, 1], ids=["by layers", "by rows"])
def test_two_ranks_resume_from_megatron_core_each_with_its_own_part(written: tuple[Path, Shapes], axis: int) -> None:
    root, shapes = written
    assert values(run_ranks(2, resume, str(root), shapes, axis)) == [3, 3]


class Stacked(torch.nn.Module):
    """Parameters under Megatron Core's names; this rank's half of each along `axis`, where that can be halved."""

    def __init__(self, shapes: Shapes, rank: int, axis: int) -> None:
        super().__init__()
        self.expected: dict[str, tuple[torch.nn.Parameter, torch.Tensor]] = {}
        for key, shape in shapes.items():
            if key.startswith("optimizer."):
                continue
            cut = axis if key.startswith("decoder.layers.") and shape[axis] % 2 == 0 else None

            def part(full: torch.Tensor, cut: int | None = cut) -> torch.Tensor:
                return full if cut is None else full.chunk(2, cut)[rank].clone()

            value = part(whole(key, tuple(shape), torch.bfloat16))
            parameter = torch.nn.Parameter(torch.zeros_like(value))
            if cut is not None:
                resilience.shard(parameter, dim=cut, index=rank, count=2)
            owner, _, name = key.rpartition(".")
            self._module(owner).register_parameter(name, parameter)
            self.expected[key] = (parameter, value)

    def _module(self, path: str) -> torch.nn.Module:
        found: torch.nn.Module = self
        for name in path.split("."):
            if not hasattr(found, name):
                found.add_module(name, torch.nn.Module())
            found = getattr(found, name)
        return found


def resume(rank: int, root: str, shapes: Shapes, axis: int) -> Any:
    model = Stacked(shapes, rank, axis)
    checkpoint = CheckpointConfig(load=root, dist_ckpt_strictness="ignore_all")
    controller = ResiliencyController(
        TrainingState(model), checkpoint, ResiliencyConfig(run_id="reader", memory_dir=f"{root}/memory")
    )
    found = controller.restore()
    for key, (parameter, value) in model.expected.items():
        assert torch.equal(parameter, value), key
    controller.close()
    return found and found.iteration
