"""Everybody is reached from everybody, no group is wide, and a rank that leads nothing talks to its neighbours only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.planning.fan_in import WIDEST, connections, fan_in

NODES = st.lists(st.sampled_from("abcdefgh"), min_size=2, max_size=60)


@given(NODES, st.integers(2, 9), st.booleans())
def test_a_word_of_anybody_reaches_everybody(nodes: list[str], widest: int, with_nodes: bool) -> None:
    levels = fan_in(range(len(nodes)), nodes if with_nodes else None, widest)
    known = {rank: {rank} for rank in range(len(nodes))}
    for level in [*levels, *reversed(levels)]:  # up, then down
        for group in level:
            together = set().union(*(known[rank] for rank in group))
            for rank in group:
                known[rank] = set(together)
    assert all(heard == set(range(len(nodes))) for heard in known.values())


@given(NODES, st.integers(2, 9), st.booleans())
def test_groups_are_narrow_and_who_is_in_a_level_leads_all_its_groups_below(
    nodes: list[str], widest: int, with_nodes: bool
) -> None:
    levels = fan_in(range(len(nodes)), nodes if with_nodes else None, widest)
    assert len(levels[-1]) == 1
    for height, level in enumerate(levels):
        assert all(2 <= len(group) <= widest for group in level)
        for group in level:
            for rank in group:
                below = [each for lower in levels[:height] for each in lower if rank in each]
                assert all(each[0] == rank for each in below)


@given(NODES, st.integers(2, 9))
def test_without_nodes_each_group_s_subtree_is_a_run_of_neighbours(nodes: list[str], widest: int) -> None:
    below = {rank: [rank] for rank in range(len(nodes))}
    for level in fan_in(range(len(nodes)), None, widest):
        for group in level:
            below[group[0]] = [each for rank in group for each in below[rank]]
    assert below[0] == list(range(len(nodes)))


def test_few_ranks_need_no_tree() -> None:
    nodes = [f"n{rank // 8}" for rank in range(WIDEST)]
    assert fan_in(range(WIDEST), nodes) == [[tuple(range(WIDEST))]]


@pytest.mark.parametrize(("world", "per_node"), [(16_384, 8), (16_384, 1), (1024, 4), (65, 1)])
def test_connections_of_a_rank_at_scale(world: int, per_node: int) -> None:
    levels = fan_in(range(world), [f"n{rank // per_node}" for rank in range(world)])
    counts = [0] * world
    for level in levels:
        for group in level:
            for rank in group:
                counts[rank] += len(group) - 1
    leads_nothing = per_node - 1 if per_node > 1 else WIDEST - 1
    assert min(counts) <= leads_nothing
    assert sorted(counts)[world * (per_node - 1) // per_node - 1 if per_node > 1 else world // 2] <= leads_nothing
    assert max(counts) <= leads_nothing + 3 * (WIDEST - 1)
    assert connections(levels, 0) == counts[0]
