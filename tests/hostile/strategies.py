"""What an attacker, or a dying disk, makes of a valid file: as hypothesis strategies, so that what fails is shrunk.

`bytes_like` alters bytes; `json_like` alters the meaning of a JSON document and leaves the rest whole (the caller may
seal it again, since a checksum keeps nobody out).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st

from tests.hostile.child import LARGEST

__all__ = ["bytes_like", "hostile_values", "json_like", "json_text"]

#: Names and paths that lead elsewhere, end early, or are too long.
NAMES = [
    "", ".", "..", "../x", "../../../../etc/passwd", "/etc/passwd", "a/../../b", "a//b", "x\0y", "\0", "a\nb", "..\\x",
    "ä", "\ud800", "\udcff\udcfe", "\u202egnp", "x" * 256, "x/" * 300, "-rf", "~", "%2e%2e", ".hidden", " ",
]  # fmt: skip
NUMBERS: list[Any] = [
    0, -1, 1, 2**31, 2**32 - 1, 2**53 + 1, 2**62, 2**63 - 1, 2**63, 2**64, -(2**63), 10**30, 10**400, -(10**400),
    0.5, -0.0, 1e308, -1e308, float("nan"), float("inf"), float("-inf"), True, False, None,
]  # fmt: skip
_LENGTHS = [0, 1, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def hostile_values() -> st.SearchStrategy[Any]:
    """What may stand in a field: of any type, far out of any range, or a container of such."""
    leaf = st.one_of(st.sampled_from(NUMBERS), st.sampled_from(NAMES), st.text(max_size=8), st.integers())
    return st.one_of(
        leaf,
        st.lists(leaf, max_size=4),
        st.dictionaries(st.sampled_from(["a", "$tensor", "", "__proto__", "\ud800"]), leaf, max_size=3),
        st.sampled_from([[[[[]]]], {"a": {"a": {"a": {}}}}, [1] * 200, nested(60), nested(400)]),
    )


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


@st.composite
def bytes_like(draw: st.DrawFn, valid: Sequence[bytes], dictionary: Sequence[bytes] = ()) -> bytes:
    """A valid file with a few things done to it; now and then bytes that never were one."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=400))
    content = bytearray(draw(st.sampled_from(valid)))
    for _ in range(draw(st.integers(1, 4))):
        _alter(draw, content, valid, dictionary)
    return bytes(content[:LARGEST])


def _alter(draw: st.DrawFn, content: bytearray, valid: Sequence[bytes], dictionary: Sequence[bytes]) -> None:
    how = draw(st.integers(0, 8))
    place = draw(st.integers(0, max(0, len(content) - 1)))
    if how == 0:  # a bit
        if content:
            content[place] ^= 1 << draw(st.integers(0, 7))
    elif how == 1:  # a byte
        content[place : place + 1] = bytes([draw(st.integers(0, 255))])
    elif how == 2:  # torn
        del content[place:]
    elif how == 3:  # a hole
        del content[place : place + draw(st.integers(1, 64))]
    elif how == 4:  # spliced with another one
        other = draw(st.sampled_from(valid))
        start = draw(st.integers(0, max(0, len(other) - 1)))
        content[place : place + draw(st.integers(0, 64))] = other[start : start + draw(st.integers(1, 256))]
    elif how == 5:  # a length blown up, in either byte order and any width
        form = draw(st.sampled_from(["<H", ">H", "<I", ">I", "<Q", ">Q"]))
        width = struct.calcsize(form)
        value = draw(st.sampled_from(_LENGTHS)) % (1 << 8 * width)
        content[place : place + width] = struct.pack(form, value)
    elif how == 6:  # again
        content[place:place] = content[place : place + draw(st.integers(1, 128))] * draw(st.integers(1, 20))
    elif how == 7 and dictionary:  # something that means something
        content[place:place] = draw(st.sampled_from(dictionary))
    else:  # no UTF-8, zeros, or whatever
        content[place:place] = draw(st.sampled_from([b"\xff\xfe", b"\xed\xa0\x80", b"\0" * 16, b"\xf8\x88\x80"]))


@st.composite
def json_like(draw: st.DrawFn, valid: Sequence[Any]) -> Any:
    """A document with some of its values, or names, replaced, left out or added."""
    document = json.loads(json.dumps(draw(st.sampled_from(valid))))
    for _ in range(draw(st.integers(1, 3))):
        document = _altered(draw, document, 0)
    return document


def _altered(draw: st.DrawFn, value: Any, depth: int) -> Any:
    if isinstance(value, dict) and value and depth < 6 and draw(st.integers(0, 7)):
        name = draw(st.sampled_from(sorted(value)))
        how = draw(st.integers(0, 7))
        if how == 0:
            return {key: entry for key, entry in value.items() if key != name}
        if how == 1:
            return {
                **{key: entry for key, entry in value.items() if key != name},
                draw(st.sampled_from(NAMES)): value[name],
            }
        if how == 2:
            return {**value, draw(st.sampled_from(NAMES)): draw(hostile_values())}
        return {**value, name: _altered(draw, value[name], depth + 1)}
    if isinstance(value, list) and value and depth < 6 and draw(st.integers(0, 5)):
        at = draw(st.integers(0, len(value) - 1))
        how = draw(st.integers(0, 5))
        if how == 0:
            return value[:at] + value[at + 1 :]
        if how == 1:
            return [*value, value[at]]
        return [*value[:at], _altered(draw, value[at], depth + 1), *value[at + 1 :]]
    return draw(hostile_values())


@st.composite
def json_text(draw: st.DrawFn, documents: st.SearchStrategy[Any]) -> bytes:
    """Its text as other programs might write it: NaN, escapes or none, names twice, blanks, a byte order mark."""
    document = draw(documents)
    how = draw(st.integers(0, 7))
    text = json.dumps(document, ensure_ascii=how != 1, separators=(",", ":") if how % 2 else None)
    if how == 2 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + "," + text[1:]  # every name twice
    if how == 3:
        text = text.replace("1", "1" * draw(st.sampled_from([20, 400, 5000])), 1)
    if how == 4:
        depth = draw(st.sampled_from([50, 900, 20_000]))
        text = "[" * depth + text + "]" * depth
    content = text.encode("utf-8", "surrogatepass")
    return (b"\xef\xbb\xbf" + content if how == 5 else content)[:LARGEST]
