"""Two values have one mark exactly if they are written alike."""

from __future__ import annotations

import math
import random
import struct
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from resilience.state.marks import NotPlainError, mark_of
from resilience.state.tree import encode

SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.integers(-1, 1), st.floats(),
    st.sampled_from([0.0, -0.0, 1.0, math.nan]),
    st.text(max_size=3),
)  # fmt: skip
ALIKE = st.lists(st.one_of(st.booleans(), st.integers(-1, 1), st.sampled_from([0.0, 1.0, -0.0])), max_size=3)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=2), inner, max_size=3),
    ),
    max_leaves=6,
)


@given(VALUES, VALUES)
def test_values_have_one_mark_exactly_if_they_are_written_alike(one: Any, other: Any) -> None:
    assert (mark_of(one) == mark_of(other)) == (encode(one) == encode(other))


@given(ALIKE, ALIKE)
def test_what_python_calls_equal_is_told_apart_where_it_is_written_otherwise(one: list[Any], other: list[Any]) -> None:
    assert (mark_of(one) == mark_of(other)) == (encode(one) == encode(other))


def test_values_that_are_no_number_are_told_apart_by_their_bits() -> None:
    one, other = (struct.unpack("<d", struct.pack("<Q", 0x7FF8000000000000 + bits))[0] for bits in (1, 2))
    assert mark_of(one) != mark_of(other)


def test_random_state_is_told_by_its_words() -> None:
    generator = random.Random(1)
    before = mark_of(generator.getstate())
    assert mark_of(generator.getstate()) == before
    generator.random()
    assert mark_of(generator.getstate()) != before


class Number(int):
    pass


def in_itself() -> list[Any]:
    cycle: list[Any] = []
    cycle.append(cycle)
    return cycle


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(1), [torch.ones(1)], np.float64(0.5), (np.zeros(2),), Number(3), [Number(3), Number(4)],
        OrderedDict(a=1), {1: 2}, {"a", "b"}, b"bytes", 1j, in_itself(),
    ],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_what_is_more_than_plain_has_no_mark(value: Any) -> None:
    with pytest.raises(NotPlainError):
        mark_of(value)
