"""A tensor that lies flat in a bucket is read as if it had its own shape, whichever part of it a rank has."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import resilience
from resilience.errors import LayoutMismatchError
from resilience.formats.optimizer_view import OptimizerView
from resilience.formats.protocol import StoredTensor, Target
from resilience.planning.bucket_space import Flattened
from resilience.state.flat_sharding import local_blocks
from resilience.state.sharding import sharding_of


class OneBucket:
    """A checkpoint of one flat tensor."""

    folder = Path("here")

    def __init__(self, bucket: torch.Tensor) -> None:
        self.bucket = bucket
        self.index = {
            "bucket": StoredTensor(bucket.dtype, tuple(bucket.shape)),
            "other": StoredTensor(torch.int8, (3,)),
        }

    def read(self, targets: Sequence[Target]) -> None:
        for target in targets:
            assert target.global_shape in (None, tuple(self.bucket.shape))
            target.out.copy_(self.bucket[target.offsets[0] : target.offsets[0] + len(target.out)])


@given(
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(0, 70),
    st.data(),
)
def test_every_part_of_a_rank_is_found_in_its_bucket(
    shape: list[int], count: int, stacked: int, start: int, data: st.DataObject
) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    index = data.draw(st.integers(0, count - 1))
    shape[dim] *= stacked
    local = torch.randn(shape)
    parameter = resilience.shard(torch.nn.Parameter(local.clone()), dim, index, count, stacked=stacked)
    said = sharding_of(parameter)
    assert said is not None
    whole = torch.full(said.global_shape, torch.nan)
    for _, part, offsets in said.parts("", local):
        whole[tuple(slice(at, at + length) for at, length in zip(offsets, part.shape, strict=True))] = part
    bucket = torch.cat([torch.full((start,), torch.nan), local.flatten(), torch.full((5,), torch.nan)])
    reader: Any = OneBucket(bucket)
    view = OptimizerView(reader, {}, {"seen": Flattened("bucket", start, *local_blocks(parameter))})
    assert view.index["seen"] == StoredTensor(torch.float32, said.global_shape)
    for _, part, offsets in said.parts("", local):
        lengths = [data.draw(st.integers(1, length)) for length in part.shape]
        firsts = [data.draw(st.integers(0, full - length)) for full, length in zip(part.shape, lengths, strict=True)]
        at = tuple(base + first for base, first in zip(offsets, firsts, strict=True))
        out = torch.zeros(lengths, dtype=data.draw(st.sampled_from([torch.float32, torch.float64])))
        view.read([Target("seen", out, at, said.global_shape)])
        region = tuple(slice(first, first + length) for first, length in zip(at, lengths, strict=True))
        assert torch.equal(out, whole[region].to(out.dtype))


def test_what_another_rank_has_is_refused_and_not_made_up() -> None:
    parameter = resilience.shard(torch.nn.Parameter(torch.zeros(2, 3)), 0, 1, 2)
    reader: Any = OneBucket(torch.zeros(math.prod((2, 3))))
    view = OptimizerView(reader, {}, {"seen": Flattened("bucket", 0, *local_blocks(parameter))})
    with pytest.raises(LayoutMismatchError, match="not all in the buckets of this rank's place"):
        view.read([Target("seen", torch.zeros(2, 3), (1, 0))])
    with pytest.raises(LayoutMismatchError, match="has shape"):
        view.read([Target("seen", torch.zeros(2, 3), (2, 0), (2, 3))])


def test_other_names_lead_to_what_is_stored() -> None:
    reader: Any = SimpleNamespace(index={"there": StoredTensor(torch.int8, (3,))}, aliases={"a": "b"}, folder=Path())
    view = OptimizerView(reader, {"here": "there"}, {}, {"copy": "there"})
    assert view.index["here"] == view.index["there"]
    assert (view.stored_path("here"), view.stored_path("else")) == ("there", "else")
    assert view.aliases == {"a": "b", "copy": "there"}
