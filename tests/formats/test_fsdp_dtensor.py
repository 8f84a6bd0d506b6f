"""The format `fsdp_dtensor`: torch alone reads ours, we read torch's, at other numbers of ranks and to the bit."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from resilience import load_checkpoint
from resilience.errors import CorruptCopyError
from resilience.formats.fsdp_dtensor_keys import nested_path, stored_key, tree_keys
from resilience.formats.protocol import Target
from resilience.formats.registry import foreign_problem, format_name, open_checkpoint, stored_items
from resilience.stores.filesystem import PosixFileSystem
from tests.cli.stores import ask_json
from tests.core.test_survive import with_fsdp
from tests.core.training import World, reference
from tests.formats import fsdp_ranks as ranks
from tests.formats.worlds import rows, save, whole
from tests.ranks import Outcome, run_ranks, values

pytestmark = pytest.mark.timeout(600)
FS = PosixFileSystem()
BOUND_S = 280.0  # of a world of ranks: no matter how busy the machine is
WEIGHT = torch.arange(18.0).view(9, 2)
STEP = torch.tensor(3.0)
COMMON = {
    "opt_param_scheduler": {"last_epoch": 3, "base_lrs": [0.1], "inner": {"kind": "cosine"}},
    "optimizer": {"param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": ["a.weight"]}]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two ranks' checkpoint of a weight in two parts, its moment, and a random state per rank."""

    def chunks(rank: int) -> list[Any]:
        part = (0, 5) if rank == 0 else (5, 9)
        shared = [rows("model/0/a.weight", WEIGHT, *part), rows("optimizer/0/state/a.weight/exp_avg", -WEIGHT, *part)]
        own = [whole("rng/torch", torch.full((4,), rank, dtype=torch.uint8), per_rank=True)]
        return shared + own + ([whole("optimizer/0/state/a.weight/step", STEP)] if rank == 0 else [])

    def tree(rank: int) -> bytes:
        numpy = {"$dict": []} if rank else {"bit_generator": "PCG64", "state": 1}
        rng = {"python": 1, "numpy": numpy, "torch": {"$tensor": "rng/torch", "dtype": "uint8"}, "cuda": []}
        return json.dumps({"rank": rank, "rng": rng}).encode()

    path = tmp_path / "iter_0000007"
    save(path, chunks, world_size=2, values=tree, common=COMMON, form="fsdp_dtensor")
    return path


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


# -- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "key", "nested"),
    [
        ("model/0/a.weight", "model.a.weight", ("model", "a.weight")),
        ("model/1/a.weight", "model1.a.weight", ("model1", "a.weight")),
        (
            "optimizer/0/state/a.weight/exp_avg",
            "optimizer.state.a.weight.exp_avg",
            ("optimizer", "state", "a.weight", "exp_avg"),
        ),
        (
            "optimizer/2/state/b/step",
            "optimizer_2.state.b.step",
            ("optimizer_2", "state", "b", "step"),
        ),
        ("extra/ema/0/w", "resilience/extra/ema/0/w", ("resilience/extra/ema/0/w",)),
        # a moment whose name has a dot could be read in two ways
        (
            "optimizer/0/state/a/odd.name",
            "resilience/optimizer/0/state/a/odd.name",
            ("resilience/optimizer/0/state/a/odd.name",),
        ),
    ],
)
def test_a_path_has_one_key_and_one_place_in_the_nested_dictionary(
    path: str, key: str, nested: tuple[str, ...]
) -> None:
    assert stored_key(path) == key
    assert tree_keys([key]) == {key: path}
    assert nested_path(key) == nested
    assert ".".join(map(str, nested)) == key


@given(st.lists(st.text(alphabet="ab./~0", min_size=1, max_size=6), min_size=1, max_size=5))
def test_every_path_comes_back_from_its_key(parts: list[str]) -> None:
    escaped = [part.replace("~", "~0").replace("/", "~1") for part in parts]
    for start in ("model/0", "model/3", "optimizer/0/state", "optimizer/1/state", "extra"):
        path = "/".join([start, *escaped])
        assert tree_keys([stored_key(path)])[stored_key(path)] == path


@pytest.mark.parametrize("wrapper", ["", "module.", "module.module."])
def test_wrappers_that_all_names_have_in_common_are_taken_off(wrapper: str) -> None:
    keys = [f"model.{wrapper}a", f"model.{wrapper}module.b", f"optimizer.state.{wrapper}a.exp_avg"]
    assert list(tree_keys(keys, wrapped=True).values()) == [
        "model/0/a", "model/0/module.b", "optimizer/0/state/a/exp_avg",
    ]  # fmt: skip
    assert tree_keys(["model.module.a"]) == {"model.module.a": "model/0/module.a"}, "ours has none"


def test_what_others_keep_beside_is_no_part_of_the_model() -> None:
    key = "rng_state.(0, 0).0.torch_rng_state"
    assert tree_keys([key], wrapped=True) == {key: f"foreign/{key}"}


# -- the folder -------------------------------------------------------------------------------------------------------


def test_the_folder_has_neither_a_marker_nor_common_pt(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        *("__0_0.distcp", "__1_0.distcp", ".metadata", "train_state.pt", "run_config.yaml"),
        *("resilience.json", "integrity.json"),
    }
    assert format_name(folder, FS) == "fsdp_dtensor"
    reader = open_checkpoint(folder, FS)
    assert reader.record is not None
    assert reader.record.format == "fsdp_dtensor"
    reader.verify()


def test_torch_without_this_package_reads_one_nested_dictionary(folder: Path, tmp_path: Path) -> None:
    script = f"""
import sys
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save({str(folder)!r}, {str(tmp_path / "whole.pt")!r})
assert not any(name.split(".")[0] == "resilience" for name in sys.modules)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=200)
    state = torch.load(tmp_path / "whole.pt", weights_only=True)
    assert torch.equal(state["model"]["a.weight"], WEIGHT)
    moments = state["optimizer"]["state"]["a.weight"]
    assert torch.equal(moments["exp_avg"], -WEIGHT)
    assert torch.equal(moments["step"], STEP)
    assert state["optimizer"]["param_to_group_meta"] == {"a.weight": {"lr": 0.1, "betas": (0.9, 0.99)}}
    assert state["opt_param_scheduler"] == COMMON["opt_param_scheduler"]
    assert (state["checkpoint_version"], state["iteration"]) == (3.0, 7)
    (rng,) = state["rng_state"]["(0, 0)"]
    assert torch.equal(rng["torch_rng_state"], torch.zeros(4, dtype=torch.uint8))


def test_our_reader_gives_each_part_each_ranks_own_and_what_is_common(folder: Path) -> None:
    reader = open_checkpoint(folder, FS)
    moment = "optimizer/0/state/a.weight/exp_avg"
    assert set(reader.index) == {"model/0/a.weight", moment, "optimizer/0/state/a.weight/step"}
    for start, stop in ((0, 3), (3, 6), (6, 9), (4, 4)):  # three ranks, of which none has what one of the two wrote
        out = torch.empty(stop - start, 2)
        reader.read([Target(moment, out, (start, 0), (9, 2))])
        assert torch.equal(out, -WEIGHT[start:stop])
    own = reader.rank_state(1)
    assert own is not None
    assert json.loads(own.values)["rank"] == 1
    assert torch.equal(own.tensors["rng/torch"], torch.ones(4, dtype=torch.uint8))
    assert reader.rank_state(2) is None
    assert {name: reader.common[name] for name in COMMON} == COMMON
    assert torch.equal(load_checkpoint(folder)["a.weight"], WEIGHT)


@pytest.mark.parametrize("name", [".metadata", "__1_0.distcp", "train_state.pt", "integrity.json"])
def test_a_folder_that_lacks_a_file_is_incomplete(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises((CorruptCopyError, FileNotFoundError), match=rf"{name} is missing|neither .* nor \.metadata"):
        open_checkpoint(folder, FS)


def test_a_torch_dist_folder_that_was_left_before_its_marker_is_not_taken_for_one(tmp_path: Path) -> None:
    save(tmp_path / "a", lambda rank: [whole("model/0/model.w", WEIGHT)])
    (tmp_path / "a" / "metadata.json").unlink()
    assert foreign_problem(tmp_path / "a", FS) == "metadata.json is missing"
    (tmp_path / "a" / "resilience.json").unlink()
    assert foreign_problem(tmp_path / "a", FS) == "metadata.json is missing beside common.pt"


# -- real ranks -------------------------------------------------------------------------------------------------------


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def on_ranks(size: int, work: Any, *args: Any) -> list[Outcome]:
    return run_ranks(size, work, *args, timeout_s=BOUND_S)


def parameters(entries: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in entries.items() if name.endswith(("weight", "bias"))}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A checkpoint of two ranks' FSDP2 training, and the whole model and first moments that it is of."""
    root = tmp_path_factory.mktemp("fsdp") / "save"
    (model, moments, _), _ = values(on_ranks(2, ranks.train_and_save, str(root), 4))
    return root, model, moments


@pytest.mark.parametrize("size", [1, 3])
def test_plain_dcp_reads_ours_on_another_number_of_ranks(saved: Any, size: int) -> None:
    root, model, moments = saved
    for whole_model, whole_moments, told in values(
        on_ranks(size, ranks.load_with_plain_dcp, str(root / "iter_0000004"))
    ):
        # the buffers of rank 0, which every rank has for itself
        assert equal(whole_model, model)
        assert equal(whole_moments, moments)
        assert told == {
            "checkpoint_version": 3.0,
            "iteration": 4,
            "opt_param_scheduler": {"last_epoch": 4},
            "group": {"lr": 0.025},
        }


@pytest.mark.parametrize("wrapper", ["", "module.module."])
def test_ours_reads_what_plain_dcp_saved_on_another_number_of_ranks(tmp_path: Path, wrapper: str) -> None:
    folder = tmp_path / "other" / "iter_0000007"
    (model, moments), *_ = values(on_ranks(3, ranks.save_with_plain_dcp, str(folder), wrapper))
    reader = open_checkpoint(folder, FS)
    for start, stop in ((0, 5), (5, 9)):  # the rows of two ranks
        for name, expected in (("model/0/0.weight", model), ("optimizer/0/state/0.weight/exp_avg", moments)):
            out = torch.empty(stop - start, 6)
            reader.read([Target(name, out, (start, 0), (9, 6))])
            assert torch.equal(out, expected["0.weight"][start:stop])
    assert reader.common == {
        "checkpoint_version": 3.0,
        "iteration": 7,
        "opt_param_scheduler": {"num_steps": 3, "lr_decay_style": "cosine"},
    }
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("7")
    for loaded, iteration in values(on_ranks(2, ranks.load_with_trainer, str(folder.parent))):
        assert iteration == 7
        assert equal(parameters(loaded), parameters(model)), "of buffers that differ DCP stores some rank's"


def test_a_resume_of_fsdp_on_the_same_ranks_is_bit_identical(tmp_path: Path, memory_mount: Path) -> None:
    world = World(memory_mount, tmp_path)
    fields = {"kind": None, "save": True, "make": with_fsdp}
    options = {"ckpt_format": "fsdp_dtensor", "save_interval": 3, "load": str(tmp_path / "save")}
    options["ckpt_assume_constant_structure"] = True  # iteration 6 is stored by the plan of iteration 3
    values(world.run(world.plan("a", "b", steps=7, checkpoint=options, **fields), timeout_s=BOUND_S))
    assert format_name(tmp_path / "save" / "iter_0000006", FS) == "fsdp_dtensor"
    again = world.plan("a", "b", steps=12, checkpoint={**options, "ckpt_step": 6}, **fields)
    resumed = values(world.run(again, timeout_s=BOUND_S))
    assert [ran.resumed.iteration for ran in resumed] == [6, 6]
    assert tuple(ran.digest for ran in resumed) == reference(2, 12, with_fsdp)


def test_a_resume_on_another_number_of_ranks_has_the_same_model_and_moments(saved: Any, tmp_path: Path) -> None:
    root, model, moments = saved
    copied = shutil.copytree(root, tmp_path / "save")
    for resumed, its_moments, began in values(on_ranks(3, ranks.train_and_save, str(copied), 4)):
        assert began == 4
        assert equal(resumed, model)
        assert equal(its_moments, moments)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["replicated", "tensor_parallel"])
def test_what_lies_on_a_mesh_of_two_dimensions_is_stored_once_and_whole(tmp_path: Path, kind: str) -> None:
    (model, moments), *_ = values(on_ranks(4, ranks.save_on_a_mesh, str(tmp_path / "save"), kind))
    folder = tmp_path / "save" / "iter_0000002"
    dcp_to_torch_save(folder, tmp_path / "whole.pt")
    state = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert equal(state["model"], model)
    assert equal({name: each["exp_avg"] for name, each in state["optimizer"]["state"].items()}, moments)
    stored = sum(chunk["shape"][0] * chunk["shape"][1] for chunk in _chunks(folder, "model.0.weight"))
    assert stored == 60, "nothing is stored by two ranks"


def _chunks(folder: Path, key: str) -> Any:
    return next(item.chunks for item in stored_items(folder, FS) if item.key == key)


def test_rng_state_is_rank_0s_in_megatrons_forms(saved: Any, tmp_path: Path) -> None:
    root, _, _ = saved
    dcp_to_torch_save(root / "iter_0000004", tmp_path / "whole.pt")
    (rng,) = torch.load(tmp_path / "whole.pt", weights_only=False)["rng_state"]["(0, 0)"]
    assert rng.keys() == {"random_rng_state", "np_rng_state", "torch_rng_state"}, "this machine has no GPU"
    random.Random().setstate(rng["random_rng_state"])
    np.random.RandomState().set_state(rng["np_rng_state"])
    torch.Generator().set_state(rng["torch_rng_state"])


def test_what_the_save_options_leave_out_of_an_fsdp_checkpoint_is_nowhere(tmp_path: Path) -> None:
    options = {"save_optim": False, "save_rng": False}
    values(on_ranks(2, ranks.train_and_save, str(tmp_path / "save"), 1, False, options))
    folder = tmp_path / "save" / "iter_0000001"
    sections = {item.key.partition(".")[0] for item in stored_items(folder, FS)}
    assert sections == {
        *("model", "checkpoint_version", "iteration", "resilience/common"),
        *("resilience/shard_0_2", "resilience/shard_1_2"),
    }


def test_a_malicious_object_of_another_program_is_refused_and_not_run(tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000007"
    state = {"model": {"w": WEIGHT}, "iteration": 7, "opt_param_scheduler": {"last": Malicious(tmp_path / "ran")}}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    (tmp_path / "ran").unlink(missing_ok=True)
    reader = open_checkpoint(folder, FS)
    with pytest.raises(CorruptCopyError, match=r"opt_param_scheduler\.last .* is refused"):
        reader.common  # noqa: B018
    assert not (tmp_path / "ran").exists()
    out = torch.empty(9, 2)
    reader.read([Target("model/0/w", out, (0, 0))])
    assert torch.equal(out, WEIGHT), "the model does not need it"


def test_a_job_of_plain_tensors_is_refused_at_the_start(tmp_path: Path) -> None:
    for told in values(on_ranks(2, ranks.start_with_plain_tensors, str(tmp_path / "save"))):
        assert told.startswith('checkpoint.ckpt_format: "fsdp_dtensor" does not fit this job')
        assert told.endswith('Use ckpt_format="torch_dist" or "zarr".')


# -- the command line -------------------------------------------------------------------------------------------------


def test_the_commands_know_such_a_checkpoint(capsys: Any, saved: Any) -> None:
    root, _, _ = saved
    (listed,) = ask_json(capsys, "ls", "--save", str(root))["saves"]
    assert (listed["iteration"], listed["tier"], listed["complete"], listed["world_size"]) == (4, "persistent", True, 2)
    assert ask_json(capsys, "verify", "--deep", "--save", str(root))["damaged"] == []
    assert ask_json(capsys, "explain", "--save", str(root), "--world-size", "2")["decision"]["iteration"] == 4
    items = {item["key"]: item for item in ask_json(capsys, "inspect", str(root / "iter_0000004"))["items"]}
    assert items["model.0.weight"]["global_shape"] == [9, 6]
    assert items["model.0.weight"]["path"] == "model/0/0.weight"
    assert len(items["model.0.weight"]["chunks"]) == 2
    assert items["iteration"]["kind"] == "object"
