"""The format `zarr`: plain zarr reads ours, we read what zarr wrote, and no file has two writers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray
import zarr
from hypothesis import given
from hypothesis import strategies as st
from zarr.codecs import BytesCodec, Crc32cCodec, ZstdCodec

from resilience import CheckpointConfig, ResiliencyConfig, load_checkpoint
from resilience.config.together import unsupported
from resilience.errors import (
    ConfigError,
    CorruptCopyError,
    LayoutMismatchError,
    MissingKeysError,
    SaveFailedError,
    StoreError,
    UnsafePathError,
)
from resilience.formats import zarr_checksum
from resilience.formats.proof import folder_damage
from resilience.formats.protocol import Chunk, Target
from resilience.formats.registry import foreign_problem, open_checkpoint, stored_items
from resilience.formats.zarr_metadata import folder_of
from resilience.stores.filesystem import PosixFileSystem
from tests.formats.worlds import arena_of, rows, save, whole

FS = PosixFileSystem()
EMBEDDING = torch.arange(40, dtype=torch.float32).view(10, 4)
MOMENT = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
RUNNING = "bn.running_mean"
ODD_ROWS = torch.randn(5021, 60, generator=torch.Generator().manual_seed(2))  # 1.2 MB, cut at odd rows
DTYPES = (
    *(torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.complex64, torch.complex128),
    *(torch.float16, torch.float64, torch.int8, torch.int16, torch.int64, torch.uint16, torch.uint32, torch.uint64),
)


def of_every_dtype() -> dict[str, torch.Tensor]:
    tensors = {f"dtype.{str(dtype).removeprefix('torch.')}": torch.arange(6).view(2, 3).to(dtype) for dtype in DTYPES}
    return tensors | {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), "one.element": torch.ones(1, 1, 1)}


def chunks_of_three(rank: int) -> list[Chunk]:
    """Rows as FSDP cuts them, rows at odd places, every dtype on rank 1, and what every rank has of its own."""
    embedding, moment, odd, running, generator = arena_of(
        EMBEDDING, MOMENT, ODD_ROWS, torch.full((5,), float(rank)), torch.arange(8, dtype=torch.uint8) + rank
    )
    bounds, odd_bounds = [(0, 4), (4, 8), (8, 10)][rank], [(0, 1673), (1673, 3347), (3347, 5021)][rank]
    chunks = [
        rows("model/0/embedding.weight", embedding, *bounds),
        rows("optimizer/0/state/embedding.weight/exp_avg", moment, *bounds),
        rows("model/0/odd.weight", odd, *odd_bounds),
        whole(f"model/0/{RUNNING}", running, per_rank=True),
        whole("rng/torch", generator, per_rank=True),
    ]
    if rank == 1:
        chunks += [whole(f"model/0/{name}", tensor) for name, tensor in of_every_dtype().items()]
        chunks += [whole("extra/ema/0/w", EMBEDDING)]
    return chunks


TIED = {"model/0/head.weight": "model/0/embedding.weight"}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For tests that only look."""
    folder = tmp_path_factory.mktemp("zarr") / "iter_0000007"
    save(folder, chunks_of_three, world_size=3, form="zarr", aliases=TIED)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "iter_0000007"
    small = [whole("model/0/embedding.weight", EMBEDDING), whole("rng/torch", torch.arange(8), per_rank=True)]
    save(path, lambda rank: small, form="zarr")
    return path


def read(folder: Path, key: str, shape: tuple[int, ...], offsets: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    out = torch.full(shape, 9).to(dtype)
    reader = open_checkpoint(folder, FS)
    reader.read([Target(key, out, offsets)])
    reader.close()
    return out


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# -- what others see --------------------------------------------------------------------------------------------------


def test_plain_zarr_in_a_plain_process_opens_every_tensor_bit_for_bit(written: Path, tmp_path: Path) -> None:
    script = f"""
import sys, zarr, numpy as np
group = zarr.open({str(written / "tensors.zarr")!r}, mode="r")
found = {{name: (array[...].tobytes().hex(), array.attrs["torch_dtype"], list(array.shape)) for name, array in
         group.arrays()}}
assert not any(name.split(".")[0] in ("resilience", "torch") for name in sys.modules)
import json; json.dump(found, open({str(tmp_path / "found.json")!r}, "w"))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=100)
    found = json.loads((tmp_path / "found.json").read_text())
    expected = {
        **of_every_dtype(),
        "embedding.weight": EMBEDDING,
        "odd.weight": ODD_ROWS,
        "optimizer.state.exp_avg.embedding.weight": MOMENT,
        RUNNING: torch.zeros(5),  # a buffer that differs is the lowest rank's
        "resilience%2Fextra%2Fema%2F0%2Fw": EMBEDDING,
    }
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        told = [bits(tensor).hex(), str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        assert found[name] == told, name


def test_the_files_and_the_metadata_are_those_of_the_contract(written: Path) -> None:
    assert {path.name for path in written.iterdir()} == {
        *("tensors.zarr", "objects", "common.pt", "metadata.json", "train_state.pt", "run_config.yaml"),
        *("resilience.json", "integrity.json", "integrity_nested.json"),
    }
    marker = json.loads((written / "metadata.json").read_text())
    assert (marker["sharded_backend"], marker["sharded_backend_version"]) == ("zarr", 3)
    array = json.loads((written / "tensors.zarr" / "embedding.weight" / "zarr.json").read_text())
    assert array["codecs"] == [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    assert array["chunk_grid"]["configuration"]["chunk_shape"] == [4, 4], "as long as the longest part"
    assert array["dimension_names"] == ["n10_0", "n4_1"]
    half = json.loads((written / "tensors.zarr" / "dtype.bfloat16" / "zarr.json").read_text())
    assert (half["data_type"], half["attributes"]) == ("uint16", {"torch_dtype": "bfloat16"})
    group = json.loads((written / "tensors.zarr" / "zarr.json").read_text())
    listed = group["consolidated_metadata"]["metadata"]
    assert listed["embedding.weight"] == array
    assert len(listed) == len(list((written / "tensors.zarr").glob("*/zarr.json")))
    for rank in range(3):
        (own,) = torch.load(written / "objects" / f"shard_{rank}_3.pt", weights_only=True)
        assert (own["values"], own["tensors"]["rng/torch"][0].item()) == (f'{{"rank": {rank}}}', rank)


def test_xarray_opens_the_group(written: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        opened = xarray.open_zarr(str(written / "tensors.zarr"), consolidated=True)
    assert np.array_equal(opened["embedding.weight"].values, EMBEDDING.numpy())


# -- what we read of ours ---------------------------------------------------------------------------------------------


def test_our_reader_gives_any_region_each_ranks_own_and_what_is_tied(written: Path) -> None:
    for name, tensor in of_every_dtype().items():
        got = read(written, f"model/0/{name}", tuple(tensor.shape), (0,) * tensor.dim(), tensor.dtype)
        assert bits(got) == bits(tensor), name
    assert torch.equal(read(written, "model/0/head.weight", (5, 2), (3, 1), torch.float32), EMBEDDING[3:8, 1:3])
    assert torch.equal(read(written, "extra/ema/0/w", (10, 4), (0, 0), torch.float32), EMBEDDING)
    assert torch.equal(
        read(written, "model/0/embedding.weight", (10, 4), (0, 0), torch.bfloat16), EMBEDDING.to(torch.bfloat16)
    )
    reader = open_checkpoint(written, FS)
    reader.verify()
    assert reader.aliases == TIED
    own = reader.rank_state(2)
    assert own is not None
    assert own.values == b'{"rank": 2}'
    assert torch.equal(own.tensors[f"model/0/{RUNNING}"], torch.full((5,), 2.0))
    assert reader.rank_state(3) is None
    needed = reader.files([Target("model/0/embedding.weight", torch.empty(2, 4), (5, 0))], rank=1)
    assert {name for name in needed if "/" in name} == {
        *("tensors.zarr/zarr.json", "tensors.zarr/embedding.weight/c/1/0", "objects/shard_1_3.pt"),
    }
    with pytest.raises(MissingKeysError, match="nothing"):
        reader.read([Target("model/0/nothing", torch.empty(1), (0,))])
    with pytest.raises(LayoutMismatchError, match=r"has shape \(10, 4\)"):
        reader.read([Target("model/0/embedding.weight", torch.empty(4, 4), (8, 0))])
    reader.close()


def test_load_checkpoint_gives_the_model(written: Path) -> None:
    model = torch.nn.Module()
    model.embedding, model.head = torch.nn.Embedding(10, 4), torch.nn.Linear(4, 10, bias=False)
    load_checkpoint(written, model)
    assert torch.equal(model.embedding.weight.detach(), EMBEDDING)
    assert torch.equal(model.head.weight.detach(), EMBEDDING)
    assert torch.equal(load_checkpoint(written)["odd.weight"], ODD_ROWS)


@given(st.text(min_size=1, max_size=300))
def test_any_key_has_a_folder_of_its_own(key: str) -> None:
    name = folder_of(key)
    assert "/" not in name
    assert name not in (".", "..", "zarr.json", "")
    assert not name.startswith((".", "__"))
    assert len(name.encode()) <= 255
    assert name.isprintable()
    assert folder_of(key + "x") != name


@pytest.mark.parametrize("name", ["a/b", "zarr.json", ".hidden", "__reserved", "c", "50%", "ü \n", "x" * 400])
def test_keys_that_are_no_file_names_come_back(tmp_path: Path, name: str) -> None:
    key = f"model/0/{name.replace('/', '~1')}"
    save(tmp_path / "a", lambda rank: [whole(key, EMBEDDING)], form="zarr")
    assert torch.equal(read(tmp_path / "a", key, (10, 4), (0, 0), torch.float32), EMBEDDING)
    (array,) = zarr.open_group(tmp_path / "a" / "tensors.zarr", mode="r").array_values()
    assert np.array_equal(array[...], EMBEDDING.numpy())


# -- how ranks write together -----------------------------------------------------------------------------------------


class Recording(PosixFileSystem):
    """Notes what each rank's file system was asked to write; `fail` decides which file breaks."""

    def __init__(self, fail: Callable[[Path], bool] = lambda path: False) -> None:
        self.written: list[Path] = []
        self.fail = fail

    def write_file(self, path: Path, chunks: Iterator[memoryview]) -> None:
        self.written.append(path)
        if self.fail(path):
            raise StoreError(f"no space for {path}")
        super().write_file(path, chunks)


def test_no_file_is_written_twice_and_chunks_on_a_cut_are_completed_by_one_rank(tmp_path: Path) -> None:
    fs = Recording()
    save(tmp_path / "a", chunks_of_three, world_size=3, form="zarr", fs=fs)
    assert len(fs.written) == len(set(fs.written))
    spilled = [path.name for path in fs.written if path.parent.name == ".parts"]
    assert spilled, "the odd rows make chunks with bytes of two ranks"
    assert not (tmp_path / "a" / ".parts").exists()
    assert not list((tmp_path / "a").rglob(".tmp-*"))
    assert torch.equal(read(tmp_path / "a", "model/0/odd.weight", (5021, 60), (0, 0), torch.float32), ODD_ROWS)
    listed = json.loads((tmp_path / "a" / "integrity_nested.json").read_text())["files"]
    there = {str(path.relative_to(tmp_path / "a")) for path in (tmp_path / "a").rglob("*") if path.is_file()}
    assert set(listed) == {name for name in there if "/" in name}


@pytest.mark.parametrize("broken", ["c", "shard_1_3.pt", "rank_0.bin", "zarr.json"])
def test_when_one_rank_cannot_write_all_ranks_hear_of_it(tmp_path: Path, broken: str) -> None:
    def fails(path: Path) -> bool:
        return path.name == broken or (broken == "c" and "odd.weight/c" in str(path))

    with pytest.raises(SaveFailedError, match="no space"):
        save(tmp_path / "a", chunks_of_three, world_size=3, form="zarr", fs=Recording(fails))
    assert foreign_problem(tmp_path / "a", FS), "what is left is no checkpoint"


def test_a_fragment_that_reads_otherwise_than_it_was_written_fails_the_save(tmp_path: Path) -> None:
    class Flipping(PosixFileSystem):
        def write_file(self, path: Path, chunks: Iterator[memoryview]) -> None:
            if path.parent.name == ".parts":
                content = bytearray(b"".join(chunks))
                content[0] ^= 1
                chunks = iter([memoryview(content)])
            super().write_file(path, chunks)

    with pytest.raises(SaveFailedError, match="reads otherwise"):
        save(tmp_path / "a", chunks_of_three, world_size=3, form="zarr", fs=Flipping())


@pytest.mark.parametrize(
    ("second", "words"),
    [
        (rows("model/0/w", EMBEDDING, 4, 10), "44 elements of 40|overlap"),
        (rows("model/0/w", EMBEDDING, 6, 10), "36 elements of 40"),
        (rows("model/0/w", EMBEDDING.double(), 5, 10), "Ranks disagree on w"),
        (rows("model/0/w", torch.zeros(11, 4), 5, 11), "Ranks disagree on w"),
    ],
)
def test_parts_that_do_not_fit_are_refused_on_all_ranks(tmp_path: Path, second: Chunk, words: str) -> None:
    first = rows("model/0/w", EMBEDDING, 0, 5)
    with pytest.raises(SaveFailedError, match=words):
        save(tmp_path / "a", lambda rank: [[first], [second]][rank], world_size=2, form="zarr")


# -- what others wrote ------------------------------------------------------------------------------------------------


def of_zarr(folder: Path, write: Callable[[Any], None], *, consolidated: bool = False) -> Path:
    """A checkpoint folder whose arrays zarr-python wrote."""
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(folder / "tensors.zarr", mode="w", zarr_format=3)
        write(group)
        if consolidated:
            zarr.consolidate_metadata(folder / "tensors.zarr")
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend_version": 3}')
    return folder


@pytest.mark.parametrize("consolidated", [True, False])
@pytest.mark.parametrize("encoding", [{"name": "default", "separator": "/"}, {"name": "v2", "separator": "."}])
@pytest.mark.parametrize("closing", [[], [Crc32cCodec()]])
def test_what_zarr_wrote_in_its_own_grids_is_read(
    tmp_path: Path, consolidated: bool, encoding: dict[str, str], closing: list[Any]
) -> None:
    def write(group: Any) -> None:
        fields = {"compressors": closing, "filters": None, "chunk_key_encoding": encoding}
        group.create_array("w", shape=(10, 4), chunks=(3, 3), dtype="float32", **fields)[...] = EMBEDDING.numpy()
        group.create_array("deep/inner", shape=(), dtype="int64", **fields)[...] = 5
        sparse = group.create_array("sparse", shape=(7, 2), chunks=(2, 2), dtype="float64", fill_value=np.nan, **fields)
        sparse[4:6] = 1.5
        half = group.create_array(
            "half", shape=(4,), chunks=(3,), dtype="uint16", attributes={"torch_dtype": "bfloat16"}, **fields
        )
        half[...] = torch.arange(4).to(torch.bfloat16).view(torch.uint16).numpy()

    folder = of_zarr(tmp_path / "iter_0000003", write, consolidated=consolidated)
    assert foreign_problem(folder, FS) == ""
    loaded = load_checkpoint(folder)
    assert torch.equal(loaded["w"], EMBEDDING)
    assert loaded["deep/inner"].item() == 5
    assert loaded["sparse"].isnan().sum() == 10
    assert torch.equal(loaded["sparse"][4:6], torch.full((2, 2), 1.5, dtype=torch.float64))
    assert torch.equal(loaded["half"], torch.arange(4).to(torch.bfloat16))
    assert torch.equal(read(folder, "model/0/w", (4, 2), (2, 1), torch.float32), EMBEDDING[2:6, 1:3])
    chunks = {item.key: len(item.chunks) for item in stored_items(folder, FS)}
    assert (chunks["w"], chunks["sparse"]) == (8, 1)
    assert list(folder_damage(folder, FS, deep=True)) == []


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"compressors": [ZstdCodec()]}, r"codecs \['bytes', 'zstd'\]; read are bytes and crc32c"),
        ({"compressors": None, "shards": (10, 4)}, "sharding_indexed"),
        ({"compressors": None, "serializer": BytesCodec(endian="big")}, "endian is big"),
    ],
)
def test_other_codecs_are_refused_in_words(tmp_path: Path, fields: dict[str, Any], words: str) -> None:
    def write(group: Any) -> None:
        array = group.create_array("w", shape=(10, 4), chunks=(5, 4), dtype="float32", **fields)
        array[...] = EMBEDDING.numpy()

    folder = of_zarr(tmp_path / "iter_0000003", write)
    with pytest.raises(CorruptCopyError, match=words):
        open_checkpoint(folder, FS)


# -- damage and lies --------------------------------------------------------------------------------------------------


def test_a_flipped_bit_is_found_by_the_chunks_checksum_and_by_our_digests(folder: Path) -> None:
    chunk = folder / "tensors.zarr" / "embedding.weight" / "c" / "0" / "0"
    content = bytearray(chunk.read_bytes())
    content[17] ^= 4
    chunk.write_bytes(content)
    with pytest.raises(CorruptCopyError, match="does not match its CRC-32C"):
        read(folder, "model/0/embedding.weight", (1, 1), (9, 3), torch.float32)
    with pytest.raises(CorruptCopyError, match="does not match its SHA-256"):
        open_checkpoint(folder, FS).verify()
    assert list(folder_damage(folder, FS, deep=False)) == []
    ((damaged, _),) = folder_damage(folder, FS, deep=True)
    assert damaged == chunk
    with pytest.raises(ValueError, match="checksum"):
        zarr.open(folder / "tensors.zarr", mode="r")["embedding.weight"][...]


@pytest.mark.parametrize(
    "name",
    [
        *("metadata.json", "common.pt", "integrity.json", "integrity_nested.json", "tensors.zarr/zarr.json"),
        *("tensors.zarr/embedding.weight/c/0/0", "tensors.zarr/embedding.weight/zarr.json", "objects/shard_0_1.pt"),
    ],
)
def test_a_folder_that_lacks_a_file_is_incomplete(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert re.search("is missing|has neither", foreign_problem(folder, FS))
    with pytest.raises(CorruptCopyError):
        open_checkpoint(folder, FS)


def small_array(**changes: Any) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [10, 4],
        "data_type": "float32",
        "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [10, 4]}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        "attributes": {},
        **changes,
    }


def lying(folder: Path, arrays: dict[str, Any], **group: Any) -> Path:
    (folder / "tensors.zarr").mkdir(parents=True)
    document = {"zarr_format": 3, "node_type": "group", "attributes": {}, **group}
    document["consolidated_metadata"] = {"kind": "inline", "metadata": arrays}
    (folder / "tensors.zarr" / "zarr.json").write_text(json.dumps(document))
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"shape": [1 << 61]}, "shape is"),
        ({"shape": [-1, 4]}, "shape is"),
        ({"shape": [10]}, "chunk_shape of shape"),
        ({"shape": [1 << 40, 4]}, "more than"),
        ({"chunk_grid": {"name": "rectilinear", "configuration": {}}}, "chunk_grid is"),
        ({"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [0, 4]}}}, "chunk_shape is"),
        ({"data_type": "object"}, "data_type is object"),
        ({"data_type": {"name": "numpy.datetime64"}}, "data_type is"),
        ({"attributes": {"torch_dtype": "bfloat16"}}, "torch_dtype of data_type float32 is bfloat16"),
        ({"attributes": {"key": 3}}, "key is 3"),
        ({"fill_value": "0x7fc00000"}, "fill_value is 0x7fc00000"),
        ({"codecs": []}, "codecs"),
        ({"codecs": [{"name": "transpose"}, {"name": "bytes"}]}, "transpose"),
        ({"chunk_key_encoding": {"name": "suffix"}}, "chunk_key_encoding is"),
        ({"storage_transformers": [{"name": "x"}]}, "storage_transformers is"),
    ],
)
def test_metadata_that_lie_or_say_what_is_not_read_are_refused(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    folder = lying(tmp_path / "a", {"w": small_array(**changes)})
    assert words in foreign_problem(folder, FS)


@pytest.mark.parametrize("name", ["../outside", "a//b", "..", "/etc", "a/./b"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    folder = lying(tmp_path / "a", {name: small_array()})
    with pytest.raises(CorruptCopyError, match="no folder in it"):
        open_checkpoint(folder, FS)


def test_two_arrays_for_one_key_and_aliases_of_nothing_are_refused(tmp_path: Path) -> None:
    twice = {"w": small_array(), "v": small_array(attributes={"key": "w"})}
    assert "two arrays for w" in foreign_problem(lying(tmp_path / "a", twice), FS)
    alias = {"attributes": {"aliases": {"v": "nothing"}}}
    assert "aliases" in foreign_problem(lying(tmp_path / "b", {"w": small_array()}, **alias), FS)


def test_a_chunk_of_another_length_and_a_folder_that_is_a_link_are_refused(tmp_path: Path) -> None:
    folder = lying(tmp_path / "a", {"w": small_array(), "v": small_array()})
    (folder / "tensors.zarr" / "w" / "c" / "0").mkdir(parents=True)
    (folder / "tensors.zarr" / "w" / "c" / "0" / "0").write_bytes(bytes(159))
    with pytest.raises(CorruptCopyError, match="has 159 bytes"):
        read(folder, "model/0/w", (10, 4), (0, 0), torch.float32)
    outside = tmp_path / "outside" / "c" / "0"
    outside.mkdir(parents=True)
    (outside / "0").write_bytes(bytes(160))
    (folder / "tensors.zarr" / "v").symlink_to(tmp_path / "outside")
    with pytest.raises(UnsafePathError, match="link"):
        read(folder, "model/0/v", (10, 4), (0, 0), torch.float32)


# -- without the extra ------------------------------------------------------------------------------------------------


def test_without_the_extra_a_start_and_a_load_say_what_to_install(folder: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "google_crc32c", None)
    zarr_checksum._extend.cache_clear()  # of a process in which it was there
    (refusal,) = unsupported(CheckpointConfig(ckpt_format="zarr"), ResiliencyConfig())
    assert "pip install torch-resilience[zarr]" in str(refusal)
    assert unsupported(CheckpointConfig(), ResiliencyConfig()) == []
    with pytest.raises(ConfigError, match=r"pip install torch-resilience\[zarr\]"):
        load_checkpoint(folder)
    assert [item.key for item in stored_items(folder, FS)] == ["embedding.weight", "objects/shard_0_1.pt"]
    assert list(folder_damage(folder, FS, deep=True)) == []
