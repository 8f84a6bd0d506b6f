"""An epoch that is begun by some ranks, gone on with by others and ended by a third crew: each sample is seen once."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler

from resilience.state.dataloader import LoaderCursor

Crew = tuple[int, int]  # ranks, and how many samples each takes at once


def cursors(crew: Crew, samples: int, *, drop_last: bool, shuffle: bool = True, even: bool = False) -> list[Any]:
    ranks, batch = crew
    dataset = list(range(samples))
    return [
        LoaderCursor(
            DataLoader(
                dataset,  # type: ignore[arg-type]
                batch,
                sampler=DistributedSampler(dataset, ranks, rank, shuffle=shuffle, seed=5, drop_last=even),  # type: ignore[arg-type]
                drop_last=drop_last,
            )
        )
        for rank in range(ranks)
    ]


def handed_on(before: list[Any], after: list[Any]) -> None:
    saved = before[0].state_dict()
    for cursor in after:
        moved = cursor.moved(saved)
        assert not isinstance(moved, str), moved
        assert not cursor.differences({**saved, **moved})
        cursor.load_state_dict({**saved, **moved})


def step(crew: list[Any]) -> list[int]:
    return [number for cursor in crew for number in cursor.next_batch().tolist()]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(30, 120),
    st.lists(st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(0, 4)), min_size=2, max_size=5),
    st.booleans(),
    st.booleans(),
)
def test_no_sample_of_an_epoch_is_lost_or_doubled_however_often_the_crew_changes(
    samples: int, crews: list[tuple[int, int, int]], shuffle: bool, restart: bool
) -> None:
    """With loaders that end in partial batches all are seen; ranks that come short are filled up as torch does it."""
    seen: Counter[int] = Counter()
    old: list[Any] | None = None
    for ranks, batch, steps in crews:
        crew = cursors((ranks, batch), samples, drop_last=False, shuffle=shuffle)
        if old is not None:
            handed_on(old, crew)
        if restart:  # the same ranks, started again in the middle
            again = cursors((ranks, batch), samples, drop_last=False, shuffle=shuffle)
            for rank, cursor in enumerate(again):
                cursor.load_state_dict(crew[rank].state_dict())
            crew = again
        for _ in range(steps):
            if sum(seen.values()) + ranks * batch <= samples:
                seen.update(step(crew))
        old = crew
    assert old is not None
    assert set(seen.values()) <= {1}, "nobody saw what another crew had seen"
    left = samples - len(seen)
    ranks, batch, _ = crews[-1]
    rest: Counter[int] = Counter()
    while sum(rest.values()) < left:
        rest.update(step(old))
    assert sum(rest.values()) - left < ranks, "filled up to equally many per rank, with less than one each"
    assert set(rest) >= set(range(samples)) - set(seen), "nothing is lost"
    following: Counter[int] = Counter()
    while sum(following.values()) < samples:
        following.update(step(old))
    assert set(following) == set(range(samples)), "the next epoch is a whole one"


@pytest.mark.parametrize("even", [False, True])
def test_what_whole_steps_cannot_take_is_left_out_at_the_end_of_the_epoch_only(even: bool) -> None:
    first = cursors((4, 2), 50, drop_last=True, even=even)
    seen = [number for _ in range(3) for number in step(first)]
    then = cursors((3, 2), 50, drop_last=True, even=even)
    handed_on(first, then)
    rest = [number for _ in range(4) for number in step(then)]  # 26 are left: four steps of six
    assert len(seen + rest) == len(set(seen + rest)) == 48
    following = step(then)
    assert set(following) & set(seen + rest), "a new epoch"
    assert then[0].state_dict()["epoch"] == 1


def test_an_epoch_that_is_over_is_not_begun_again() -> None:
    first = cursors((2, 4), 50, drop_last=True)
    for _ in range(6):
        step(first)
    then = cursors((3, 4), 50, drop_last=True)
    handed_on(first, then)
    step(then)
    assert then[0].state_dict()["epoch"] == 1


def test_a_position_counts_the_batches_that_were_drawn() -> None:
    first = cursors((4, 2), 60, drop_last=True)
    for _ in range(5):
        step(first)
    then = cursors((3, 2), 60, drop_last=True)
    handed_on(first, then)
    step(then)
    assert then[0].position() == 6
