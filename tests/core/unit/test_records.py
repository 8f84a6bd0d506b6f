"""Small files beside the bytes: what was flipped or torn is noticed before anything in it is believed; and digests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from resilience.errors import CorruptCopyError
from resilience.planning.erasure import Code
from resilience.planning.inventory import AttemptLog, ParityCover, SaveId
from resilience.stores.digest import SEGMENT_BYTES, SegmentedDigest, digest_of, is_digest, segments
from resilience.stores.records import (
    ShardRecord,
    decode_attempt_log,
    decode_certificate,
    decode_record,
    encode_attempt_log,
    encode_certificate,
    encode_record,
    is_name,
    seal_json,
    unseal_json,
)
from tests.core.shards import record_of

NAMES = st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,20}", fullmatch=True)
SAVES = st.builds(
    SaveId, st.integers(0, 1 << 53), st.integers(0, 1 << 40), st.text("0123456789abcdef", min_size=32, max_size=32)
)


@st.composite
def records(draw: st.DrawFn) -> ShardRecord:
    world_size = draw(st.integers(1, 1 << 20))
    return ShardRecord(
        run_id=draw(NAMES),
        save=draw(SAVES),
        owner=draw(st.integers(0, world_size - 1)),
        world_size=world_size,
        role=draw(st.sampled_from(["primary", "replica"])),
        tier=draw(st.sampled_from(["in_memory", "local"])),
        node_id=draw(NAMES),
        nbytes=draw(st.integers(1, 1 << 60)),
        digest=digest_of(draw(st.binary(max_size=4))),
        created=draw(st.floats(0, 1e12)),
        split=draw(st.booleans()),
    )


@st.composite
def parity_records(draw: st.DrawFn) -> ShardRecord:
    record = draw(records())
    world = max(record.world_size, 4)
    members = tuple(sorted(draw(st.sets(st.integers(0, world - 1), min_size=3, max_size=8))))
    nbytes = tuple(draw(st.integers(1, 1 << 50)) for _ in members)
    cover = ParityCover(
        draw(st.sampled_from([1, 2])), members, nbytes, tuple(digest_of(bytes([m % 256])) for m in members)
    )
    owner, size = draw(st.sampled_from(members)), Code(len(members), cover.parities).file_bytes(max(nbytes))
    return replace(record, world_size=world, role="parity", owner=owner, nbytes=size, cover=cover)


LOGS = st.builds(
    AttemptLog,
    run_id=NAMES,
    attempt=st.text("0123456789abcdef", min_size=32, max_size=32),
    generation=st.integers(0, 1 << 40),
    base=st.none() | SAVES,
    fork=st.none() | st.tuples(st.integers(0, 1 << 40), st.text(max_size=10)),
    completed=st.none() | SAVES,
    end=st.sampled_from(["", "finished", "stopped", "failed"]),
    end_iteration=st.none() | st.integers(0, 1 << 53),
)


@given(records() | parity_records())
def test_a_record_comes_back_as_it_was(record: ShardRecord) -> None:
    assert decode_record(encode_record(record)) == record


@given(LOGS)
def test_an_attempt_log_comes_back_as_it_was(log: AttemptLog) -> None:
    assert decode_attempt_log(encode_attempt_log(log)) == log


@given(NAMES, SAVES, st.integers(1, 99), st.booleans())
def test_a_certificate_comes_back_as_it_was(run: str, save: SaveId, world_size: int, protected: bool) -> None:
    content = encode_certificate(run, save, world_size, protected, {"0": digest_of(b"x")})
    assert decode_certificate(content) == (run, save)


@given(records(), st.data())
def test_any_flipped_byte_of_a_record_is_noticed(record: ShardRecord, data: st.DataObject) -> None:
    content = bytearray(encode_record(record))
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    try:
        seen = decode_record(bytes(content))
    except CorruptCopyError:
        return
    assert seen == record, "only what JSON takes for the same may pass: a blank for the line's end, an E for an e"


@given(records(), st.data())
def test_any_torn_record_is_noticed(record: ShardRecord, data: st.DataObject) -> None:
    content = encode_record(record)
    with pytest.raises(CorruptCopyError):
        decode_record(content[: data.draw(st.integers(0, len(content) - 2))])


@given(st.binary(max_size=60))
def test_anything_else_is_no_record(content: bytes) -> None:
    for decode in (decode_record, decode_certificate, decode_attempt_log):
        with pytest.raises(CorruptCopyError):
            decode(content)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run_id", "../../etc"),
        ("run_id", ".hidden"),
        ("node_id", "a/b"),
        ("owner", 2),
        ("owner", -1),
        ("owner", True),
        ("world_size", 0),
        ("bytes", 0),
        ("bytes", 1 << 61),
        ("bytes", 12.0),
        ("digest", "xxh3-128-32m:" + "g" * 32),
        ("digest", "md5:" + "0" * 32),
        ("role", "owner"),
        ("tier", []),
        ("attempt", "3F9AC01B" + "0" * 24),
        ("generation", "1"),
        ("iteration", None),
        ("created", "now"),
        ("split", 1),
    ],
)
def test_a_sealed_record_whose_fields_make_no_sense_is_refused_by_name(field: str, value: Any) -> None:
    fields = unseal_json(encode_record(record_of(b"x", 0, 2)), "it")
    fields.pop("schema_version")
    with pytest.raises(CorruptCopyError, match=f"'{field}'"):
        decode_record(seal_json({**fields, field: value}))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("parities", 0),
        ("parities", 3),
        ("bytes", 4096),
        ("covers", []),
        ("covers", [7, 7, 7]),
        ("covers", "none"),
        ("covers", [{"owner": owner, "bytes": 5, "digest": digest_of(b"")} for owner in (0, 2, 1)]),
        ("covers", [{"owner": owner, "bytes": 5, "digest": digest_of(b"")} for owner in (0, 0, 1)]),
        ("covers", [{"owner": owner, "bytes": 5, "digest": digest_of(b"")} for owner in (1, 2, 3)]),
        ("covers", [{"owner": owner, "bytes": 5, "digest": digest_of(b"")} for owner in (0, 1, 4)]),
        ("covers", [{"owner": owner, "bytes": 0, "digest": digest_of(b"")} for owner in (0, 1, 2)]),
        ("covers", [{"owner": owner, "bytes": 5, "digest": "none"} for owner in (0, 1, 2)]),
        ("covers", [{"owner": owner, "bytes": 5, "digest": digest_of(b"")} for owner in range(200)]),
    ],
)
def test_a_sealed_record_of_parity_that_covers_no_clique_is_refused(field: str, value: Any) -> None:
    cover = ParityCover(2, (0, 1, 2, 3), (5, 6, 7, 8), (digest_of(b""),) * 4)
    sound = record_of(bytes(Code(4, 2).file_bytes(8)), 0, 4, role="parity", cover=cover)
    assert decode_record(encode_record(sound)) == sound
    fields = unseal_json(encode_record(sound), "it")
    fields.pop("schema_version")
    with pytest.raises(CorruptCopyError, match=r"'(parities|covers|bytes|owner|digest)'"):
        decode_record(seal_json({**fields, field: value}))


def test_a_record_of_another_version_is_refused_and_says_so() -> None:
    fields = unseal_json(encode_record(record_of(b"x")), "it")
    with pytest.raises(CorruptCopyError, match="schema_version 2"):
        decode_record(seal_json({**fields, "schema_version": 2}))


def test_a_record_of_one_kind_is_none_of_another() -> None:
    record = encode_record(record_of(b"x"))
    with pytest.raises(CorruptCopyError):
        decode_attempt_log(record)


@given(st.text(max_size=12))
def test_a_name_stays_in_its_directory(text: str) -> None:
    if is_name(text):
        assert "/" not in text
        assert "\0" not in text
        assert text not in (".", "..", "")
        assert text.isascii()


def test_names_that_are_no_names() -> None:
    for text in ("", ".", "..", "a/b", "a\n", "a\0", ".a", "ä", "a" * 129, None, 5):
        assert not is_name(text)


@pytest.mark.parametrize("nbytes", [0, 1, SEGMENT_BYTES - 1, SEGMENT_BYTES, SEGMENT_BYTES + 1, 2 * SEGMENT_BYTES + 5])
def test_a_digest_is_that_of_the_digests_of_its_segments(nbytes: int) -> None:
    content = (b"resilience" * (nbytes // 10 + 1))[:nbytes]
    parts = [content[start : start + (32 << 20)] for start in range(0, nbytes, 32 << 20)]
    expected = xxhash.xxh3_128_hexdigest(b"".join(xxhash.xxh3_128_digest(part) for part in parts))
    assert digest_of(content) == f"xxh3-128-32m:{expected}"
    assert is_digest(digest_of(content))
    step_by_step = SegmentedDigest()
    view = memoryview(content)
    for start, stop in segments(nbytes):
        step_by_step.add(view[start:stop])
    assert step_by_step.value() == digest_of(content)


def test_a_digest_notices_any_bit_and_any_length() -> None:
    content = bytearray(b"x" * 1000)
    seen = {digest_of(content), digest_of(content[:-1]), digest_of(content + b"\0")}
    content[500] ^= 1
    assert len(seen | {digest_of(content)}) == 4


def test_two_records_of_different_saves_are_different_files() -> None:
    one = record_of(b"x")
    assert encode_record(one) != encode_record(replace(one, split=True))
