"""The real Megatron Core and this package read each other's checkpoints, at other layouts, bit for bit.

Megatron Core runs as a program of its own (`megatron_program.py`); on our side stands a model that keeps its layers
stacked, as Megatron Core stores them, cut by hand along the layers or along the rows.
"""

from __future__ import annotations

import json
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
from tests.interop.megatron_env import megatron_python
from tests.interop.megatron_program import MOMENTS, moment_key, whole
from tests.ranks import run_ranks, values

pytestmark = [pytest.mark.long, pytest.mark.timeout(600)]

Shapes = dict[str, list[int]]


@pytest.fixture(scope="module")
def megatron(repository: Path) -> str:
    python, problem = megatron_python(repository / ".venv-megatron")
    if not python:
        pytest.skip(f"Megatron Core cannot be had here: {problem}")
    return python


@pytest.fixture(scope="module")
def written(megatron: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Shapes]:
    """A checkpoint by Megatron Core with two tensor-parallel and two data-parallel ranks."""
    root = tmp_path_factory.mktemp("megatron")
    return root, run_megatron(megatron, "save", root / "iter_0000007", tp=2, pp=1, world=4)


def run_megatron(python: str, what: str, folder: Path, *, tp: int, pp: int, world: int) -> Shapes:
    program = Path(__file__).with_name("megatron_program.py")
    sizes = ["--tp", str(tp), "--pp", str(pp), "--world", str(world)]
    done = subprocess.run(
        [python, str(program), what, str(folder), *sizes], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    shapes: Shapes = json.loads(done.stdout.splitlines()[-1])
    return shapes


def test_every_tensor_that_megatron_core_saved_is_read_bit_for_bit(written: tuple[Path, Shapes]) -> None:
    root, shapes = written
    reader = open_checkpoint(root / "iter_0000007", PosixFileSystem())
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
    assert values(run_ranks(2, resume, str(root), shapes, axis)) == [7, 7]


@pytest.mark.parametrize(("tp", "pp", "world"), [(1, 1, 1), (2, 1, 2), (1, 2, 2), (2, 2, 4)])
def test_megatron_core_loads_at_any_layout_what_two_ranks_saved(
    megatron: str, written: tuple[Path, Shapes], saved: Path, tp: int, pp: int, world: int
) -> None:
    assert run_megatron(megatron, "load", saved / "iter_0000007", tp=tp, pp=pp, world=world) == written[1]


@pytest.fixture(scope="module")
def saved(written: tuple[Path, Shapes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ours with the same tensors, by two ranks that each hold half of the rows."""
    root = tmp_path_factory.mktemp("ours")
    values(run_ranks(2, save, str(root), written[1]))
    return root


class Stacked(torch.nn.Module):
    """Parameters under Megatron Core's names; this rank's half of each along `axis`, where that can be halved."""

    def __init__(self, shapes: Shapes, rank: int, axis: int) -> None:
        super().__init__()
        self.expected: dict[str, tuple[torch.nn.Parameter, torch.Tensor, dict[str, torch.Tensor]]] = {}
        for key, shape in shapes.items():
            if key.startswith("optimizer."):
                continue
            cut = axis if key.startswith("decoder.layers.") and shape[axis] % 2 == 0 else None

            def part(full: torch.Tensor, cut: int | None = cut) -> torch.Tensor:
                return full if cut is None else full.chunk(2, cut)[rank].clone()

            value = part(whole(key, tuple(shape), torch.bfloat16))
            moments = {name: part(whole(moment_key(name, key), tuple(shape), torch.float32)) for name in MOMENTS}
            parameter = torch.nn.Parameter(torch.zeros_like(value))
            if cut is not None:
                resilience.shard(parameter, dim=cut, index=rank, count=2)
            owner, _, name = key.rpartition(".")
            self._module(owner).register_parameter(name, parameter)
            self.expected[key] = (parameter, value, moments)

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
    for key, (parameter, value, _) in model.expected.items():
        assert torch.equal(parameter, value), key
    controller.close()
    return found and found.iteration


def save(rank: int, root: str, shapes: Shapes) -> None:
    model = Stacked(shapes, rank, 1)
    optimizer = torch.optim.Adam(model.parameters())
    with torch.no_grad():
        for parameter, value, moments in model.expected.values():
            parameter.copy_(value)
            optimizer.state[parameter] = {"step": torch.tensor(7.0), **moments}
    checkpoint = CheckpointConfig(save=root)
    controller = ResiliencyController(
        TrainingState(model, optimizer), checkpoint, ResiliencyConfig(run_id="writer", memory_dir=f"{root}/memory")
    )
    assert controller.restore() is None
    for iteration in range(1, 8):
        controller.after_step(iteration)
    report = controller.save(7, "persistent")
    assert not report.error, report
    controller.close()
