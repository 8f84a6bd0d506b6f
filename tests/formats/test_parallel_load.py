"""Ranks that need the same regions read each of them once, and all come to the same end when one fails."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import resilience.formats.parallel_load as parallel_load
from resilience.errors import CorruptCopyError
from resilience.formats.parallel_load import PeerFailedError, Region, deal, read_together
from resilience.formats.protocol import Target
from resilience.testing.ranks import ThreadAgreements, on_all_ranks

REGIONS = st.builds(
    lambda key, start, rows, dtype: Region(key, (start, 0), (rows, 3), dtype),
    st.sampled_from("abcdefgh"),
    st.integers(0, 3),
    st.integers(0, 50),
    st.sampled_from(["float32", "bfloat16", "bool"]),
)


@given(st.lists(st.lists(REGIONS, max_size=20), min_size=1, max_size=6))
def test_every_region_is_read_by_one_of_those_that_ask_for_it(asked: list[list[Region]]) -> None:
    dealt = deal(asked)
    assert dealt.keys() == {region for regions in asked for region in regions}
    assert all(region in asked[reader] for region, reader in dealt.items())


@given(st.lists(REGIONS, min_size=1, max_size=40), st.integers(1, 6))
def test_where_all_ask_for_the_same_nobody_reads_more_than_an_even_share_and_one_region(
    regions: list[Region], size: int
) -> None:
    dealt = deal([regions] * size)
    load = [sum(region.nbytes for region, reader in dealt.items() if reader == rank) for rank in range(size)]
    assert max(load) - min(load) <= max(region.nbytes for region in dealt)


class Reader:
    """Every element of a tensor is the sum of its coordinates in the whole, and its name's length; counts reads."""

    def __init__(self, *, fails: bool = False) -> None:
        self.read_keys: list[str] = []
        self.fails = fails

    def read(self, targets: Sequence[Target]) -> None:
        for target in targets:
            self.read_keys.append(target.key)
            if self.fails:
                raise CorruptCopyError("a bad file")
            target.out.copy_(expected(target))


def expected(target: Target) -> torch.Tensor:
    content = torch.full(target.out.shape, float(len(target.key)))
    for axis, offset in enumerate(target.offsets):
        shape = [1] * content.dim()
        shape[axis] = -1
        content = content + (torch.arange(content.shape[axis]) + offset).view(shape)
    return content.to(target.out.dtype)


def targets_of(rank: int) -> list[Target]:
    """Some that all need, one that two need, one of its own, one without elements."""
    shared = [Target(f"all{'x' * n}", torch.empty(7 + n, 5), (n, 0)) for n in range(5)]
    shared += [Target("scalar", torch.empty(()), ()), Target("low", torch.empty(4, 2, dtype=torch.bfloat16), (0, 1))]
    shared += [Target("none", torch.empty(0, 5), (0, 0))]
    pair = [Target("pair", torch.empty(9, 3), (0, 0))] if rank else []
    return [*shared, *pair, Target("own", torch.empty(3, 3), (3 * rank, 0))]


@pytest.mark.parametrize("round_bytes", [1, 64 << 20])
def test_all_have_everything_and_nothing_was_read_twice(monkeypatch: pytest.MonkeyPatch, round_bytes: int) -> None:
    monkeypatch.setattr(parallel_load, "_ROUND_BYTES", round_bytes)
    monkeypatch.setattr(parallel_load, "_LEAST_BYTES", 3)
    readers = [Reader() for _ in range(3)]

    def work(group: ThreadAgreements) -> list[Target]:
        targets = targets_of(group.rank)
        read_together(readers[group.rank], targets, group)  # type: ignore[arg-type]
        return targets

    for rank, targets in enumerate(on_all_ranks(3, work)):
        assert not isinstance(targets, BaseException), targets
        assert all(torch.equal(target.out, expected(target)) for target in targets), rank
    keys = sorted(key for reader in readers for key in reader.read_keys)
    assert keys == sorted([*{target.key for target in targets_of(1)}, "own", "own"])


def test_when_one_cannot_read_all_learn_of_it() -> None:
    def work(group: ThreadAgreements) -> None:
        read_together(Reader(fails=group.rank == 1), targets_of(group.rank), group)  # type: ignore[arg-type]

    outcomes: list[Any] = on_all_ranks(3, work)
    assert isinstance(outcomes[1], CorruptCopyError)
    assert isinstance(outcomes[0], PeerFailedError)
    assert isinstance(outcomes[2], PeerFailedError)
