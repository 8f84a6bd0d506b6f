"""A tensor's archive, filled into a frame that was made before, is what `torch.save` writes, but for its own id."""

from __future__ import annotations

import io
import sys
import threading
import zipfile
import zlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.formats import archive_frame
from resilience.formats.archive_frame import framed
from resilience.formats.torch_archive import archive_of, archive_of_one, as_own_storage, tensor_in

DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
    torch.int32, torch.int8, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
    torch.complex64, torch.complex128,
)  # fmt: skip
SHAPES = ((), (1,), (3, 5), (2, 1, 4), (70_001,), (256, 129))


def some(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = torch.empty(shape, dtype=dtype).nbytes
    high = 2 if dtype == torch.bool else 256
    content = torch.randint(0, high, (max(1, count),), dtype=torch.uint8, generator=generator)
    return as_own_storage(content.view(dtype).reshape(shape) if count else torch.empty(shape, dtype=dtype))


def entries(archive: bytes) -> dict[str, bytes]:
    """By name; zipfile compares each with its CRC-32."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def joined(pieces: list[memoryview] | None) -> bytes:
    assert pieces is not None, "this torch lays archives out in a way that frames are not made for"
    return b"".join(pieces)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_has_what_torch_save_would_have_written(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = some(dtype, shape)
    ours, theirs = joined(framed(tensor)), joined(archive_of(tensor, [tensor]))
    assert len(ours) == len(theirs)
    found, wanted = entries(ours), entries(theirs)
    assert list(found) == list(wanted)
    assert {name for name in found if found[name] != wanted[name]} <= {"archive/.data/serialization_id"}
    loaded = torch.load(io.BytesIO(ours), weights_only=True)
    assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
    assert loaded.reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8))
    lying, in_place = tensor_in(memoryview(bytearray(ours)), "it", (dtype, tensor.shape))
    assert in_place
    assert lying.dtype == dtype


@given(st.integers(1, 3000), st.integers(0, 1000), st.sampled_from(DTYPES))
@settings(max_examples=60, deadline=None)
def test_equal_tensors_give_equal_archives_and_others_do_not(count: int, seed: int, dtype: torch.dtype) -> None:
    first, other = some(dtype, (count,), seed), some(dtype, (count,), seed + 1)
    same = torch.equal(first.view(torch.uint8), other.view(torch.uint8))
    assert joined(framed(first)) == joined(framed(first.clone()))
    assert (joined(framed(first)) == joined(framed(other))) == same


def test_the_tensors_bytes_are_not_copied() -> None:
    tensor = some(torch.float32, (70_001,))
    pieces = framed(tensor)
    assert pieces is not None
    assert sum(len(piece) for piece in pieces) - len(pieces[1]) < 4096
    tensor[5] = 7.0
    assert bytes(pieces[1][20:24]) == bytes(tensor[5:6].view(torch.uint8).tolist())


def test_frames_are_bounded_in_number_and_threads_get_their_own_archives() -> None:
    for count in range(1, archive_frame._KEPT + 50):
        joined(framed(some(torch.uint8, (count,))))
    assert len(archive_frame._FRAMES._made) == archive_frame._KEPT
    wrong: list[int] = []

    def make(seed: int) -> None:
        for count in (3, 1000, 7):
            tensor = some(torch.int64, (count,), seed)
            if not torch.equal(torch.load(io.BytesIO(joined(framed(tensor))), weights_only=True), tensor):
                wrong.append(seed)

    threads = [threading.Thread(target=make, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


@pytest.mark.parametrize("broken", ["absolute seek", "no gap", "no such argument", "another layout"])
def test_where_torch_lays_it_out_in_another_way_it_is_torch_that_writes(
    broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = torch.save

    def other(stored: Any, sink: Any) -> None:
        if isinstance(sink, archive_frame._Sink):
            if broken == "absolute seek":
                sink.seek(10)
            if broken == "no such argument":
                raise AttributeError("skip_data")
            if broken == "no gap":
                sink.write(memoryview(b"all of it"))
                return
            if broken == "another layout":
                sink.write(memoryview(b"head"))
                sink.seek(stored.nbytes, 1)
                sink.write(memoryview(b"tail"))
                return
        save(stored, sink)

    monkeypatch.setattr(torch, "save", other)
    monkeypatch.setattr(archive_frame, "_FRAMES", archive_frame._Frames())
    tensor = some(torch.float32, (9,))
    assert framed(tensor) is None
    assert torch.equal(torch.load(io.BytesIO(joined(archive_of_one(tensor))), weights_only=True), tensor)


def test_without_the_extra_zlib_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = some(torch.float32, (99,))
    quick = joined(framed(tensor))
    monkeypatch.setitem(sys.modules, "fastcrc.crc32", None)
    archive_frame._crc32.cache_clear()  # of a process in which it was there
    try:
        assert archive_frame._crc32() is zlib.crc32
        assert joined(framed(tensor)) == quick
    finally:
        archive_frame._crc32.cache_clear()


def test_an_empty_tensor_is_written_as_ever() -> None:
    tensor = as_own_storage(torch.empty((0, 3)))
    assert torch.load(io.BytesIO(joined(archive_of_one(tensor))), weights_only=True).shape == (0, 3)


def test_an_archive_that_a_frame_fits_is_read_without_being_taken_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = some(torch.bfloat16, (31, 7))
    expected = (tensor.dtype, tensor.shape)
    content = bytearray(joined(archive_of(tensor, [tensor])))
    monkeypatch.setattr(archive_frame, "_FRAMES", archive_frame._Frames())
    assert archive_frame.lying_in(memoryview(content), *expected) is None, "none was made as yet"
    first, _ = tensor_in(memoryview(content), "it", expected)
    monkeypatch.setattr(torch, "load", None)
    again, in_place = tensor_in(memoryview(content), "it", expected)
    assert in_place
    assert again.view(torch.uint8).equal(first.view(torch.uint8))
    assert archive_frame.lying_in(memoryview(content), torch.float16, tensor.shape) is None
    assert archive_frame.lying_in(memoryview(content), torch.bfloat16, torch.Size([7, 31])) is None


def test_one_that_differs_in_what_says_where_its_bytes_lie_is_taken_apart_as_ever() -> None:
    """Every byte but the tensor's own is flipped in turn: what is read is what torch would load, or it is refused."""
    tensor = some(torch.int32, (5,))
    expected = (tensor.dtype, tensor.shape)
    whole = joined(framed(tensor))
    start = whole.index(bytes(tensor.view(torch.uint8).tolist()))
    fitting = 0
    for at in (*range(start), *range(start + tensor.nbytes, len(whole))):
        content = bytearray(whole)
        content[at] ^= 0x21
        quick = archive_frame.lying_in(memoryview(content), *expected)
        if at < start:
            assert quick is None, at
        if quick is not None:
            fitting += 1
            assert torch.equal(quick, tensor)
    assert fitting < len(whole) - start, "the archive's end is compared too"
