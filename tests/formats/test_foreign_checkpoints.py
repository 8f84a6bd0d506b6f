"""Checkpoints that other programs wrote are read: the real Megatron Core's sample, and a plain DCP save."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from resilience.errors import ConfigError, CorruptCopyError
from resilience.formats.protocol import Target
from resilience.formats.registry import checkpoint_format, foreign_problem, open_checkpoint
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.trackers import Tracker, read_tracker

FS = PosixFileSystem()
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def sample(repository: Path) -> Path:
    path = repository.parent / "shared" / "samples" / "mcore-0.16.1-torch_dist-tp2-dp2"
    if not path.is_dir():
        pytest.skip("the sample written by Megatron Core is not on this machine")
    return path


def test_every_tensor_of_megatron_cores_sample_is_read_bit_for_bit(sample: Path) -> None:
    expected = json.loads((sample / "expected.json").read_text())["tensors"]
    reader = open_checkpoint(sample / "iter_0000007", FS)
    by_key = {key: path for path in reader.index for key in [_key(path)]}
    assert set(by_key) == set(expected)
    for key, facts in expected.items():
        entry = reader.index[by_key[key]]
        assert (entry.dtype, list(entry.global_shape)) == (getattr(torch, facts["dtype"]), facts["shape"])
        out = torch.zeros(entry.global_shape, dtype=entry.dtype)
        reader.read([Target(by_key[key], out, (0,) * out.dim(), entry.global_shape)])
        found = out.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert hashlib.sha256(found).hexdigest() == facts["sha256"], key


def _key(path: str) -> str:
    from resilience.formats.keys import stored_key

    return stored_key(path)


def test_what_is_not_sharded_is_read_from_the_sample(sample: Path) -> None:
    reader = open_checkpoint(sample / "iter_0000007", FS)
    assert reader.common["content_metadata"]["distrib_optim_sharding_type"] == "fully_reshardable"
    assert reader.record is None
    assert reader.rank_state(0) is None
    reader.verify()


def test_the_samples_trackers_are_read_without_torch(sample: Path) -> None:
    assert read_tracker(sample, FS) == Tracker(7)
    script = (
        "import sys; from pathlib import Path\n"
        "from resilience.formats.registry import foreign_problem\n"
        "from resilience.stores.filesystem import PosixFileSystem\n"
        "from resilience.stores.shared_store import SharedStore\n"
        f"root = Path({str(sample)!r})\n"
        "store = SharedStore(root, PosixFileSystem(), source='load', foreign_problem=foreign_problem)\n"
        "found = store.inventory(None)\n"
        "assert [(s.save.iteration, s.problem) for s in found.shared_saves] == [(7, '')], found\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=200)


@pytest.mark.parametrize("name", [".metadata", "common.pt", "metadata.json", "__2_1.distcp"])
def test_a_sample_that_lacks_a_file_is_incomplete(sample: Path, tmp_path: Path, name: str) -> None:
    for file in (sample / "iter_0000007").iterdir():
        if file.is_file() and file.name != name:
            (tmp_path / file.name).write_bytes(file.read_bytes())
    assert foreign_problem(tmp_path, FS)


def test_a_plain_dcp_save_with_the_two_small_files_is_read(tmp_path: Path) -> None:
    weight = torch.randn(5, 3)
    dcp.save({"w": weight, "n": 3}, checkpoint_id=tmp_path, no_dist=True)
    (tmp_path / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    torch.save({"iteration": 7}, tmp_path / "common.pt")
    out = torch.zeros(5, 3)
    open_checkpoint(tmp_path, FS).read([Target("model/0/w", out, (0, 0))])
    assert torch.equal(out, weight)


def test_a_plain_dcp_folder_is_not_taken_for_torch_dist(tmp_path: Path) -> None:
    dcp.save({"w": torch.zeros(3)}, checkpoint_id=tmp_path, no_dist=True)
    with pytest.raises(CorruptCopyError, match=r"metadata\.json is missing, and no tensor is called model\.…"):
        open_checkpoint(tmp_path, FS)


def test_a_format_that_is_not_there_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match=r"'torch' is unknown; this version has 'torch_dist', 'zarr', 'fsdp_dtensor'"):
        checkpoint_format("torch")
