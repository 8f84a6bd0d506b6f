"""The contract that is published for formats, kept by each of ours."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from resilience.formats.protocol import CheckpointFormat, CheckpointReader, Target
from resilience.formats.registry import checkpoint_format
from resilience.stores.filesystem import PosixFileSystem
from resilience.testing import FormatContract
from resilience.testing.ranks import on_all_ranks
from resilience.testing.strategies import Checkpoint, checkpoints
from tests.formats.worlds import meta


class TestTorchDist(FormatContract):
    def form(self) -> CheckpointFormat:
        return checkpoint_format("torch_dist")


class TestZarr(FormatContract):
    def form(self) -> CheckpointFormat:
        return checkpoint_format("zarr")


class TestFsdpDtensor(FormatContract):
    def form(self) -> CheckpointFormat:
        return checkpoint_format("fsdp_dtensor")


class TestOneSeriesOfSaves(FormatContract):
    def form(self) -> CheckpointFormat:
        return checkpoint_format("torch_dist").keeping_plans()


class Rounding:
    """A reader that is off by one, and says otherwise nothing wrong."""

    def __init__(self, reader: CheckpointReader) -> None:
        self._reader = reader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def read(self, targets: Sequence[Target]) -> None:
        self._reader.read(targets)
        for target in targets:
            target.out.add_(1)


def made(directory: Path) -> Path:
    directory.mkdir()
    return directory


def test_a_format_that_reads_something_else_does_not_keep_the_contract(tmp_path: Path) -> None:
    class Wrong(TestTorchDist):
        def _saved(self, directory: Path) -> CheckpointReader:
            return cast("CheckpointReader", Rounding(super()._saved(directory)))

    Wrong().test_its_items_are_listed_with_the_files_that_hold_them(made(tmp_path / "a"))
    with pytest.raises(AssertionError):
        Wrong().test_every_region_comes_back_bit_for_bit(made(tmp_path / "b"))
    with pytest.raises(AssertionError):
        Wrong().test_scalars_and_empty_tensors_are_tensors(made(tmp_path / "c"))


@pytest.mark.parametrize("name", ["torch_dist", "zarr", "fsdp_dtensor"])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(checkpoint=checkpoints())
def test_whatever_is_stored_comes_back_to_the_bit(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir=tmp_path) as place:
        form, folder, fs = checkpoint_format(name), Path(place), PosixFileSystem()
        outcomes = on_all_ranks(
            checkpoint.world_size,
            lambda agreements: form.save(
                folder, checkpoint.share(agreements.rank), meta(7, checkpoint.world_size), agreements, fs
            ),
        )
        assert outcomes == [None] * checkpoint.world_size
        reader = form.open(folder, fs)
        for path, tensor in checkpoint.tensors.items():
            out = torch.zeros_like(tensor)
            reader.read([Target(path, out, (0,) * out.dim(), tuple(out.shape))])
            assert bits(out) == bits(tensor), (path, tensor.dtype, tuple(tensor.shape))
        reader.close()


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
