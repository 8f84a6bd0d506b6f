"""A pickle that asks for more than its bytes justify is told apart from all that a pickler writes."""

from __future__ import annotations

import pickle
import resource
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.errors import CorruptCopyError
from resilience.stores.inert_pickle import load_inert
from resilience.stores.pickle_bounds import bounds_of

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=300)
    | st.binary(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4) | st.tuples(st.integers(), st.text(max_size=3)), inner, max_size=4)
        | st.tuples(inner, inner)
        | inner.map(lambda one: [one, one, (one, one)])
    ),
    max_leaves=30,
)


@given(PLAIN, st.integers(0, 5))
def test_what_a_pickler_wrote_is_read_as_it_was(value: object, protocol: int) -> None:
    content = pickle.dumps(value, protocol)
    assert bounds_of(content).problem == ""
    names = {"_codecs.encode", "builtins.bytes"}
    if protocol > 2:  # before, bytes are written as a call
        assert load_inert(content, names, "it") == value


@pytest.mark.parametrize("protocol", range(6))
def test_many_values_are_remembered_and_fetched_under_their_numbers(protocol: int) -> None:
    words = [f"word {number}" for number in range(3000)]
    shared = tuple(words[:5])
    value = [words, words[::-1], [shared] * 3000, {word: word for word in words}]
    assert load_inert(pickle.dumps(value, protocol), (), "it") == value


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_shared_tuple_as_a_key_is_read_with_care(protocol: int) -> None:
    """More fetches of tuples than any harmless number: read by the slower way, and read."""
    key = ("a", ("b", 3))
    value: list[object] = [{key: number} for number in range(100)]
    value += [{(key, key): 0}] + ([frozenset([key]), {key}] if protocol == 4 else [])  # before, these are calls
    content = pickle.dumps(value, protocol)
    assert bounds_of(content).careful
    assert load_inert(content, (), "it") == value


@pytest.mark.parametrize("dup", [True, False])
def test_a_key_that_unfolds_to_any_number_of_values_is_refused_at_once(dup: bool) -> None:
    doubled = b"2\x86" * 60 if dup else b"".join(b"q%ch%c\x86" % (number, number) for number in range(60))
    content = b"\x80\x02}K\x01" + doubled + b"K\x00s."
    began = time.process_time()
    with pytest.raises(CorruptCopyError, match="unfolds to more values"):
        load_inert(content, (), "it")
    assert time.process_time() - began < 5.0, "2^60 hashes would take a life"


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04]r\xff\xff\xff\x7f.",
        b"\x80\x04]p2147483647\n.",
        b"\x80\x04B\xff\xff\xff\x7f.",
        b"\x80\x04\x8e\0\0\0\0\0\0\0\x10.",
        b"\x80\x05\x96\0\0\0\0\x04\0\0\0.",
        b"\x80\x04\x8d\0\0\0\0\0\0\0\x10.",
    ],
)
def test_a_few_bytes_do_not_take_gigabytes(content: bytes) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CorruptCopyError, match=r"it announces|it remembers"):
        load_inert(content, (), "it")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 16, "in KiB"


def test_a_stream_without_end_is_looked_through_once() -> None:
    """Rows in which nothing is remembered were looked through again from each of their bytes."""
    began = time.process_time()
    bounds_of(b"\x80\x04" + b"(" * 2_000_000)
    assert time.process_time() - began < 20.0, "else it takes days"
