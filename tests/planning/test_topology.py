"""Cliques are the documented ones where they can be, copies never share a failure domain, and no rank is left out."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.errors import ConfigError
from resilience.planning.topology import Topology, make_topology


def blocks(*sizes: int) -> list[str]:
    return [f"n{node}" for node, size in enumerate(sizes) for _ in range(size)]


def topology(
    nodes: list[str],
    factor: int = 2,
    jump: int | None = None,
    domains: dict[str, str] | None = None,
    restart: bool = False,
) -> Topology:
    return make_topology(len(nodes), nodes, jump=jump, factor=factor, domains=domains, restart=restart)


DOCUMENTED = [
    (8, 1, 2, "0-1 2-3 4-5 6-7"),
    (8, 2, 2, "0-2 1-3 4-6 5-7"),
    (8, 4, 2, "0-4 1-5 2-6 3-7"),
    (8, 2, 4, "0-2-4-6 1-3-5-7"),
    (16, 8, 2, "0-8 1-9 2-10 3-11 4-12 5-13 6-14 7-15"),
    (16, 4, 2, "0-4 1-5 2-6 3-7 8-12 9-13 10-14 11-15"),
    (16, 4, 4, "0-4-8-12 1-5-9-13 2-6-10-14 3-7-11-15"),
]


@pytest.mark.parametrize(("world", "jump", "factor", "groups"), DOCUMENTED)
def test_cliques_are_exactly_the_documented_ones(world: int, jump: int, factor: int, groups: str) -> None:
    made = topology(blocks(*[1] * world), factor, jump)
    assert made.cliques == tuple(tuple(map(int, group.split("-"))) for group in groups.split())
    assert made.protected
    assert made.notes == ()


@given(st.integers(1, 5), st.integers(1, 4), st.integers(2, 4))
def test_cliques_follow_the_formula_for_every_divisible_world(count: int, jump: int, factor: int) -> None:
    world = count * jump * factor
    expected = {
        tuple(a * jump * factor + b + step * jump for step in range(factor)) for a in range(count) for b in range(jump)
    }
    assert set(topology(blocks(*[jump] * (world // jump)), factor, jump).cliques) == expected


def test_the_default_jump_is_the_number_of_ranks_per_node() -> None:
    made = topology(blocks(4, 4, 4, 4))
    assert made.jump == 4
    assert made.cliques[:2] == ((0, 4), (1, 5))


def test_where_nodes_do_not_divide_the_last_ones_form_a_larger_clique_with_ring_placement() -> None:
    made = topology(blocks(2, 2, 2, 2, 2))
    assert made.cliques == ((0, 2), (1, 3), (4, 6, 8), (5, 7, 9))
    assert [made.holders[rank] for rank in (4, 6, 8)] == [(6,), (8,), (4,)]
    assert made.protected


@pytest.mark.parametrize("sizes", [(2, 2, 3), (4, 2, 2), (3, 1, 1, 1)])
def test_uneven_nodes_are_dealt_with_without_a_word(sizes: tuple[int, ...]) -> None:
    assert topology(blocks(*sizes)).notes == ()


def test_a_jump_that_puts_two_copies_on_one_node_is_refused_with_jumps_that_fit() -> None:
    with pytest.raises(
        ConfigError, match=r"jump=1 with replication_factor=2 at world size 8.*ranks 0 and 1.*'n0'"
    ) as e:
        topology(blocks(4, 4), jump=1)
    assert "fit: 4" in e.value.advice


def test_two_copies_in_one_larger_failure_domain_are_refused() -> None:
    racks = {"n0": "rack0", "n1": "rack0", "n2": "rack1", "n3": "rack1"}
    with pytest.raises(ConfigError, match="rack0") as error:
        topology(blocks(2, 2, 2, 2), domains=racks)
    assert "4" in error.value.advice
    assert topology(blocks(2, 2, 2, 2), jump=4, domains=racks).cliques == ((0, 4), (1, 5), (2, 6), (3, 7))


def test_more_copies_than_failure_domains_are_refused_at_a_first_start() -> None:
    with pytest.raises(
        ConfigError, match=r"replication_factor=3 needs 3 failure domains.*has 2.*world size 4"
    ) as error:
        topology(blocks(2, 2), factor=3)
    assert "replication_factor=2" in error.value.advice


def test_a_restart_with_fewer_domains_than_copies_goes_on_and_says_not_fully_protected() -> None:
    made = topology(blocks(2, 2), factor=3, restart=True)
    assert made.factor == 2
    assert not made.protected
    assert "not fully protected" in made.notes[0]
    assert made.cliques == ((0, 2), (1, 3))


def test_a_restart_whose_ranks_moved_is_never_refused() -> None:
    shuffled = ["n0", "n1", "n0", "n1", "n1", "n0", "n1", "n0"]
    made = topology(shuffled, jump=2, restart=True)
    assert made.protected
    assert all(shuffled[a] != shuffled[b] for a, held in enumerate(made.holders) for b in held)


@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("restart", [False, True])
def test_one_node_is_said_once_not_replicated_and_never_refused(ranks: int, restart: bool) -> None:
    made = topology(blocks(ranks), factor=3, jump=1, restart=restart)
    assert made.holders == ((),) * ranks
    assert made.factor == 1
    assert len(made.notes) == 1
    assert "one node" in made.notes[0]
    assert not made.protected


def test_a_domain_with_most_of_the_ranks_is_still_fully_copied() -> None:
    made = topology(blocks(8, 1, 1))
    assert made.protected
    assert "n0" in made.notes[0]
    check_copies(made, blocks(8, 1, 1), 2)


@pytest.mark.parametrize(("field", "bad"), [("jump", 0), ("factor", 0)])
def test_numbers_that_mean_nothing_are_refused(field: str, bad: int) -> None:
    with pytest.raises(ConfigError, match=f"replication_{field}"):
        topology(blocks(1, 1), **{field: bad})  # type: ignore[arg-type]


def check_copies(made: Topology, domain: list[str], copies: int) -> None:
    """Each shard has exactly `copies` copies, in different domains, inside its clique; cliques partition the ranks."""
    assert sorted(rank for clique in made.cliques for rank in clique) == list(range(made.world_size))
    of = {rank: clique for clique in made.cliques for rank in clique}
    for rank, holders in enumerate(made.holders):
        assert len(holders) == copies - 1
        assert len({domain[each] for each in (rank, *holders)}) == copies
        assert set(holders) <= set(of[rank])
    for rank, owners in enumerate(made.held()):
        assert all(rank in made.holders[owner] for owner in owners)


@given(
    st.lists(st.integers(1, 6), min_size=2, max_size=7),
    st.integers(2, 4),
    st.none() | st.integers(1, 6),
    st.randoms(use_true_random=False),
    st.booleans(),
)
def test_any_jump_and_any_uneven_nodes_keep_every_copy_in_a_domain_of_its_own(
    sizes: list[int], factor: int, jump: int | None, random: object, shuffle: bool
) -> None:
    nodes = blocks(*sizes)
    if shuffle:
        random.shuffle(nodes)  # type: ignore[attr-defined]
    made = topology(nodes, factor, jump, restart=True)
    copies = min(factor, len(sizes))
    assert made.factor == copies
    assert made.protected == (copies == factor)
    check_copies(made, nodes, copies)
    if max(Counter(nodes).values()) <= len(nodes) // copies:  # no domain is too large for rings alone
        assert all(copies <= len(clique) <= 2 * copies - 1 for clique in made.cliques)
        assert all(len(owners) == copies - 1 for owners in made.held())


@given(st.lists(st.integers(1, 5), min_size=2, max_size=6), st.integers(2, 3), st.none() | st.integers(1, 4))
def test_a_first_start_is_either_fully_protected_or_refused(sizes: list[int], factor: int, jump: int | None) -> None:
    nodes = blocks(*sizes)
    try:
        made = topology(nodes, factor, jump)
    except ConfigError:
        return
    assert made.protected
    check_copies(made, nodes, factor)
