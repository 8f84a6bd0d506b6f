"""Of two ways to copy, the quicker one is taken; every block is copied once whatever is tried meanwhile."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.snapshot.quicker import Addresses, CopyBlocks, Quicker

MIB = 1 << 20


class Machine:
    """Ways that take so many nanoseconds for a kilobyte, by a clock that goes on only while they copy."""

    def __init__(self, **pace: int) -> None:
        self.now = 0
        self.copied: list[tuple[str, int, int, int]] = []
        self.pace = pace

    def way(self, name: str) -> CopyBlocks:
        def copy(targets: Addresses, origins: Addresses, sizes: Addresses) -> None:
            self.copied += [
                (name, *each) for each in zip(targets.tolist(), origins.tolist(), sizes.tolist(), strict=True)
            ]
            self.now += self.pace[name] * int(sizes.sum()) // 1024

        return copy

    def quicker(self) -> Quicker:
        return Quicker(self.way("usual"), self.way("other"), lambda: self.now)


def blocks(sizes: list[int]) -> tuple[Addresses, Addresses, Addresses]:
    lengths = np.array(sizes, np.uint64)
    starts = np.cumsum(lengths) - lengths
    return starts + np.uint64(1 << 40), starts + np.uint64(1 << 41), lengths


@pytest.mark.parametrize(
    ("usual", "other", "taken"),
    [(30, 50, "usual"), (50, 30, "other"), (50, 49, "usual"), (30, 30, "usual")],
)
def test_the_usual_way_is_taken_unless_the_other_is_clearly_quicker(usual: int, other: int, taken: str) -> None:
    machine = Machine(usual=usual, other=other)
    quicker = machine.quicker()
    for _ in range(6):
        assert not quicker.decided
        quicker.copy(*blocks([MIB] * 64))
        tried = sum(name == "other" for name, *_ in machine.copied)
        assert tried <= 8, "no more is risked than an eighth"
        machine.copied.clear()
    assert quicker.decided
    quicker.copy(*blocks([MIB] * 64))
    assert {name for name, *_ in machine.copied} == {taken}


def test_small_blocks_at_one_end_do_not_decide() -> None:
    """What they cost is laid to either way in turn."""
    machine = Machine(usual=30, other=31)
    small = machine.way("usual"), machine.way("other")

    def slow_if_small(way: int) -> CopyBlocks:
        def copy(targets: Addresses, origins: Addresses, sizes: Addresses) -> None:
            small[way](targets, origins, sizes)
            machine.now += 2_000 * len(sizes)

        return copy

    quicker = Quicker(slow_if_small(0), slow_if_small(1), lambda: machine.now)
    for _ in range(7):
        machine.copied.clear()
        quicker.copy(*blocks([4 << 10] * 3000 + [MIB] * 80))
    assert {name for name, *_ in machine.copied} == {"usual"}


@given(st.lists(st.sampled_from([1, 4, 5000, 70_000, 3 * MIB, 40 * MIB]), max_size=40), st.integers(0, 7))
def test_every_block_is_copied_once(sizes: list[int], before: int) -> None:
    machine = Machine(usual=30, other=20)
    quicker = machine.quicker()
    for _ in range(before):
        quicker.copy(*blocks([MIB] * 64))
    machine.copied.clear()
    targets, origins, lengths = blocks(sizes)
    quicker.copy(targets, origins, lengths)
    expected = list(zip(targets.tolist(), origins.tolist(), lengths.tolist(), strict=True))
    assert [each[1:] for each in sorted(machine.copied, key=lambda each: each[1:])] == sorted(expected)


@pytest.mark.parametrize("sizes", [[], [300 * MIB], [100 * MIB, 100 * MIB], [1000] * 5000])
def test_what_cannot_be_parted_or_is_too_little_is_no_trial(sizes: list[int]) -> None:
    machine = Machine(usual=30, other=20)
    quicker = machine.quicker()
    for _ in range(8):
        quicker.copy(*blocks(sizes))
    assert not quicker.decided
    assert {name for name, *_ in machine.copied} <= {"usual"}
