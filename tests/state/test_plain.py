"""What other programs are given of a state is what torch's safe loader admits, whatever was in it."""

from __future__ import annotations

import io
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import pytest
import torch

from resilience.state.plain import plain_parts
from resilience.state.tree import encode


def given_away(value: Any) -> Any:
    """As another program reads it."""
    values, tensors = encode({"dataloader": value, "rng": 1})
    by_key = dict(tensors)
    buffer = io.BytesIO()
    torch.save(plain_parts(values, ("dataloader",), by_key.get), buffer)
    buffer.seek(0)
    (found,) = torch.load(buffer, weights_only=True).items()
    assert found[0] == "dataloader"
    return found[1]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"a": [1, 2.5, None, True, "x", b"y"]}, {"a": [1, 2.5, None, True, "x", b"y"]}),
        ((1, (2, 3)), (1, (2, 3))),
        (frozenset({1}), [1]),
        ({2}, [2]),
        ({frozenset({1}): "x", (2, 3): "y"}, {(1,): "x", (2, 3): "y"}),
        (defaultdict(list, {"a": [1]}), {"a": [1]}),
        (OrderedDict(b=1, a=2), OrderedDict(b=1, a=2)),
        (np.float64(1.5), 1.5),
        ({"n": np.int64(3)}, {"n": 3}),
        (torch.float16, torch.float16),
        (1 << 80, 1 << 80),
    ],
    ids=repr,
)
def test_values_come_as_they_are_or_as_their_closest_neighbour(value: Any, expected: Any) -> None:
    found = given_away(value)
    assert (type(found), found) == (type(expected), expected)


def test_arrays_come_as_tensors_and_tensors_as_they_are() -> None:
    found = given_away({"array": np.arange(3), "tensor": torch.arange(2), "text": np.array(["ab"])})
    assert torch.equal(found["array"], torch.arange(3))
    assert torch.equal(found["tensor"], torch.arange(2))
    assert found["text"].dtype == torch.uint8, "torch has no such dtype: its bytes"


def test_a_tensor_that_is_elsewhere_is_none() -> None:
    values, _ = encode({"optimizer": [{"lr": torch.tensor(0.1)}]})
    assert plain_parts(values, ("optimizer", "scheduler"), lambda _: None) == {"optimizer": [{"lr": None}]}
