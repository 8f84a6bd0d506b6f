"""Without `dist_ckpt_optim_fully_reshardable` a distributed optimizer's state is stored in its buckets, as Megatron's:
other numbers of data-parallel ranks find it there, other places of the model do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from resilience.formats.load import load_checkpoint
from tests.ranks import run_ranks
from tests.state.distributed_ranks import TIMEOUT_S, Way, run, whole_of, work

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

NAMES = ("up", "up_bias", "down", "down_bias", "scale")
KINDS = ("param", "exp_avg", "exp_avg_sq")


def saved(tmp_path: Path, **fields: Any) -> tuple[Way, dict[str, torch.Tensor]]:
    way = Way(2, str(tmp_path / "memory"), 3, save=str(tmp_path / "save"), in_buckets=True, **fields)
    return way, whole_of([ran.last for ran in run(way)])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_buckets_hold_what_the_ranks_had_and_zeros_in_between(tmp_path: Path, dtype: str) -> None:
    _, last = saved(tmp_path, dtype=dtype)
    folder = tmp_path / "save" / "iter_0000003"
    stem = f"optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.{dtype}, torch.float32).bucket_idx_0"
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    found = {f"{stem}.{kind}": torch.full(metadata[f"{stem}.{kind}"].size, torch.nan) for kind in KINDS}
    dcp.load(found, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    starts, start = {}, 0
    for name in reversed(("up", "down", "up_bias", "down_bias", "scale")):  # matrices are the first group
        starts[name] = start
        start += -(-last[f"model/0/{name}"].numel() // 64) * 64
    for kind in KINDS:
        bucket = found[f"{stem}.{kind}"]
        assert len(bucket) == starts["up"] + last["model/0/up"].numel()
        for name in NAMES:
            key = f"optimizer/0/state/{name}/{kind}"
            expected = last.get(key, last[f"model/0/{name}"]).flatten()
            part = bucket[starts[name] : starts[name] + len(expected)]
            assert torch.equal(part, expected), (name, kind)
            part.zero_()
        assert not bucket.any()
    assert not [key for key in metadata if key.startswith(("optimizer.state.exp", "optimizer.state.param"))]
    common = torch.load(folder / "common.pt", weights_only=True)
    assert common["content_metadata"]["distrib_optim_sharding_type"] == "dp_reshardable"
    assert common["optimizer"] == {"param_state_sharding_type": "dp_reshardable"}
    assert set(load_checkpoint(folder)) == set(NAMES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_ranks_go_on_to_the_bit(tmp_path: Path, dtype: str) -> None:
    way, last = saved(tmp_path, dtype=dtype)
    straight = run(Way(2, way.memory, 5, dtype=dtype))
    strict = (("dist_ckpt_strictness", "raise_all"),)
    resumed = run(Way(2, way.memory, 5, load=way.save, dtype=dtype, options=strict))
    assert {ran.resumed for ran in resumed} == {3}
    loaded = whole_of([ran.parts for ran in resumed])
    assert all(torch.equal(last[key], loaded[key]) for key in last)
    assert last.keys() == loaded.keys()
    assert [ran.losses for ran in resumed] == [ran.losses[3:] for ran in straight]


@pytest.mark.parametrize(
    ("after", "kind", "bucket_numel"),
    [
        (3, "divided", 40),
        pytest.param(1, "plain", None, marks=pytest.mark.long),
        pytest.param(1, "divided", None, marks=pytest.mark.long),
        pytest.param(2, "zero", None, marks=pytest.mark.long),
    ],
)
def test_another_number_of_ranks_finds_the_same_state(
    tmp_path: Path, after: int, kind: str, bucket_numel: int | None
) -> None:
    way, last = saved(tmp_path, bucket_numel=50)
    resumed = run(Way(after, way.memory, 4, load=way.save, kind=kind, bucket_numel=bucket_numel))
    assert {ran.resumed for ran in resumed} == {3}
    loaded = whole_of([ran.parts for ran in resumed])
    assert last.keys() == loaded.keys()
    assert all(torch.equal(last[key], loaded[key]) for key in last)


@pytest.mark.long
def test_tensor_parallel_ranks_have_buckets_of_their_own_and_find_them_with_other_replicas(tmp_path: Path) -> None:
    way = Way(4, str(tmp_path / "memory"), 2, save=str(tmp_path / "save"), in_buckets=True, tp=2, dtype="bfloat16")
    last = whole_of([ran.last for ran in run(way)])
    resumed = run(Way(2, way.memory, 3, load=way.save, tp=2, dtype="bfloat16"))
    loaded = whole_of([ran.parts for ran in resumed])
    assert last.keys() == loaded.keys()
    assert all(torch.equal(last[key], loaded[key]) for key in last)


def test_another_tensor_parallel_size_is_refused_in_words_and_the_weights_alone_are_taken(tmp_path: Path) -> None:
    way, last = saved(tmp_path)
    other = Way(2, way.memory, 3, load=way.save, tp=2)
    for outcome in run_ranks(2, work, other, timeout_s=TIMEOUT_S):
        assert outcome.error == "LayoutMismatchError"
        assert "dist_ckpt_optim_fully_reshardable=False" in outcome.message
        assert "load_optim=False" in outcome.message
    alone = run(Way(2, way.memory, 4, load=way.save, tp=2, options=(("load_optim", False),)))
    weights = whole_of([ran.parts for ran in alone])
    assert all(torch.equal(weights[key], last[key]) for key in last if key.startswith("model/"))
