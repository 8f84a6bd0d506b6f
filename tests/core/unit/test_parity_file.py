"""The file that parity lies in: read back as it was written, and refused when anything in its header is not so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from resilience.errors import CorruptCopyError
from resilience.planning.erasure import LARGEST_CLIQUE, Code
from resilience.planning.inventory import ParityCover
from resilience.stores.digest import digest_of
from resilience.stores.parity_file import (
    ParityHeader,
    check_parity_header,
    parity_bounds,
    parity_header,
    read_parity_header,
)
from tests.core.shards import SAVE, record_of


def header_of(members: int = 4, parities: int = 2, longest: int = 1000, index: int = 1) -> ParityHeader:
    ranks = tuple(3 * member for member in range(members))
    sizes = tuple(max(1, longest - member) for member in range(members))
    digests = tuple(digest_of(bytes([member])) for member in range(members))
    return ParityHeader("run", SAVE, index, 3 * members, ParityCover(parities, ranks, sizes, digests))


def file_of(header: ParityHeader) -> bytes:
    cover = header.cover
    head = parity_header(header)
    nbytes = Code(len(cover.members), cover.parities).file_bytes(max(cover.nbytes))
    return head + bytes(number % 251 for number in range(nbytes - len(head)))


@given(st.integers(3, 8), st.integers(1, 2), st.integers(1, 5000))
def test_a_parity_file_says_what_it_was_made_of(members: int, parities: int, longest: int) -> None:
    header = header_of(members, parities, longest)
    content = file_of(header)
    assert read_parity_header(memoryview(content), "it") == header
    record = record_of(content, 3, 3 * members, role="parity", cover=header.cover)
    check_parity_header(header, record, "it")
    assert parity_bounds(header.cover, parities - 1)[1] == len(content)


def test_the_header_of_the_largest_clique_with_the_longest_names_fits_its_room() -> None:
    ranks = tuple(range((1 << 20) - LARGEST_CLIQUE, 1 << 20))
    cover = ParityCover(2, ranks, ((1 << 60),) * LARGEST_CLIQUE, (digest_of(b""),) * LARGEST_CLIQUE)
    header = ParityHeader("r" * 128, SAVE, LARGEST_CLIQUE - 1, 1 << 20, cover)
    assert len(parity_header(header)) == Code(LARGEST_CLIQUE, 2).header_bytes


def test_it_opens_as_safetensors(tmp_path: Path) -> None:
    content = file_of(header_of())
    (tmp_path / "parity.safetensors").write_bytes(content)
    with safe_open(tmp_path / "parity.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["p", "q"]
        start, stop = parity_bounds(header_of().cover, 1)
        assert bytes(file.get_tensor("q").numpy()) == content[start:stop]
        assert json.loads(file.metadata()["resilience"])["members"] == "0,3,6,9"


@given(st.data())
def test_any_flipped_byte_of_its_header_is_noticed(data: st.DataObject) -> None:
    header = header_of()
    content = bytearray(file_of(header))
    place = data.draw(st.integers(0, Code(4, 2).header_bytes - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    try:
        seen = read_parity_header(memoryview(bytes(content)), "it")
    except CorruptCopyError:
        return
    with pytest.raises(CorruptCopyError):  # another rank, size or digest: its record tells
        check_parity_header(seen, record_of(bytes(content), 3, 12, role="parity", cover=header.cover), "it")


@given(st.binary(max_size=200), st.integers(0, 1 << 64))
def test_anything_else_is_no_parity(content: bytes, size: int) -> None:
    for each in (content, (size % (1 << 64)).to_bytes(8, "little") + content):
        with pytest.raises(CorruptCopyError):
            read_parity_header(memoryview(each), "it")


@given(st.integers(0, 9000))
def test_a_torn_one_is_refused(length: int) -> None:
    content = file_of(header_of())
    if length < len(content):
        with pytest.raises(CorruptCopyError):
            read_parity_header(memoryview(content)[:length], "it")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("index", 4), ("index", True), ("iteration", "7"), ("members", "0,3,6"), ("members", ""),
        ("members", "a,b,c,d"),
        ("bytes", "0,1,1,1"), ("bytes", "1,1,1,9" + "0" * 40), ("digests", "x"), ("world_size", None),
        ("members", ",".join(map(str, range(300)))),
    ],
)  # fmt: skip
def test_an_identity_that_makes_no_sense_is_refused(key: str, value: object) -> None:
    content = file_of(header_of())
    room = int.from_bytes(content[:8], "little")
    fields = json.loads(content[8 : 8 + room])
    fields["__metadata__"]["resilience"] = json.dumps({**json.loads(fields["__metadata__"]["resilience"]), key: value})
    with pytest.raises(CorruptCopyError):
        read_parity_header(
            memoryview(content[:8] + json.dumps(fields).encode().ljust(room) + content[8 + room :]), "it"
        )
