"""What a peer sent becomes the value that it was, or an error that names what does not fit."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.errors import DivergedRanksError
from resilience.planning.typed_json import from_json, from_plain, parsed


@dataclasses.dataclass(frozen=True)
class Inner:
    number: int
    word: str = ""


@dataclasses.dataclass(frozen=True)
class Outer:
    inner: Inner
    many: tuple[Inner, ...]
    pair: tuple[int, str]
    way: Literal["this", "that"]
    share: float
    yes: bool
    maybe: Inner | None = None
    nothing: int | None = None


INNERS = st.builds(Inner, st.integers(-(2**63) + 1, 2**63 - 1), st.text(max_size=5))
OUTERS = st.builds(
    Outer, INNERS, st.lists(INNERS, max_size=3).map(tuple), st.tuples(st.integers(-9, 9), st.text(max_size=3)),
    st.sampled_from(["this", "that"]), st.floats(allow_nan=False), st.booleans(), st.none() | INNERS,
    st.none() | st.integers(-9, 9),
)  # fmt: skip


@given(OUTERS)
def test_a_value_comes_back_as_it_was(value: Outer) -> None:
    assert from_json(Outer, json.dumps(dataclasses.asdict(value)), "it") == value


VALID: dict[str, Any] = {
    "inner": {"number": 1}, "many": [], "pair": [1, "a"], "way": "this", "share": 1, "yes": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inner": {"number": "1"}}, "it, inner, number: '1' instead of int"),
        ({"inner": {"number": True}}, "True instead of int"),
        ({"inner": {"number": 1 << 63}}, "instead of int"),
        ({"inner": {"number": 1, "more": 2}}, "a field 'more' that this version does not know"),
        ({"inner": {}}, "it, inner: no number"),
        ({"inner": []}, "[] instead of an object"),
        ({"many": {}}, "{} instead of a list"),
        ({"many": [3]}, "it, many: 3 instead of an object"),
        ({"pair": [1]}, "1 values instead of 2"),
        ({"way": "other"}, "'other' instead of 'this', 'that'"),
        ({"way": ["this"]}, "instead of 'this', 'that'"),
        ({"share": "1"}, "'1' instead of float"),
        ({"yes": 1}, "1 instead of bool"),
        ({"maybe": 3}, "3 instead of an object"),
        ({"nothing": "x"}, "'x' instead of int"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], words: str) -> None:
    assert from_plain(Outer, VALID, "it").share == 1.0
    with pytest.raises(DivergedRanksError) as raised:
        from_plain(Outer, VALID | change, "it")
    assert words in str(raised.value)


@given(st.binary(max_size=40))
def test_what_is_no_json_is_said(content: bytes) -> None:
    try:
        expected = json.loads(content)
    except ValueError:
        with pytest.raises(DivergedRanksError, match="it: no JSON"):
            parsed(content, "it")
        return
    assert repr(parsed(content, "it")) == repr(expected)


def test_a_dictionary_of_numbers_comes_back_with_numbers() -> None:
    assert from_json(dict[int, dict[str, str]], b'{"3": {"a": "b"}}', "it") == {3: {"a": "b"}}
    for wrong in (b'{"x": {}}', b'{"-1": {}}', b'{"3": {"a": 1}}', b"[]", '{"٣": {}}'.encode()):
        with pytest.raises(DivergedRanksError):
            from_json(dict[int, dict[str, str]], wrong, "it")
