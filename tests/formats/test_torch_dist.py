"""A checkpoint that several ranks wrote: others read it, we read any region of it, and ranks fail together."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml

from resilience.errors import (
    CorruptCopyError,
    LayoutMismatchError,
    MissingKeysError,
    SaveFailedError,
    StoreError,
)
from resilience.formats.protocol import Chunk, RankShare, Target
from resilience.formats.registry import checkpoint_format, open_checkpoint
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.trackers import step_of
from resilience.testing.ranks import on_all_ranks
from tests.formats.worlds import ATTEMPT, RUN, arena_of, meta, rows, save, whole

FS = PosixFileSystem()
EMBEDDING = torch.arange(40, dtype=torch.float32).view(10, 4)
BIAS = torch.arange(6).to(torch.bfloat16)
STEP = torch.tensor(3.0)
MOMENT = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
ALL_DTYPES = [
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.bool,
    torch.complex64,
    torch.uint16,
    torch.float64,
    torch.int64,
]


def chunks_of_three(rank: int) -> list[Chunk]:
    """Rows of the embedding dealt unevenly, the bias on rank 1, buffers and generators of every rank's own."""
    bounds = [(0, 3), (3, 3), (3, 10)][rank]
    embedding, moment, running, generator = arena_of(
        EMBEDDING, MOMENT, torch.full((5,), float(rank)), torch.arange(8, dtype=torch.uint8) + rank
    )
    chunks = [
        rows("model/0/embedding.weight", embedding, *bounds),
        rows("optimizer/0/state/embedding.weight/exp_avg", moment, *bounds),
        whole("model/0/bn.running_mean", running, per_rank=True),
        whole("rng/torch", generator, per_rank=True),
    ]
    if rank == 1:
        chunks += [whole("model/0/bias", BIAS), whole("optimizer/0/state/embedding.weight/step", STEP)]
    return chunks


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "iter_0000007"
    save(path, chunks_of_three, world_size=3, aliases={"model/0/head.weight": "model/0/embedding.weight"})
    return path


def read(folder: Path, key: str, shape: tuple[int, ...], offsets: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    out = torch.full(shape, 99).to(dtype)
    reader = open_checkpoint(folder, FS)
    reader.read([Target(key, out, offsets)])
    reader.close()
    return out


def test_plain_dcp_in_a_plain_process_loads_the_models_keys_bit_for_bit(folder: Path) -> None:
    script = f"""
import sys, torch, torch.distributed.checkpoint as dcp
state = {{"embedding.weight": torch.zeros(10, 4), "head.weight": torch.zeros(10, 4),
          "bias": torch.zeros(6, dtype=torch.bfloat16), "bn.running_mean": torch.ones(5),
          "optimizer.state.exp_avg.embedding.weight": torch.zeros(10, 4),
          "optimizer.state.step.embedding.weight": torch.tensor(0.)}}
dcp.load(state, checkpoint_id={str(folder)!r}, no_dist=True)
assert not any(name.split(".")[0] == "resilience" for name in sys.modules)
torch.save(state, {str(folder.parent / "loaded.pt")!r})
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=200)
    loaded = torch.load(folder.parent / "loaded.pt", weights_only=True)
    assert torch.equal(loaded["embedding.weight"], EMBEDDING)
    assert torch.equal(loaded["head.weight"], EMBEDDING), "a tied weight is found under both names"
    assert torch.equal(loaded["bias"], BIAS)
    assert torch.equal(loaded["bn.running_mean"], torch.zeros(5)), "a buffer that differs is the lowest rank's"
    assert torch.equal(loaded["optimizer.state.exp_avg.embedding.weight"], MOMENT)
    assert torch.equal(loaded["optimizer.state.step.embedding.weight"], STEP)


def test_the_folder_has_the_files_of_the_contract(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        *("__0_0.distcp", "__1_0.distcp", "__2_0.distcp", ".metadata", "common.pt", "metadata.json"),
        *("train_state.pt", "run_config.yaml", "resilience.json", "integrity.json"),
    }
    assert json.loads((folder / "metadata.json").read_text()) == {
        "sharded_backend": "torch_dist",
        "sharded_backend_version": 1,
        "common_backend": "torch",
        "common_backend_version": 1,
    }
    common = torch.load(folder / "common.pt", weights_only=True)
    assert (common["checkpoint_version"], common["iteration"]) == (3.0, 7)
    assert common["content_metadata"] == {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    listed = json.loads((folder / "integrity.json").read_text())
    assert listed == {
        "algorithm": "sha256",
        "files": {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in folder.iterdir()
            if path.name != "integrity.json"
        },
    }


def test_train_state_has_bridges_keys_and_dtypes(tmp_path: Path) -> None:
    counters = {"consumed_train_samples": 2**31, "floating_point_operations_so_far": 1.5e9, "do_train": True}
    save(tmp_path / "a", lambda rank: [], train_state=counters)
    content = (tmp_path / "a" / "train_state.pt").read_bytes()
    state = torch.load(tmp_path / "a" / "train_state.pt", weights_only=True)
    assert {name: (value.dtype, value.item()) for name, value in state.items()} == {
        "step": (torch.int32, 7),
        "consumed_train_samples": (torch.int64, 2**31),
        "skipped_train_samples": (torch.int32, 0),
        "consumed_valid_samples": (torch.int32, 0),
        "floating_point_operations_so_far": (torch.float32, 1.5e9),
        "do_train": (torch.bool, True),
        "do_valid": (torch.bool, False),
        "do_test": (torch.bool, False),
    }
    assert step_of(content, "it") == 7, "the reader without torch agrees"


def test_run_config_always_has_the_five_keys(tmp_path: Path) -> None:
    config = {"model": {"tensor_model_parallel_size": 2, "act": torch.float32}, "seed": (1, 2)}
    save(tmp_path / "a", lambda rank: [], run_config=config, save_rng=False)
    assert yaml.safe_load((tmp_path / "a" / "run_config.yaml").read_text()) == {
        "model": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 1, "act": "torch.float32"},
        "checkpoint": {"fully_parallel_save": True, "save_optim": True, "save_rng": False},
        "seed": [1, 2],
    }
    save(tmp_path / "b", lambda rank: [], run_config=config, tp=4, pp=3, fully_parallel_save=False)
    written = yaml.safe_load((tmp_path / "b" / "run_config.yaml").read_text())
    model = written["model"]
    assert (model["tensor_model_parallel_size"], model["pipeline_model_parallel_size"]) == (4, 3), "the layout counts"
    assert written["checkpoint"]["fully_parallel_save"] is False


def test_the_index_names_every_tensor_by_its_path(folder: Path) -> None:
    index = open_checkpoint(folder, FS).index
    assert {path: (entry.dtype, entry.global_shape) for path, entry in index.items()} == {
        "model/0/embedding.weight": (torch.float32, (10, 4)),
        "model/0/head.weight": (torch.float32, (10, 4)),
        "model/0/bias": (torch.bfloat16, (6,)),
        "model/0/bn.running_mean": (torch.float32, (5,)),
        "optimizer/0/state/embedding.weight/exp_avg": (torch.float32, (10, 4)),
        "optimizer/0/state/embedding.weight/step": (torch.float32, ()),
    }


@pytest.mark.parametrize("first", range(10))
@pytest.mark.parametrize("last", range(1, 11))
def test_any_rows_and_columns_are_read_across_the_ranks_parts(folder: Path, first: int, last: int) -> None:
    if last <= first:
        return
    out = read(folder, "model/0/embedding.weight", (last - first, 2), (first, 1), torch.float32)
    assert torch.equal(out, EMBEDDING[first:last, 1:3])


def test_a_scalar_and_an_alias_are_read(folder: Path) -> None:
    assert read(folder, "optimizer/0/state/embedding.weight/step", (), (), torch.float32) == STEP
    assert torch.equal(read(folder, "model/0/head.weight", (10, 4), (0, 0), torch.float32), EMBEDDING)


def test_a_target_may_be_strided_and_of_another_dtype(folder: Path) -> None:
    out = torch.zeros(4, 10, dtype=torch.float64).t()
    reader = open_checkpoint(folder, FS)
    reader.read([Target("model/0/embedding.weight", out, (0, 0), (10, 4))])
    assert torch.equal(out, EMBEDDING.double())


def test_every_rank_gets_back_what_it_alone_had(folder: Path) -> None:
    reader = open_checkpoint(folder, FS)
    for rank in range(3):
        state = reader.rank_state(rank)
        assert state is not None
        assert json.loads(state.values) == {"rank": rank}
        assert torch.equal(state.tensors["rng/torch"], torch.arange(8, dtype=torch.uint8) + rank)
        assert torch.equal(state.tensors["model/0/bn.running_mean"], torch.full((5,), float(rank)))
    assert reader.rank_state(3) is None


def test_what_a_single_rank_has_is_stored_once_under_its_plain_name(tmp_path: Path) -> None:
    """A parameter so small that one rank of a sharded model has all of it, and the others an empty part."""
    key, moment = "model/0/scale", "optimizer/0/state/scale/exp_avg"
    full, empty = torch.arange(3.0), torch.empty(0)

    def chunks(rank: int) -> list[Chunk]:
        if rank == 1:
            return [whole(key, full, per_rank=True), whole(moment, full * 2, per_rank=True)]
        return [Chunk(name, empty, (3,), (3,), False) for name in (key, moment)]

    save(tmp_path / "a", chunks, world_size=3)
    reader = open_checkpoint(tmp_path / "a", FS)
    for rank in range(3):
        state = reader.rank_state(rank)
        assert state is not None
        assert not state.tensors
    assert torch.equal(read(tmp_path / "a", moment, (3,), (0,), torch.float32), full * 2)
    reader.read([Target(key, torch.empty(0), (3,), (3,))])


def test_the_record_says_which_save_it_is(folder: Path) -> None:
    record = open_checkpoint(folder, FS).record
    assert record is not None
    assert (record.run_id, record.save, record.world_size) == (RUN, meta(7).save, 3)
    assert record.save.attempt == ATTEMPT


@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_a_view_into_an_arena_is_stored_alone_and_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    content = torch.arange(24).view(4, 6).to(dtype)
    _, view = arena_of(torch.zeros(1 << 16, dtype=torch.uint8), content)
    save(tmp_path / "a", lambda rank: [whole("model/0/w", view), whole("rng/x", view, per_rank=True)])
    out = read(tmp_path / "a", "model/0/w", (4, 6), (0, 0), dtype)
    assert torch.equal(out.view(torch.uint8), content.view(torch.uint8))
    assert (tmp_path / "a" / "__0_0.distcp").stat().st_size < 1 << 14, "the rest of the arena was not written"


def test_tensors_without_elements_come_back(tmp_path: Path) -> None:
    empty = torch.empty(0, 5)
    save(tmp_path / "a", lambda rank: [whole("model/0/none", empty)], world_size=2)
    assert open_checkpoint(tmp_path / "a", FS).index["model/0/none"].global_shape == (0, 5)
    assert read(tmp_path / "a", "model/0/none", (0, 5), (0, 0), torch.float32).shape == (0, 5)


def test_a_transposed_chunk_is_stored_in_c_order(tmp_path: Path) -> None:
    save(tmp_path / "a", lambda rank: [whole("model/0/w", EMBEDDING.t())])
    assert torch.equal(read(tmp_path / "a", "model/0/w", (4, 10), (0, 0), torch.float32), EMBEDDING.t())


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        (
            lambda rank: [rows("model/0/w", EMBEDDING, 0, 4)] if rank else [rows("model/0/w", EMBEDDING, 5, 10)],
            "volume: 36",
        ),
        (lambda rank: [rows("model/0/w", EMBEDDING, 0, 6)] if rank else [rows("model/0/w", EMBEDDING, 5, 10)], "overl"),
        (lambda rank: [whole("model/0/w", EMBEDDING)], "given twice"),
        (lambda rank: [Chunk("model/0/w", EMBEDDING, (10, 3), (0, 0), False)] if rank else [], "out of bounds"),
        (
            lambda rank: [rows("model/0/w", EMBEDDING.double() if rank else EMBEDDING, 5 * rank, 5 * rank + 5)],
            "disagree on w",
        ),
    ],
    ids=["a hole", "an overlap", "twice the same", "outside", "two dtypes"],
)
def test_parts_that_do_not_make_a_whole_fail_the_save_on_every_rank(tmp_path: Path, parts, words: str) -> None:
    outcomes = on_all_ranks(
        2,
        lambda agreements: checkpoint_format("torch_dist").save(
            tmp_path, RankShare(parts(agreements.rank), b"{}"), meta(7, 2), agreements, FS
        ),
    )
    assert all(isinstance(outcome, SaveFailedError) and words in str(outcome) for outcome in outcomes), outcomes
    assert not (tmp_path / "metadata.json").exists()


def test_a_single_rank_that_leaves_a_hole_fails_its_save(tmp_path: Path) -> None:
    with pytest.raises(SaveFailedError, match="36 elements of 40"):
        save(tmp_path / "a", lambda rank: [rows("model/0/w", EMBEDDING, 0, 9)])


class FullDisk(PosixFileSystem):
    """Runs out of space while it writes the files whose name holds `name`."""

    def __init__(self, name: str) -> None:
        self.name = name

    def write_file(self, path: Path, chunks: Iterator[memoryview]) -> None:
        if self.name in path.name:
            next(chunks)
            raise StoreError(f"cannot write {path}: No space left on device.")
        super().write_file(path, chunks)


@pytest.mark.parametrize("name", ["__2_0", ".metadata", "integrity.json"])
def test_a_rank_that_cannot_write_fails_the_save_on_every_rank(tmp_path: Path, name: str) -> None:
    outcomes = on_all_ranks(
        3,
        lambda agreements: checkpoint_format("torch_dist").save(
            tmp_path, RankShare(chunks_of_three(agreements.rank), b"{}"), meta(7, 3), agreements, FullDisk(name)
        ),
    )
    assert all(isinstance(outcome, SaveFailedError) and "No space left" in str(outcome) for outcome in outcomes)
    assert checkpoint_format("torch_dist").problem(tmp_path, FS) != ""


def test_ranks_that_save_different_things_all_fail(tmp_path: Path) -> None:
    outcomes = on_all_ranks(
        2,
        lambda agreements: checkpoint_format("torch_dist").save(
            tmp_path, RankShare([], b"{}"), meta(7 + agreements.rank, 2), agreements, FS
        ),
    )
    assert all(isinstance(outcome, SaveFailedError) and "different things" in str(outcome) for outcome in outcomes)


def test_keys_that_are_not_there_are_named_before_anything_is_read(folder: Path) -> None:
    reader = open_checkpoint(folder, FS)
    out = torch.zeros(10, 4)
    with pytest.raises(MissingKeysError, match=r"model/0/nothing.*model/0/bias"):
        reader.read([Target("model/0/embedding.weight", out, (0, 0)), Target("model/0/nothing", out, (0, 0))])
    assert not out.any()


@pytest.mark.parametrize(
    ("shape", "offsets", "global_shape"),
    [((10, 4), (1, 0), None), ((10, 4), (0, 0), (10, 5)), ((40,), (0,), None), ((2, 4), (-1, 0), None)],
)
def test_another_shape_is_a_layout_mismatch(folder: Path, shape, offsets, global_shape) -> None:
    reader = open_checkpoint(folder, FS)
    with pytest.raises(LayoutMismatchError, match=r"embedding\.weight has shape \(10, 4\)"):
        reader.read([Target("model/0/embedding.weight", torch.zeros(shape), offsets, global_shape)])


def test_a_flipped_bit_is_found_by_verify_and_only_in_its_file(folder: Path) -> None:
    file = folder / "__2_0.distcp"
    content = bytearray(file.read_bytes())
    content[-2000] ^= 1
    file.write_bytes(content)
    reader = open_checkpoint(folder, FS)
    target = Target("model/0/embedding.weight", torch.zeros(3, 4), (0, 0))
    assert "__2_0.distcp" not in reader.files([target], rank=0)
    reader.verify(reader.files([target], rank=0))
    with pytest.raises(CorruptCopyError, match=r"__2_0\.distcp does not match its SHA-256"):
        reader.verify()


def test_a_file_that_somebody_added_is_no_damage_but_one_that_is_not_listed_is(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")
    open_checkpoint(folder, FS).verify(["notes.txt", "__0_0.distcp"])
    listed = json.loads((folder / "integrity.json").read_text())
    del listed["files"]["__1_0.distcp"]
    (folder / "integrity.json").write_text(json.dumps(listed))
    with pytest.raises(CorruptCopyError, match=r"does not list __1_0\.distcp"):
        open_checkpoint(folder, FS).verify(["__0_0.distcp"])


@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "common.pt", "integrity.json", "train_state.pt"])
def test_a_folder_that_lacks_a_file_is_no_checkpoint(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert name in checkpoint_format("torch_dist").problem(folder, FS)
    with pytest.raises(CorruptCopyError, match="no whole checkpoint"):
        checkpoint_format("torch_dist").open(folder, FS)


def test_a_shortened_file_is_no_checkpoint(folder: Path) -> None:
    file = folder / "__1_0.distcp"
    file.write_bytes(file.read_bytes()[:-1])
    assert "__1_0.distcp has" in checkpoint_format("torch_dist").problem(folder, FS)


def test_files_in_sub_folders_are_written_by_their_rank_and_protected_like_all_others(tmp_path: Path) -> None:
    inner = {0: {"tokenizer/vocab.txt": b"a b c"}, 1: {"dataloader_state/train_dataloader_dprank001.pt": b"xyz"}}
    path = tmp_path / "iter_0000007"
    save(path, lambda rank: [], world_size=2, files=inner)
    assert (path / "tokenizer/vocab.txt").read_bytes() == b"a b c"
    listed = json.loads((path / "integrity.json").read_text())["files"]
    assert "integrity_nested.json" in listed
    assert not any("/" in name for name in listed), "as Megatron Core has it"
    reader = open_checkpoint(path, FS)
    reader.verify()
    (path / "dataloader_state/train_dataloader_dprank001.pt").write_bytes(b"xyZ")
    with pytest.raises(CorruptCopyError, match=r"dprank001\.pt does not match its SHA-256"):
        reader.verify()
    (path / "tokenizer/vocab.txt").unlink()
    assert checkpoint_format("torch_dist").problem(path, FS) == "tokenizer/vocab.txt is missing"


@pytest.mark.parametrize("name", ["../outside", "a/../../outside", "/etc/passwd", "a//b", "a/./b", "a/b\n"])
def test_a_list_of_digests_that_names_a_file_outside_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    save(tmp_path / "a", lambda rank: [], files={0: {"tokenizer/vocab.txt": b"a"}})
    reader = open_checkpoint(tmp_path / "a", FS)
    (tmp_path / "a/integrity_nested.json").write_text(json.dumps({"algorithm": "sha256", "files": {name: "0" * 64}}))
    with pytest.raises(CorruptCopyError, match="no file of its folder"):
        reader.verify()
