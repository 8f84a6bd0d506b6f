"""What the schemes cost and survive, held against counting by hand; and how losses of a clique are solved."""

from __future__ import annotations

import itertools
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.planning.erasure import Code, gf_divide, gf_multiply
from resilience.planning.schemes import SCHEMES, compare, loss_probability


@given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255), st.integers(1, 255))
def test_the_field_is_a_field(a: int, b: int, c: int, d: int) -> None:
    assert gf_multiply(a, b) == gf_multiply(b, a)
    assert gf_multiply(a, gf_multiply(b, c)) == gf_multiply(gf_multiply(a, b), c)
    assert gf_multiply(a, b ^ c) == gf_multiply(a, b) ^ gf_multiply(a, c)
    assert gf_multiply(gf_divide(a, d), d) == a


@pytest.mark.parametrize("parities", [1, 2])
@pytest.mark.parametrize("members", range(2, 9))
def test_every_member_keeps_one_parity_of_each_kind_and_gives_its_stripes_to_the_other_rows(
    members: int, parities: int
) -> None:
    if members <= parities:
        return
    code = Code(members, parities)
    for member in range(members):
        kept = {code.kept_row(member, parity) for parity in range(parities)}
        given_to = {code.row_of(member, stripe) for stripe in range(code.data)}
        assert len(kept) == parities
        assert kept | given_to == set(range(members))
        assert not kept & given_to
        for stripe in range(code.data):
            assert code.contributor(code.row_of(member, stripe), stripe) == member
        for parity in range(parities):
            assert code.keeper(code.kept_row(member, parity), parity) == member


@pytest.mark.parametrize("parities", [1, 2])
@pytest.mark.parametrize("members", range(2, 9))
def test_as_many_lost_members_as_there_are_parities_can_be_solved_and_no_more(members: int, parities: int) -> None:
    if members <= parities:
        return
    code = Code(members, parities)
    for count in range(1, members):
        for lost in itertools.combinations(range(members), count):
            left = set(range(members)) - set(lost)
            plans = [code.recover(member, left, left) for member in lost]
            assert all(plan is not None for plan in plans) == (count <= parities)


def test_a_lost_parity_is_made_up_for_by_the_other_one() -> None:
    """`rs`, one lost shard, and the parity of one further member is bad too: each row still has an equation."""
    code = Code(5, 2)
    for lost, bad in itertools.permutations(range(5), 2):
        shards = set(range(5)) - {lost}
        assert code.recover(lost, shards, shards - {bad}) is not None
        assert Code(5, 1).recover(lost, shards, shards - {bad}) is None


@pytest.mark.parametrize(("domains", "clique", "losses"), [(6, 2, 1), (8, 4, 1), (8, 4, 2), (7, 3, 1), (9, 4, 2)])
@pytest.mark.parametrize("lost", [1, 2, 3, 4])
def test_the_risk_is_what_counting_all_sets_of_lost_domains_gives(
    domains: int, clique: int, losses: int, lost: int
) -> None:
    cliques = domains // clique
    member_of = [min(domain // clique, cliques - 1) for domain in range(domains)]
    sets = list(itertools.combinations(range(domains), lost))
    bad = sum(
        any(sum(member_of[domain] == each for domain in chosen) > losses for each in range(cliques)) for chosen in sets
    )
    assert loss_probability(domains, clique, losses, lost) == pytest.approx(float(Fraction(bad, len(sets))))


def test_the_schemes_are_compared_in_memory_traffic_and_risk() -> None:
    shard = 3 << 30
    replica, xor, rs = compare(shard, 16, options=[("replica", 3), ("xor", 4), ("rs", 4)])
    assert (replica.kept_ratio, replica.survives, replica.sent_bytes) == (2.0, 2, 2 * shard)
    assert (xor.kept_bytes, xor.survives, xor.sent_bytes) == (1 << 30, 1, shard)
    assert (rs.kept_ratio, rs.survives, rs.sent_bytes) == (1.0, 2, 3 * shard // 2)
    assert xor.loss_probability[1] == rs.loss_probability[2] == 0
    assert rs.loss_probability[3] == pytest.approx(4 * 4 / 560)
    assert replica.loss_probability[2] == 0 < replica.loss_probability[3]


def test_what_the_domains_do_not_allow_is_left_out() -> None:
    assert [(each.scheme, each.clique) for each in compare(1, 4)] == [
        ("replica", 2), ("replica", 3), ("xor", 4), ("rs", 4),
    ]  # fmt: skip
    assert compare(1, 1) == ()
    assert SCHEMES["rs"].smallest_clique == 3


def test_the_risk_among_thousands_of_domains_is_counted_at_once() -> None:
    assert 0 < loss_probability(2048, 8, 2, 3) < loss_probability(2048, 8, 2, 20) < 1
