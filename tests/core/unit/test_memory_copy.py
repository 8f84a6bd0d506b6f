"""Copies of blocks of memory: which tensors they are for, and that they copy what torch would, by whatever means."""

from __future__ import annotations

import ctypes

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from resilience.errors import SaveFailedError, UnsupportedStateError
from resilience.snapshot import memory_copy
from resilience.snapshot.memory_copy import Blocks, copy_blocks, copy_tensors, is_block, read_block
from resilience.snapshot.streaming import STREAMING, Streaming

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


@pytest.fixture(params=["around the cache", "through it", "one by one"])
def means(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How blocks are copied: all of them in one call, of either kind, however many bytes they are; or one by one."""
    alone = request.param == "one by one"
    if not alone and STREAMING.much is None:
        pytest.skip(STREAMING.why)
    monkeypatch.setattr(memory_copy, "STREAMING", Streaming(None) if alone else STREAMING)
    monkeypatch.setattr(memory_copy, "_STREAMED_BYTES", 1 << 40 if request.param == "through it" else 0)
    monkeypatch.setattr(memory_copy, "_FEW", 0)
    return str(request.param)


def blocks_of(tensors: list[torch.Tensor]) -> Blocks:
    return Blocks.at((each.data_ptr() for each in tensors), (each.nbytes for each in tensors))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(1, 400)), min_size=1, max_size=20), st.integers(1, 2000))
def test_blocks_arrive_as_they_are_large_and_small(
    means: str, shapes: list[tuple[torch.dtype, int]], large: int
) -> None:
    sources = [(torch.rand(count) * 100).to(dtype) for dtype, count in shapes]
    targets = [torch.zeros_like(source) for source in sources]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_copy, "_LARGE_BYTES", large)
        copy_blocks(0, blocks_of(targets), sources)
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(source.view(torch.uint8), target.view(torch.uint8))


def test_memory_that_was_given_back_fails_the_save_before_anything_is_copied(means: str) -> None:
    gone = torch.ones(8)
    gone.untyped_storage().resize_(0)
    target = torch.zeros(16)
    with pytest.raises(SaveFailedError, match="no memory"):
        copy_blocks(target.data_ptr(), Blocks.at([0, 32], [32, 32]), [torch.ones(8), gone])
    assert not target.any()


def test_memory_that_was_had_anew_is_found_where_it_is_now(means: str) -> None:
    source, target = torch.ones(8), torch.zeros(8)
    storage = source.untyped_storage()
    kept = source.detach()
    storage.resize_(0)
    storage.resize_(1 << 20)
    ctypes.memset(storage.data_ptr(), 1, 32)
    copy_blocks(target.data_ptr(), Blocks.at([0], [32]), [kept])
    assert target.view(torch.uint8).eq(1).all()


def test_tensors_of_all_kinds_are_copied_as_torch_does(means: str) -> None:
    def make() -> list[torch.Tensor]:
        return [
            torch.zeros(3000, 7),
            torch.zeros(40, 30).t(),
            torch.zeros(50, dtype=torch.bfloat16),  # from float32
            nn.Parameter(torch.zeros(2000)),
            torch.zeros(64, 64)[8:40],
            torch.zeros(64, 64)[:, 8:40],
            torch.zeros(()),
            torch.zeros(0, 4),
            torch.zeros(5000, dtype=torch.complex64),
        ]

    torch.manual_seed(1)
    sources = [torch.randn(each.shape, dtype=torch.float32) * 100 for each in make()[:-1]]
    sources.append(torch.randn(5000, dtype=torch.complex64).conj())
    ours, torchs = make(), make()
    copy_tensors(ours, sources)
    with torch.no_grad():
        for target, source in zip(torchs, sources, strict=True):
            target.copy_(source)
    for one, other in zip(ours, torchs, strict=True):
        assert torch.equal(one.detach(), other.detach())
        whole, of_torch = (each.untyped_storage().nbytes() for each in (one, other))
        assert bytes(one.untyped_storage())[:whole] == bytes(other.untyped_storage())[:of_torch], "and nothing else"


def test_no_tensors_at_all_are_loaded_though_torch_refuses_that(means: str) -> None:
    with pytest.raises(RuntimeError):
        torch._foreach_copy_([], [])
    copy_tensors([], [])


@pytest.mark.parametrize("gone", [torch.zeros(4096), torch.zeros(64, 64).t()], ids=["a block", "strided"])
def test_a_tensor_without_memory_is_refused_before_anything_is_loaded(means: str, gone: torch.Tensor) -> None:
    gone.untyped_storage().resize_(0)
    other = torch.zeros(10)
    for targets, sources in (
        ([other, gone], [torch.ones(10), torch.ones(gone.shape)]),
        ([other, torch.zeros(gone.shape)], [torch.ones(10), gone]),
    ):
        with pytest.raises(UnsupportedStateError, match="no memory"):
            copy_tensors(targets, sources)
        assert not other.any()


def test_what_a_lane_copies_goes_around_the_cache_however_little_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    if STREAMING.much is None:
        pytest.skip(STREAMING.why)
    monkeypatch.setattr(memory_copy, "STREAMING", STREAMING._replace(little=None))
    monkeypatch.setattr(memory_copy, "_copy_small", None)
    source, target = torch.randn(100), torch.zeros(100)
    copy_blocks(0, blocks_of([target]), [source], in_lane=True)
    assert torch.equal(source, target)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_of_a_block_is_read_as_its_bytes(dtype: torch.dtype) -> None:
    block = (torch.rand(40, 3) * 100).to(dtype)[10:]
    assert read_block(block, 7, 5) == bytes(block.reshape(-1)[7:12].view(torch.uint8).numpy())


def test_a_part_of_memory_that_was_given_back_is_not_read() -> None:
    gone = torch.ones(8)
    gone.untyped_storage().resize_(0)
    with pytest.raises(SaveFailedError, match="no memory"):
        read_block(gone, 2, 2)
