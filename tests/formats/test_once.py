"""Of what several ranks hold, the lowest writes what is equal; parts that overlap are written by nobody."""

from __future__ import annotations

import torch

from resilience.formats.once import once
from resilience.formats.protocol import Chunk
from resilience.testing.ranks import ThreadAgreements, on_all_ranks

KEY = "optimizer/0/state/w/exp_avg"


def part(start: int, stop: int) -> Chunk:
    return Chunk(KEY, torch.arange(start, stop, dtype=torch.float32), (10,), (start,), True)


def test_equal_parts_are_written_once_and_make_up_the_whole() -> None:
    held = [[part(0, 6)], [part(6, 10)], [part(0, 6)]]

    def work(world: ThreadAgreements) -> list[tuple[int, bool]]:
        return [(chunk.offsets[0], chunk.per_rank) for chunk in once(held[world.rank], world)]

    assert on_all_ranks(3, work) == [[(0, False)], [(6, False)], []]


def test_parts_that_overlap_fail_the_save_on_all_ranks() -> None:
    held = [[part(0, 6)], [part(6, 10)], [part(0, 5)], []]

    outcomes = on_all_ranks(4, lambda world: once(held[world.rank], world))
    assert ["overlap" in str(outcome) for outcome in outcomes] == [True] * 4
    assert all(type(outcome).__name__ == "SaveFailedError" for outcome in outcomes)
