"""Files that somebody prepared: nothing in them runs, no path leaves the folder, no length is believed."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import resource
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from resilience.errors import CorruptCopyError, UnsafePathError
from resilience.formats.dcp_metadata import parse_metadata
from resilience.formats.directory import damaged_files
from resilience.formats.folder_files import read_train_state
from resilience.formats.loader_files import encode_loader, read_loader
from resilience.formats.protocol import Target
from resilience.formats.registry import checkpoint_format, foreign_problem
from resilience.formats.torch_archive import read_archive, saved_bytes
from resilience.formats.torch_dist_reader import TorchDistReader
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.trackers import read_tracker, step_of
from tests.formats.worlds import save, whole

FS = PosixFileSystem()


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "iter_0000007"
    save(path, lambda rank: [whole("model/0/w", torch.arange(1000.0))])
    return path


def rewrite(folder: Path, change: Callable[[Metadata], None]) -> None:
    metadata = FileSystemReader(folder).read_metadata()
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def test_a_pickle_that_would_run_something_is_refused_and_runs_nothing(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (folder / ".metadata").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(CorruptCopyError, match="mkdir"):
        TorchDistReader(folder, FS)
    assert not marker.exists()


@pytest.mark.parametrize("place", ["planner_data", "storage_meta", "version"])
def test_nor_does_one_that_hides_it_in_a_field(folder: Path, tmp_path: Path, place: str) -> None:
    marker = tmp_path / "ran"
    rewrite(folder, lambda metadata: setattr(metadata, place, Bomb(marker)))
    with pytest.raises(CorruptCopyError):
        TorchDistReader(folder, FS)
    assert not marker.exists()


def test_a_tensor_file_that_would_run_something_is_refused(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    torch.save([Bomb(marker), torch.zeros(1000)], folder / "__0_0.distcp")
    nbytes = (folder / "__0_0.distcp").stat().st_size

    def everything_is_the_bomb(metadata: Metadata) -> None:
        metadata.storage_data = {index: _StorageInfo("__0_0.distcp", 0, nbytes) for index in metadata.storage_data}

    rewrite(folder, everything_is_the_bomb)
    reader = TorchDistReader(folder, FS)
    with pytest.raises(CorruptCopyError, match="refused"):
        reader.read([Target("model/0/w", torch.zeros(1000), (0,))])
    with pytest.raises(CorruptCopyError, match="refused"):
        reader.rank_state(0)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "..", "a/b", "", "x\0y"])
def test_a_path_that_leaves_the_folder_is_refused(folder: Path, name: str) -> None:
    def point_elsewhere(metadata: Metadata) -> None:
        for info in metadata.storage_data.values():
            info.relative_path = name

    rewrite(folder, point_elsewhere)
    with pytest.raises(UnsafePathError, match="not one of its folder"):
        TorchDistReader(folder, FS)
    (folder / "resilience.json").unlink()
    assert "not one of its folder" in checkpoint_format("torch_dist").problem(folder, FS)


def test_a_link_in_place_of_a_file_is_not_followed(folder: Path, tmp_path: Path) -> None:
    real = tmp_path / "elsewhere"
    (folder / "__0_0.distcp").rename(real)
    (folder / "__0_0.distcp").symlink_to(real)
    assert "__0_0.distcp" in checkpoint_format("torch_dist").problem(folder, FS)


def _with_tensor(change: Callable[[TensorStorageMetadata], None]) -> Callable[[Metadata], None]:
    def rewritten(metadata: Metadata) -> None:
        entry = metadata.state_dict_metadata["w"]
        assert isinstance(entry, TensorStorageMetadata)
        change(entry)

    return rewritten


def _size(*shape: int) -> Callable[[TensorStorageMetadata], None]:
    return lambda entry: setattr(entry, "size", torch.Size(shape))


def _chunk(offset: int, length: int) -> Callable[[TensorStorageMetadata], None]:
    return lambda entry: setattr(entry, "chunks", [ChunkStorageMetadata(torch.Size([offset]), torch.Size([length]))])


def _both(entry: TensorStorageMetadata) -> None:
    _size(10**12)(entry)
    _chunk(0, 10**12)(entry)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_size(10**15), "do not cover"),
        (_size(999), "lies outside"),
        (_size(1000, 1), "lies outside"),
        (_chunk(1, 1000), "lies outside"),
        (_chunk(0, 999), "do not cover"),
        (_both, "claims"),
        (lambda entry: setattr(entry, "properties", TensorProperties(dtype=torch.complex128)), "claims"),
        (lambda entry: setattr(entry, "properties", None), "no dtype"),
        (lambda entry: setattr(entry, "chunks", 7), "no list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_sizes_that_do_not_fit_each_other_are_refused_before_anything_is_allocated(
    folder: Path, change: Callable[[TensorStorageMetadata], None], words: str
) -> None:
    rewrite(folder, _with_tensor(change))
    with pytest.raises(CorruptCopyError, match=words):
        TorchDistReader(folder, FS)


@pytest.mark.parametrize(("offset", "length"), [(0, 10**9), (10**9, 1000), (-5, 1000), (0, -1)])
def test_a_length_beyond_the_file_is_refused(folder: Path, offset: int, length: int) -> None:
    def lie(metadata: Metadata) -> None:
        metadata.storage_data[MetadataIndex("w", [0])] = _StorageInfo("__0_0.distcp", offset, length)

    rewrite(folder, lie)
    with pytest.raises(CorruptCopyError):
        TorchDistReader(folder, FS).read([Target("model/0/w", torch.zeros(1000), (0,))])


def test_a_tensor_of_another_shape_than_announced_is_refused(folder: Path) -> None:
    torch.save(torch.zeros(500, dtype=torch.float64), folder / "__0_0.distcp")

    def replaced(metadata: Metadata) -> None:
        nbytes = (folder / "__0_0.distcp").stat().st_size
        metadata.storage_data[MetadataIndex("w", [0])] = _StorageInfo("__0_0.distcp", 0, nbytes)

    rewrite(folder, replaced)
    with pytest.raises(CorruptCopyError, match=r"is torch.float64 \(500,\); .metadata says float32 \(1000,\)"):
        TorchDistReader(folder, FS).read([Target("model/0/w", torch.zeros(1000), (0,))])


@given(st.data())
def test_no_flipped_byte_of_metadata_raises_anything_but_our_errors(data: st.DataObject) -> None:
    content = bytearray(_METADATA)
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    try:
        index = parse_metadata(bytes(content), "it")
    except (CorruptCopyError, UnsafePathError):
        return
    assert all(Path(file).name == file for file in index.file_bytes), "none leads out of the folder"
    chunks = [chunk for region in index.tensors.values() for chunk in region.chunks]
    assert all(min(chunk.extent.start, chunk.extent.nbytes, *chunk.offsets, *chunk.sizes) >= 0 for chunk in chunks)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_in_words(content: bytes) -> None:
    for parse in (parse_metadata, step_of):
        with pytest.raises(CorruptCopyError, match="it"):
            parse(content, "it")


def _some_metadata() -> bytes:
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([2, 3]))
    entry = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([2, 3]), [chunk])
    index = MetadataIndex("w", [0, 0])
    metadata = Metadata({"w": entry}, storage_data={index: _StorageInfo("__0_0.distcp", 0, 2000)})
    return pickle.dumps(dataclasses.replace(metadata, version="1.0.0"))


_METADATA = _some_metadata()


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"[]",
        b'{"algorithm": "md5", "files": {}}',
        json.dumps({"algorithm": "sha256", "files": {"../x": "00"}}).encode(),
        json.dumps({"algorithm": "sha256", "files": {"x": 7}}).encode(),
    ],
)
def test_an_integrity_file_that_is_not_one_is_refused(folder: Path, content: bytes) -> None:
    (folder / "integrity.json").write_bytes(content)
    with pytest.raises(CorruptCopyError, match=r"integrity\.json"):
        list(damaged_files(folder, FS))


def test_every_damaged_file_is_listed_with_its_reason(folder: Path) -> None:
    (folder / "common.pt").unlink()
    (folder / "run_config.yaml").write_text("")
    assert [name for name, _ in damaged_files(folder, FS)] == ["common.pt", "run_config.yaml"]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "neither metadata.json nor .metadata"),
        ({".metadata": b""}, ".metadata"),
        ({".metadata": b"", "common.pt": b""}, "metadata.json is missing beside common.pt"),
        ({"metadata.json": b'{"sharded_backend": "zarr"}'}, "tensors.zarr/zarr.json is missing"),
        ({"metadata.json": b'{"sharded_backend": "hdf5"}'}, "'hdf5' is not one"),
        ({"metadata.json": b'{"sharded_backend": "torch_dist"}'}, ".metadata is missing"),
    ],
)
def test_a_foreign_folder_says_what_it_lacks(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    assert words in foreign_problem(tmp_path, FS)


def test_common_pt_that_would_run_something_is_refused(folder: Path, tmp_path: Path) -> None:
    torch.save({"iteration": 7, "content_metadata": Bomb(tmp_path / "ran")}, folder / "common.pt")
    with pytest.raises(CorruptCopyError, match=r"common\.pt is refused"):
        _ = TorchDistReader(folder, FS).common
    assert not (tmp_path / "ran").exists()


def test_train_state_pt_that_would_run_something_is_refused(folder: Path, tmp_path: Path) -> None:
    torch.save({"step": torch.tensor(7), "do_train": Bomb(tmp_path / "ran")}, folder / "train_state.pt")
    with pytest.raises(CorruptCopyError, match=r"train_state\.pt is refused"):
        read_train_state(folder, FS)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("counter", [torch.zeros(3), "7", None, torch.tensor(1.5), torch.tensor(float("nan"))])
def test_a_counter_that_is_none_is_refused(folder: Path, counter: object) -> None:
    torch.save({"step": torch.tensor(7), "consumed_train_samples": counter}, folder / "train_state.pt")
    with pytest.raises(CorruptCopyError, match="for consumed_train_samples, which is no counter"):
        read_train_state(folder, FS)


def test_counters_in_wider_types_are_read_and_those_that_are_absent_are_zero(folder: Path) -> None:
    stored = {"step": torch.tensor(7), "floating_point_operations_so_far": torch.tensor(1e30, dtype=torch.float64)}
    torch.save(stored, folder / "train_state.pt")
    counters = read_train_state(folder, FS)
    assert counters is not None
    assert (counters["step"], counters["floating_point_operations_so_far"]) == (7, 1e30)
    assert (counters["skipped_train_samples"], counters["do_valid"]) == (0, False)
    (folder / "train_state.pt").unlink()
    assert read_train_state(folder, FS) is None


@pytest.mark.parametrize("name", ["latest_train_state.pt", "latest_checkpointed_iteration.txt"])
def test_a_tracker_that_would_run_something_is_not_believed_and_said(tmp_path: Path, name: str) -> None:
    torch.save({"step": Bomb(tmp_path / "ran")}, tmp_path / name)
    tracker = read_tracker(tmp_path, FS)
    assert tracker.names is None
    assert name in tracker.notes[0]
    assert not (tmp_path / "ran").exists()


def test_an_archive_that_unfolds_to_more_than_it_has_is_refused_before_it_does(tmp_path: Path) -> None:
    small = io.BytesIO()
    torch.save(torch.zeros(4), small)
    bomb = io.BytesIO()
    with zipfile.ZipFile(small) as source, zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            content = source.read(entry)
            target.writestr(entry.filename, bytes(1 << 28) if entry.filename.endswith("data/0") else content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptCopyError, match="compressed"):
        read_archive(memoryview(bomb.getvalue()), "it")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 17, "in KiB"


def test_an_archive_whose_tensor_claims_more_elements_than_it_has_is_refused() -> None:
    honest = io.BytesIO()
    torch.save(torch.arange(4), honest)
    lying = io.BytesIO()
    with zipfile.ZipFile(honest) as source, zipfile.ZipFile(lying, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                content = content.replace(b"K\x04", b"J\x00\x00\x00\x01")  # 16,777,216 elements
            target.writestr(entry.filename, content)
    with pytest.raises(CorruptCopyError, match="refused"):
        read_archive(memoryview(lying.getvalue()), "it")


@pytest.mark.parametrize("content", [b"", b"PK", pickle.dumps([1]), b"\0" * 1000])
def test_what_is_no_archive_is_refused(content: bytes) -> None:
    with pytest.raises(CorruptCopyError, match="it is refused"):
        read_archive(memoryview(content), "it")


def test_a_sub_folder_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    path, outside = tmp_path / "iter_0000007", tmp_path / "outside"
    save(path, lambda rank: [], files={0: {"tokenizer/vocab.txt": b"a"}})
    (path / "tokenizer").rename(outside)
    (path / "tokenizer").symlink_to(outside)
    with pytest.raises(CorruptCopyError, match="a link is not followed"):
        TorchDistReader(path, FS).verify()
    (path / "dataloader_state").symlink_to(outside)
    (outside / "train_dataloader_dprank000.pt").write_bytes(encode_loader(1))
    assert read_loader(path, FS, 0, 1) == (None, "the checkpoint has none")


@given(st.data())
def test_no_flipped_byte_of_an_archive_raises_anything_but_our_error(data: st.DataObject) -> None:
    content = bytearray(saved_bytes([{"values": "{}", "tensors": {"a": torch.arange(3)}}]))
    for position in data.draw(st.lists(st.integers(0, len(content) - 1), min_size=1, max_size=4)):
        content[position] = data.draw(st.integers(0, 255))
    try:
        found = read_archive(memoryview(bytes(content)), "it")
    except CorruptCopyError:
        return
    assert len(saved_bytes(found)) <= 2 * len(content), "what is read out of it is no larger than it was"
