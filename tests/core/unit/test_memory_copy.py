"""Copies by memcpy: which tensors they are for, and that they copy what torch would."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from resilience.errors import SaveFailedError
from resilience.snapshot import memory_copy
from resilience.snapshot.memory_copy import copy_blocks, is_block, read_block

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]


class Tagged(torch.Tensor):
    """A subclass, whose elements may lie anywhere."""


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.ones(3, 4), True),
        (torch.ones(3, 4)[1:], True),
        (torch.ones(()), True),
        (torch.ones(3, 4).t(), False),
        (torch.ones(4).expand(3, 4), False),
        (torch.ones(3, 4)[:, 1], False),
        (torch.empty(0, 4), False),
        (torch.ones(4, dtype=torch.complex64).conj(), False),
        (torch.ones(4, dtype=torch.complex64).conj().imag, False),
        (torch.ones(4, device="meta"), False),
        (torch.eye(3).to_sparse(), False),
        (nn.Parameter(torch.ones(4)), False),
        (nn.Parameter(torch.ones(4)).detach(), True),
        (torch.ones(4).as_subclass(Tagged), False),
    ],
)
def test_only_plain_blocks_of_the_hosts_memory_are_blocks(tensor: torch.Tensor, expected: bool) -> None:
    assert is_block(tensor) is expected


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(1, 400)), min_size=1, max_size=20), st.integers(1, 2000))
def test_blocks_arrive_as_they_are_large_and_small(shapes: list[tuple[torch.dtype, int]], large: int) -> None:
    sources = [(torch.rand(count) * 100).to(dtype) for dtype, count in shapes]
    targets = [torch.zeros_like(source) for source in sources]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_copy, "_LARGE_BYTES", large)
        copy_blocks([each.data_ptr() for each in targets], sources, [each.nbytes for each in sources])
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(source.view(torch.uint8), target.view(torch.uint8))


def test_memory_that_was_given_back_fails_the_save_before_anything_is_copied() -> None:
    gone = torch.ones(8)
    gone.untyped_storage().resize_(0)
    target = torch.zeros(16)
    addresses = [target.data_ptr(), target.data_ptr() + 32]
    with pytest.raises(SaveFailedError, match="no memory"):
        copy_blocks(addresses, [torch.ones(8), gone], [32, 32])
    assert not target.any()


def test_memory_that_was_had_anew_is_found_where_it_is_now() -> None:
    source, target = torch.ones(8), torch.zeros(8)
    storage = source.untyped_storage()
    kept = source.detach()
    storage.resize_(0)
    storage.resize_(1 << 20)
    ctypes.memset(storage.data_ptr(), 1, 32)
    copy_blocks([target.data_ptr()], [kept], [32])
    assert target.view(torch.uint8).eq(1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_of_a_block_is_read_as_its_bytes(dtype: torch.dtype) -> None:
    block = (torch.rand(40, 3) * 100).to(dtype)[10:]
    assert read_block(block, 7, 5) == bytes(block.reshape(-1)[7:12].view(torch.uint8).numpy())


def test_a_part_of_memory_that_was_given_back_is_not_read() -> None:
    gone = torch.ones(8)
    gone.untyped_storage().resize_(0)
    with pytest.raises(SaveFailedError, match="no memory"):
        read_block(gone, 2, 2)
