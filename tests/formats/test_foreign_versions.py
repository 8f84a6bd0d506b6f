"""Checkpoints in the forms of older and newer versions of Megatron Core, made by hand: they are read and resumed from.

The real versions are run in `tests/interop/`; here stand their forms, so that the quick tests hold them too.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from resilience import load_checkpoint
from resilience.errors import CorruptCopyError, NoUsableSaveError, UnsafePathError
from resilience.formats.registry import foreign_problem, open_checkpoint
from resilience.stores.filesystem import PosixFileSystem
from tests.formats.jobs import Job, Net, equal

FS = PosixFileSystem()
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
COMMON = {"iteration": 7, "checkpoint_version": 3.0, "content_metadata": {"singleton_local_shards": False}}
_STRATEGIES = "megatron.core.dist_checkpointing.strategies.torch"


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(5)
    return {name: torch.randn_like(tensor) for name, tensor in Net().state_dict().items()}


def write(folder: Path, stored: dict[str, Any], marker: dict[str, Any], common: dict[str, Any] | None) -> None:
    """As Megatron Core has it: tensors whole or cut, objects as lists of one."""
    folder.mkdir(parents=True)
    planner = DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(stored, storage_writer=FileSystemWriter(folder), planner=planner, no_dist=True)
    (folder / "metadata.json").write_text(json.dumps(marker))
    if common is not None:
        torch.save(common, folder / "common.pt")


MARKER = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
OLD_MARKER = {**MARKER, "common_backend": "torch", "common_backend_version": 1}


# -- from 0.19 on: an object instead of common.pt ---------------------------------------------------------------------


def test_common_state_in_an_object_stands_for_common_pt(tmp_path: Path) -> None:
    folder, stored = tmp_path / "iter_0000007", weights()
    write(folder, {**stored, "common_state/shard_0_1": [COMMON]}, MARKER, None)
    assert not (folder / "common.pt").exists()
    reader = open_checkpoint(folder, FS)
    assert reader.common == COMMON
    assert set(reader.index) == {f"model/0/{name}" for name in stored}, "it is no tensor of the model"
    assert "common_state/shard_0_1" not in reader.objects
    job = Job(tmp_path).run()
    assert job.step == 7
    assert equal(job.loaded, stored)


def test_a_run_goes_on_from_another_programs_checkpoint_in_its_own_directory_and_saves_there(tmp_path: Path) -> None:
    """What it resumed from has no attempt; that it stands in the records of the run must not make them unreadable."""
    write(tmp_path / "iter_0000007", weights(), OLD_MARKER, COMMON)
    first = Job(tmp_path).run(9)
    assert first.step == 7
    record = json.loads((tmp_path / "iter_0000009" / "resilience.json").read_text())
    assert record["base"] == {"iteration": 7, "generation": 0, "attempt": ""}
    shutil.rmtree(tmp_path / "iter_0000007")
    second = Job(tmp_path).run()
    assert second.step == 9
    assert equal(second.loaded, first.model.state_dict())


def test_a_folder_with_neither_is_not_whole(tmp_path: Path) -> None:
    write(tmp_path / "iter_0000007", {**weights(), "common_state/shard_0_2": [COMMON]}, MARKER, None)
    assert "common.pt is missing" in foreign_problem(tmp_path / "iter_0000007", FS)
    with pytest.raises(NoUsableSaveError, match=r"common\.pt is missing"):
        Job(tmp_path).run()


# -- below 0.16: classes of its own in .metadata ----------------------------------------------------------------------


@pytest.fixture
def megatrons_classes(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """As they were, by their names; they are gone before anything is read."""

    @dataclass
    class MCoreMetadata(Metadata):  # type: ignore[misc]
        mcore_data: Any = None

    @dataclass(frozen=True)
    class MCoreSavePlan(SavePlan):
        mcore_data: Any = None

    module = ModuleType(_STRATEGIES)
    for kind in (MCoreMetadata, MCoreSavePlan):
        kind.__module__, kind.__qualname__ = _STRATEGIES, kind.__name__
        setattr(module, kind.__name__, kind)
    parts = _STRATEGIES.split(".")
    with monkeypatch.context() as patched:
        for end in range(1, len(parts)):
            patched.setitem(sys.modules, ".".join(parts[:end]), ModuleType(".".join(parts[:end])))
        patched.setitem(sys.modules, _STRATEGIES, module)
        yield module


def test_the_models_part_of_a_checkpoint_below_0_16_is_read_and_resumed_from(
    tmp_path: Path, megatrons_classes: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`fully_sharded_model_space`: the optimizer's tensors are reshaped, and only `mcore_data` says how."""
    folder, stored = tmp_path / "iter_0000007", weights()
    flat, shapes = {}, {}
    for name, tensor in stored.items():
        key = f"optimizer.state.exp_avg.{name}"
        flat[key] = tensor.reshape((1,) * tensor.dim() + (-1,))
        shapes[key] = {"nd_reformulated_orig_global_shape": tuple(tensor.shape)}
    write(folder, {**stored, **flat, "rng_state/shard_0.0_1.1": [[{}]]}, OLD_MARKER, {"iteration": 7})
    plain = FileSystemReader(folder).read_metadata()
    metadata = megatrons_classes.MCoreMetadata(**vars(plain), mcore_data=shapes)
    metadata.all_local_plans = [megatrons_classes.MCoreSavePlan([], mcore_data=shapes)]
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    content = (folder / ".metadata").read_bytes()
    assert all(name in content for name in (b"MCoreMetadata", b"MCoreSavePlan", b"nd_reformulated_orig_global_shape"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(ModuleNotFoundError, match="megatron"):
        FileSystemReader(folder).read_metadata()  # plain DCP cannot even open it

    job = Job(tmp_path, options={"load_rng": False}).run()
    assert job.step == 7
    assert equal(job.loaded, stored)
    assert equal(load_checkpoint(folder, Net()), stored)


# -- from 0.17.1 on: integrity.json -----------------------------------------------------------------------------------


@pytest.fixture
def digested(tmp_path: Path) -> Path:
    """All files directly in the folder but itself, as Megatron Core lists them."""
    folder = tmp_path / "iter_0000007"
    write(folder, weights(), OLD_MARKER, COMMON)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.txt").write_text("one\n")
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}
    (folder / "integrity.json").write_text(json.dumps({"algorithm": "sha256", "files": files}))
    return folder


def test_another_programs_digests_are_held_against_its_files(digested: Path) -> None:
    reader = open_checkpoint(digested, FS)
    assert reader.record is None
    reader.verify()
    assert equal(Job(digested.parent).run().loaded, weights())


def flip(path: Path) -> None:
    """One bit in the middle of a tensor's bytes, which nobody but a digest notices."""
    content = bytearray(path.read_bytes())
    place = content.index(weights()["up.weight"].numpy().tobytes())
    content[place + 5] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_them_is_found_before_anything_is_loaded(digested: Path) -> None:
    flip(digested / "__0_0.distcp")
    with pytest.raises(CorruptCopyError, match=r"__0_0\.distcp"):
        open_checkpoint(digested, FS).verify()
    with pytest.raises(NoUsableSaveError):
        Job(digested.parent).run()
    with pytest.raises(CorruptCopyError, match=r"__0_0\.distcp"):
        load_checkpoint(digested)
    loaded = Job(digested.parent, resiliency={"verify_load": "off"}).run().loaded
    assert not equal(loaded, weights()), "without the digests it is loaded as it lies"


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        ({"algorithm": "md5", "files": {}}, r"integrity\.json"),
        ({"algorithm": "sha256", "files": {"common.pt": "0" * 64}}, r"does not list __0_0\.distcp"),
        ({"algorithm": "sha256", "files": {"../outside": "0" * 64}}, "outside"),
        ({"algorithm": "sha256", "files": {"common.pt": "short"}}, r"integrity\.json"),
    ],
)
def test_a_list_of_digests_that_does_not_fit_is_refused(digested: Path, listed: dict[str, Any], message: str) -> None:
    (digested / "integrity.json").write_text(json.dumps(listed))
    with pytest.raises((CorruptCopyError, UnsafePathError), match=message):
        open_checkpoint(digested, FS).verify()
