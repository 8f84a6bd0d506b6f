"""What a module keeps beside its tensors (`get_extra_state`) comes back from every format, and through conversions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from resilience.formats.convert import convert
from resilience.stores.filesystem import PosixFileSystem
from tests.formats.jobs import Job
from tests.ranks import run_ranks, values

FORMATS = ("torch_dist", "zarr", "fsdp_dtensor")


class Keeping(nn.Module):
    """Keeps a tensor, a count and a word; its kind of state is Transformer Engine's."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)
        self.kept: Any = {"scale": torch.zeros(4, dtype=torch.float64), "seen": 0, "word": "", "nested": [(1, None)]}

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.kept["scale"] = self.kept["scale"] + batch.double().abs().max()
            self.kept["seen"] += 1
            self.kept["word"] += "é"
        return self.net(batch)

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


def plain(kept: Any) -> Any:
    return {**kept, "scale": kept["scale"].tolist()}


def run(rank: int, root: str, form: str, steps: int | None, seed: int) -> tuple[Any, list[float]]:
    """One start under `form`; `fsdp_dtensor` takes DTensors only, so that its model is sharded over one rank."""

    def make() -> nn.Module:
        model = Keeping()
        if form == "fsdp_dtensor":
            from torch.distributed.fsdp import fully_shard

            fully_shard(model.net)
            fully_shard(model)
        return model

    job = Job(Path(root), seed=seed, make=make, options={"save_interval": 2, "ckpt_format": form})
    job.run(steps)
    model = job.model
    assert isinstance(model, Keeping)
    weight: Any = model.net.weight
    whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return plain(model.kept), whole.flatten().tolist()


def alone(root: Path, form: str, steps: int | None, seed: int) -> tuple[Any, list[float]]:
    found: tuple[Any, list[float]] = values(run_ranks(1, run, str(root), form, steps, seed))[0]
    return found


@pytest.mark.parametrize("form", FORMATS)
def test_extra_state_of_a_module_is_resumed_from_every_format(form: str, tmp_path: Path) -> None:
    kept, weight = alone(tmp_path / "ckpt", form, 4, 0)
    assert kept["seen"] == 4
    assert alone(tmp_path / "ckpt", form, None, 1) == (kept, weight)


@pytest.mark.parametrize(
    ("source", "target"), [("torch_dist", "zarr"), ("zarr", "fsdp_dtensor"), ("fsdp_dtensor", "torch_dist")]
)
def test_extra_state_of_a_module_goes_through_a_conversion(source: str, target: str, tmp_path: Path) -> None:
    kept, weight = alone(tmp_path / "first" / "ckpt", source, 4, 0)
    convert(tmp_path / "first" / "ckpt", tmp_path / "second" / "ckpt", target, PosixFileSystem())
    assert alone(tmp_path / "second" / "ckpt", target, None, 1) == (kept, weight)
