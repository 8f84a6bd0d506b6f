"""The state of an optimizer that is divided over the ranks is saved by the parts and goes on under any division."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from tests.ranks import killed, run_ranks
from tests.resharding.layouts import assert_ranks_hold, stored
from tests.state.distributed_ranks import TIMEOUT_S, Way, run, whole_of, work


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_same_division_goes_on_to_the_bit(tmp_path: Path, dtype: str) -> None:
    root, memory = str(tmp_path / "save"), str(tmp_path / "memory")
    run(Way(2, memory, 3, save=root, dtype=dtype))
    straight = run(Way(2, memory, 6, dtype=dtype))
    resumed = run(Way(2, memory, 6, load=root, dtype=dtype))
    assert {ran.resumed for ran in resumed} == {3}
    assert_ranks_hold(resumed, stored(tmp_path / "save", 3))
    assert [ran.losses for ran in resumed] == [ran.losses[3:] for ran in straight]
    before, after = (whole_of([ran.last for ran in rans]) for rans in (straight, resumed))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert ("optimizer/0/state/up/param" in after) == (dtype == "bfloat16")
    assert sum(ran.kept for ran in resumed) == sum(after[key].numel() for key in after if key.startswith("model/"))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 3), (3, 2)])
def test_another_number_of_ranks_has_the_same_state_to_the_bit(tmp_path: Path, before: int, after: int) -> None:
    root, memory = str(tmp_path / "save"), str(tmp_path / "memory")
    dtype = "bfloat16" if before == 2 else "float32"
    saved = run(Way(before, memory, 3, save=root, dtype=dtype))
    resumed = run(Way(after, memory, 5, load=root, dtype=dtype, bucket_numel=40))
    assert {ran.resumed for ran in resumed} == {3}
    assert_ranks_hold(resumed, stored(tmp_path / "save", 3))
    last, loaded = whole_of([ran.last for ran in saved]), whole_of([ran.parts for ran in resumed])
    assert last.keys() == loaded.keys()
    assert all(torch.equal(last[key], loaded[key]) for key in last)


@pytest.mark.parametrize(("before", "after"), [((4, 2), (2, 1)), pytest.param((2, 1), (4, 2), marks=pytest.mark.long)])
def test_another_tensor_parallel_size_has_the_same_state_to_the_bit(
    tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    root, memory = str(tmp_path / "save"), str(tmp_path / "memory")
    saved = run(Way(before[0], memory, 2, save=root, dtype="bfloat16", tp=before[1]))
    resumed = run(Way(after[0], memory, 3, load=root, dtype="bfloat16", tp=after[1]))
    assert {ran.resumed for ran in resumed} == {2}
    last, loaded = whole_of([ran.last for ran in saved]), whole_of([ran.parts for ran in resumed])
    assert last.keys() == loaded.keys()
    assert tuple(last["optimizer/0/state/up/exp_avg"].shape) == (12, 5)
    assert all(torch.equal(last[key], loaded[key]) for key in last)


@pytest.mark.parametrize(("before", "after"), [("divided", "plain"), ("plain", "divided")])
def test_a_divided_optimizer_goes_on_as_an_undivided_one_and_back(tmp_path: Path, before: str, after: str) -> None:
    root, memory = str(tmp_path / "save"), str(tmp_path / "memory")
    saved = run(Way(2, memory, 3, save=root, kind=before))
    straight = run(Way(2, memory, 6, kind=after))
    resumed = run(Way(2, memory, 6, load=root, kind=after))
    last, loaded = whole_of([ran.last for ran in saved]), whole_of([ran.parts for ran in resumed])
    assert last.keys() == loaded.keys()
    assert all(torch.equal(last[key], loaded[key]) for key in last)
    assert resumed[0].losses == pytest.approx(straight[0].losses[3:], rel=1e-5)


@pytest.mark.parametrize("kind", ["local", "in_memory"])
def test_a_killed_job_goes_on_from_its_nodes_to_the_bit(tmp_path: Path, kind: str) -> None:
    options: tuple[tuple[str, Any], ...] = (("non_persistent_ckpt_type", kind), ("non_persistent_save_interval", 2))
    if kind == "local":
        options += (("non_persistent_local_ckpt_dir", str(tmp_path / "local")),)
    way = Way(2, str(tmp_path / "memory"), 6, dtype="bfloat16", options=options, run_id="divided")
    outcomes = run_ranks(2, work, replace(way, kill_at=5), timeout_s=TIMEOUT_S)
    assert all(killed(outcome) for outcome in outcomes), outcomes
    resumed = run(way)
    straight = run(Way(2, str(tmp_path / "other"), 6, dtype="bfloat16"))
    (iteration,) = {ran.resumed for ran in resumed}
    assert iteration == 4
    assert {ran.tier for ran in resumed} == {kind}
    assert [ran.losses for ran in resumed] == [ran.losses[iteration:] for ran in straight]
    before, after = (whole_of([ran.last for ran in rans]) for rans in (straight, resumed))
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_dcp_reads_the_whole_state_and_the_layout_is_told(tmp_path: Path, dtype: str) -> None:
    saved = run(Way(2, str(tmp_path / "memory"), 2, save=str(tmp_path / "save"), dtype=dtype))
    folder = tmp_path / "save" / "iter_0000002"
    last = whole_of([ran.last for ran in saved])
    for name in ("up", "up_bias", "down", "down_bias", "scale"):  # of a float32 model they are its own parameters
        last.setdefault(f"optimizer/0/state/{name}/param", last[f"model/0/{name}"])
    found = {
        f"optimizer.state.{kind}.{name}": torch.empty(last[f"optimizer/0/state/{name}/{kind}"].shape)
        for name in ("up", "up_bias", "down", "down_bias", "scale")
        for kind in ("param", "exp_avg", "exp_avg_sq")
    }
    dcp.load(found, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    for key, tensor in found.items():
        _, _, kind, name = key.split(".")
        assert torch.equal(tensor, last[f"optimizer/0/state/{name}/{kind}"])
    common = torch.load(folder / "common.pt", weights_only=True)
    assert common["content_metadata"]["distrib_optim_sharding_type"] == "fully_reshardable"
    assert common["optimizer"]["param_state_sharding_type"] == "fully_reshardable"
    groups = common["optimizer"]["optimizer"]["param_groups"]
    assert [group["lr"] for group in groups] == [0.05, 0.02]
    assert [group["step"] for group in groups] == [2, 2]
    assert [group["wd_mult"] for group in groups] == [1.0, 0.1]
    assert [group["lr_mult"] for group in groups] == [1.0, 0.4]


def test_a_save_of_ours_has_nothing_that_the_strictest_mode_misses(tmp_path: Path) -> None:
    root, memory = str(tmp_path / "save"), str(tmp_path / "memory")
    run(Way(2, memory, 2, save=root))
    strict = (("dist_ckpt_strictness", "raise_all"),)
    assert {ran.resumed for ran in run(Way(2, memory, 3, load=root, options=strict))} == {2}
