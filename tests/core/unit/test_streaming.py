"""Copies around the cache: every byte at its place, none beside it; and what becomes of a library that is no good."""

from __future__ import annotations

import ctypes
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resilience.snapshot import streaming
from resilience.snapshot.streaming import STREAMING, addresses, find_streaming

SOURCE = Path(streaming.__file__).with_name("streaming.c")
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (cc) on this machine")


def compiled(folder: Path, source: str) -> Path:
    (folder / "changed.c").write_text(source, encoding="utf-8")
    command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(folder / "_streaming.so"), str(folder / "changed.c")]
    subprocess.run(command, check=True, timeout=60)
    return folder


@pytest.fixture(params=["much", "little"])
def copy(request: pytest.FixtureRequest) -> Any:
    if STREAMING.much is None:
        pytest.skip(STREAMING.why)
    return getattr(STREAMING, request.param)


@needs_compiler
def test_where_there_is_a_compiler_the_installed_package_has_it() -> None:
    assert STREAMING.much is not None, STREAMING.why


def test_blocks_at_all_places_arrive_and_nothing_beside_them_changes(copy: Any) -> None:
    draw = random.Random(3)
    for _ in range(200):
        sizes = [draw.choice((draw.randrange(1, 300), draw.randrange(4000, 4400), draw.randrange(1, 40_000)))
                 for _ in range(draw.randrange(1, 12))]  # fmt: skip
        room = sum(sizes) + 100 * len(sizes)
        source = np.frombuffer(draw.randbytes(room), dtype=np.uint8)
        target, expected = np.full(room, 7, dtype=np.uint8), np.full(room, 7, dtype=np.uint8)
        to, origins, place = [], [], 0
        for size in sizes:
            begin, place = place + draw.randrange(100), place + size + 100
            origin = draw.randrange(room - size)
            to.append(target.ctypes.data + begin)
            origins.append(source.ctypes.data + origin)
            expected[begin : begin + size] = source[origin : origin + size]
        copy(addresses(to), addresses(origins), addresses(sizes))
        assert np.array_equal(target, expected)


def test_arrays_of_unequal_lengths_are_refused(copy: Any) -> None:
    with pytest.raises(ValueError, match="2 targets, 1 origins and 1 sizes"):
        copy(addresses([0, 0]), addresses([0]), addresses([1]))


def test_nothing_outside_of_mapped_memory_is_touched(copy: Any) -> None:
    """A block that ends where its pages end, and one that begins there."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page, pages = 4096, 5
    places = [libc.mmap(None, (pages + 2) * page, 3, 0x22, -1, 0) for _ in range(2)]  # private, of nobody's file
    for place in places:
        assert libc.mprotect(place, page, 0) == 0
        assert libc.mprotect(place + (pages + 1) * page, page, 0) == 0
    first, second = (place + page for place in places)
    content = random.Random(4).randbytes(pages * page)
    ctypes.memmove(first, content, len(content))
    for start, size in ((0, pages * page), (1, pages * page - 1), (pages * page - 4097, 4097), (63, 4096)):
        copy(addresses([second + start]), addresses([first + start]), addresses([size]))
        assert ctypes.string_at(second + start, size) == content[start : start + size]
    for place in places:
        libc.munmap(place, (pages + 2) * page)


@needs_compiler
@pytest.mark.parametrize(
    ("there", "instead"),
    [
        ("memcpy(to, from, head);", ""),
        ("memcpy(to, from, bytes);", ""),
        ("_mm_stream_si128(target + 2, third);", "_mm_stream_si128(target + 2, second);"),
        ("memcpy(target, source, (size_t)bytes[i]);", "memcpy(target, source, (size_t)bytes[i] + 1);"),
        ("if (bytes[i] < large)", "if (i == 3) continue; else if (bytes[i] < large)"),
    ],
)
def test_a_library_that_copies_wrongly_is_not_used(tmp_path: Path, there: str, instead: str) -> None:
    text = SOURCE.read_text(encoding="utf-8")
    assert there in text
    found = find_streaming(compiled(tmp_path, text.replace(there, instead)))
    assert found.much is None
    assert "does not copy what it is given" in found.why


@needs_compiler
def test_a_library_of_other_arguments_is_not_used(tmp_path: Path) -> None:
    text = SOURCE.read_text(encoding="utf-8").replace("resilience_copy_blocks_1", "resilience_copy_blocks_0")
    assert "cannot be used" in find_streaming(compiled(tmp_path, text)).why


def test_what_is_no_library_is_not_used(tmp_path: Path) -> None:
    assert "not compiled" in find_streaming(tmp_path).why
    (tmp_path / "_streaming.abi3.so").write_bytes(b"of another machine")
    found = find_streaming(tmp_path)
    assert found.much is None
    assert "cannot be used" in found.why


@needs_compiler
def test_a_processor_without_such_stores_copies_plainly(tmp_path: Path) -> None:
    text = SOURCE.read_text(encoding="utf-8").replace("defined(__SSE2__)", "0")
    assert find_streaming(compiled(tmp_path, text)).much is not None
