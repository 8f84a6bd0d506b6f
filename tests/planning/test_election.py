"""The newest save that is complete, of one attempt only and of this run, is elected; everything else has a reason."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.errors import MissingCheckpointExit, NoUsableSaveError
from resilience.planning.election import Decision, ElectionPolicy, Strike
from resilience.planning.inventory import NodeSave, SaveId, Tier
from tests.planning.world import RUN, chosen, decide, folder, log, node_save, pair, save, sources


def reasons(decision: Decision) -> dict[int, str]:
    return {each.iteration: each.reason for each in decision.passed_over}


def test_the_newest_complete_save_is_elected() -> None:
    assert chosen(decide(sources(*pair(save(30)), *pair(save(40))))) == (40, 1, "in_memory")


def test_a_save_that_lacks_one_owner_is_passed_over_with_the_reason() -> None:
    torn = node_save("n0", save(40), [0], own=[0], world=2)
    decision = decide(sources(torn, *pair(save(30))))
    assert chosen(decision)[0] == 30
    assert "no usable copy of the shard of rank 1" in reasons(decision)[40]
    assert "nothing shows that it was ever complete" in reasons(decision)[40]


def test_two_attempts_of_one_generation_number_never_mix() -> None:
    """Each attempt saved iteration 40 under generation 2, and only together would they cover both owners."""
    one = node_save("n0", save(40, 2, "a" * 32), [0], own=[0], world=2)
    other = node_save("n1", save(40, 2, "b" * 32), [1], own=[1], world=2)
    decision = decide(sources(one, other, *pair(save(30))))
    assert chosen(decision)[0] == 30


def test_of_equal_iterations_the_higher_generation_wins_then_the_attempt_id() -> None:
    assert chosen(decide(sources(*pair(save(40, 1)), *pair(save(40, 3)), *pair(save(40, 2)))))[1] == 3
    twins = decide(sources(*pair(save(40, 2, "a" * 32)), *pair(save(40, 2, "b" * 32))))
    assert twins.chosen is not None
    assert twins.chosen.save.attempt == "b" * 32


def test_a_leftover_of_another_run_with_a_higher_iteration_is_never_elected() -> None:
    leftover = [dataclasses.replace(each, run_id="other") for each in pair(save(900))]
    decision = decide(sources(*pair(save(40)), *leftover, shared=[folder(save(800), run="third")]))
    assert chosen(decision)[0] == 40
    assert reasons(decision) == {900: "it belongs to run 'other'", 800: "it belongs to run 'third'"}


def test_of_equal_saves_the_cheapest_tier_is_loaded() -> None:
    both = sources(
        *pair(save(40), tier="local"),
        *pair(save(40), tier="in_memory"),
        shared=[folder(save(40)), folder(save(40), source="global", tier="global")],
    )
    assert chosen(decide(both))[2] == "in_memory"
    no_memory = [
        dataclasses.replace(each, node_saves=tuple(s for s in each.node_saves if s.tier != "in_memory"))
        for each in both
    ]
    assert chosen(decide(no_memory))[2] == "local"
    shared_only = [dataclasses.replace(each, node_saves=()) for each in both]
    assert chosen(decide(shared_only))[2] == "global"


def test_copies_of_one_save_may_be_spread_over_nodes_and_over_both_node_tiers() -> None:
    spread = sources(
        node_save("n0", save(40), [0], own=[0], world=2, tier="in_memory"),
        node_save("n7", save(40), [1], world=2, tier="local"),
    )
    assert chosen(decide(spread)) == (40, 1, "local")


def test_a_replica_whose_digest_is_not_the_owner_s_does_not_count() -> None:
    primary = node_save("n0", save(40), [0, 1], own=[0, 1], world=2)
    wrong = node_save("n1", save(40), [0, 1], world=2, digests={0: "xxh3-128-32m:0"})
    strikes = [Strike("n0", "in_memory", save(40), 0)]
    assert chosen(decide(sources(primary, wrong)))[0] == 40
    decision = decide(sources(primary, wrong, *pair(save(30))), strikes=strikes)
    assert chosen(decision)[0] == 30
    assert "1 copy failed to read or verify" in reasons(decision)[40]


def test_of_replicas_that_disagree_the_one_with_the_owner_s_digest_counts() -> None:
    primary = node_save("n0", save(40), [0], own=[0], world=1)
    wrong = node_save("n1", save(40), [0], world=1, digests={0: "xxh3-128-32m:0"})
    right = node_save("n2", save(40), [0], world=1)
    strikes = [Strike("n0", "in_memory", save(40), 0)]
    assert chosen(decide(sources(primary, wrong, right), world=1, strikes=strikes))[0] == 40


def test_replicas_that_disagree_without_a_primary_strike_that_owner_s_copies_out() -> None:
    a = node_save("n0", save(40), [0, 1], own=[0], world=2)
    b = node_save("n2", save(40), [1], world=2, digests={1: "xxh3-128-32m:0"})
    decision = decide(sources(a, b, *pair(save(30))))
    assert chosen(decision)[0] == 30
    assert "records of rank 1 disagree on its digest" in reasons(decision)[40]


def test_two_primaries_that_disagree_are_both_distrusted() -> None:
    a = node_save("n0", save(40), [0], own=[0], world=1)
    b = node_save("n1", save(40), [0], own=[0], world=1, digests={0: "xxh3-128-32m:0"})
    decision = decide(sources(a, b), world=1)
    assert decision.chosen is None


def test_a_struck_copy_is_replaced_by_the_replica_then_by_another_tier_then_by_an_older_save() -> None:
    inventories = sources(*pair(save(40)), *pair(save(30)), shared=[folder(save(40))])
    strikes = [Strike("n0", "in_memory", save(40), 0)]
    assert chosen(decide(inventories, strikes=strikes)) == (40, 1, "in_memory")
    strikes.append(Strike("n1", "in_memory", save(40), 0))
    assert chosen(decide(inventories, strikes=strikes)) == (40, 1, "persistent")
    strikes.append(Strike("save", "persistent", save(40)))
    assert chosen(decide(inventories, strikes=strikes)) == (30, 1, "in_memory")


def test_a_strike_without_an_owner_strikes_all_copies_of_that_save_there() -> None:
    inventories = sources(*pair(save(40)), *pair(save(30)))
    strikes = [Strike("n0", "in_memory", save(40)), Strike("n1", "in_memory", save(40), 1)]
    assert chosen(decide(inventories, strikes=strikes))[0] == 30


def test_parity_is_no_copy() -> None:
    parity = dataclasses.replace(node_save("n1", save(40), [1], world=2), roles=("parity",))
    whole = node_save("n0", save(40), [0, 1], own=[0, 1], world=2)
    assert decide(sources(whole, parity), strikes=[Strike("n0", "in_memory", save(40), 1)]).chosen is None


def test_a_persistent_save_of_another_world_size_is_usable() -> None:
    decision = decide(sources(shared=[folder(save(20), world=4)]), world=2)
    assert chosen(decision)[0] == 20


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_newest_save_is_elected_whatever_its_world_size(world: int) -> None:
    saves = [*pair(save(30), world=2), *pair(save(40, 2), world=4), *pair(save(35, 2), world=3)]
    decision = decide(sources(*saves), world=world)
    assert chosen(decision) == (40, 2, "in_memory")
    assert decision.chosen is not None
    assert decision.chosen.world_size == 4
    assert Decision.from_json(decision.to_json()) == decision


def test_a_save_of_another_world_size_that_lacks_an_owner_is_passed_over() -> None:
    torn = [each for each in pair(save(40, 2), world=4) if each.node_id in ("n0", "n3")]  # nobody has rank 1's
    decision = decide(sources(*torn, *pair(save(30), world=3)), world=2)
    assert chosen(decision)[0] == 30
    assert "no usable copy of the shard of rank 1" in reasons(decision)[40]


def test_copies_of_one_save_under_two_world_sizes_are_not_put_together() -> None:
    of_two, of_four = pair(save(40), world=2), pair(save(40), world=4)
    decision = decide(sources(of_two[0], *of_four), world=2)
    assert decision.chosen is not None
    assert decision.chosen.world_size == 4, "more copies say so"


def test_with_elastic_switched_off_node_saves_of_another_world_size_are_passed_over_for_older_ones() -> None:
    saves = sources(*pair(save(40, 2), world=4), *pair(save(30), world=2))
    decision = decide(saves, world=2, policy=ElectionPolicy(elastic=False))
    assert chosen(decision)[0] == 30
    assert "saved by 4 ranks, and this start has 2" in reasons(decision)[40]


def test_not_so_where_elastic_restarts_are_switched_off() -> None:
    decision = decide(sources(shared=[folder(save(20), world=4)]), world=2, policy=ElectionPolicy(elastic=False))
    assert decision.chosen is None
    assert "saved by 4 ranks, and this start has 2" in reasons(decision)[20]


def test_saves_that_are_passed_over_for_their_world_size_are_never_read_as_no_save_at_all() -> None:
    decision = decide(sources(*pair(save(40), world=4)), world=2, policy=ElectionPolicy(elastic=False))
    assert reasons(decision).keys() == {40}
    assert all("saved by 4 ranks, and this start has 2" in reason for reason in reasons(decision).values())
    with pytest.raises(NoUsableSaveError, match="iteration 40"):
        decision.raise_if_error()


def test_a_fresh_start_needs_a_run_that_never_completed_a_save() -> None:
    never_complete = node_save("n0", save(40), [0], own=[0], world=2)
    decision = decide(sources(never_complete, attempts=[log(1)]))
    assert decision.fresh
    assert decision.error is None
    assert decision.next_generation == 2


@pytest.mark.parametrize("proof", ["log", "certificate", "certified copies", "folder", "base"])
def test_a_run_that_completed_a_save_stops_when_none_is_usable(proof: str) -> None:
    half = node_save("n0", save(40), [0], own=[0], world=2, certified=proof == "certified copies")
    decision = decide(
        sources(
            half,
            attempts=[log(1, completed=save(40) if proof == "log" else None)]
            + ([log(2, base=save(40))] if proof == "base" else []),
            certificates=[save(40)] if proof == "certificate" else [],
            shared=[folder(save(40), problem="a file is missing")] if proof == "folder" else [],
        )
    )
    assert not decision.fresh
    with pytest.raises(NoUsableSaveError, match="once completed iteration 40"):
        decision.raise_if_error()


def test_on_no_usable_save_fresh_starts_over_and_says_so() -> None:
    decision = decide(sources(attempts=[log(1, completed=save(40))]), policy=ElectionPolicy(on_no_usable_save="fresh"))
    assert decision.fresh
    assert 'on_no_usable_save="fresh"' in decision.reason


def test_nothing_to_load_exits_where_the_user_asked_for_that() -> None:
    decision = decide(sources(empty=["n0"]), policy=ElectionPolicy(exit_on_missing=True))
    with pytest.raises(MissingCheckpointExit):
        decision.raise_if_error()


def test_a_folder_newer_than_the_tracker_is_passed_over_but_newer_node_saves_still_win() -> None:
    rolled_back = [folder(save(300), tracker=200), folder(save(200), tracker=200)]
    decision = decide(sources(shared=rolled_back))
    assert chosen(decision)[0] == 200
    assert reasons(decision) == {300: "the tracker names 200"}
    assert chosen(decide(sources(*pair(save(310)), shared=rolled_back)))[0] == 310


def test_a_damaged_folder_is_passed_over_with_its_problem() -> None:
    decision = decide(sources(shared=[folder(save(300), problem="__0_0.distcp is missing"), folder(save(200))]))
    assert chosen(decision)[0] == 200
    assert reasons(decision)[300] == "__0_0.distcp is missing"


def test_another_run_s_checkpoint_under_load_counts_only_while_this_run_has_no_save() -> None:
    theirs = folder(save(5000, 7, "f" * 32), run="theirs", source="load")
    first = decide(sources(shared=[theirs]))
    assert chosen(first)[0] == 5000
    assert first.chosen is not None
    assert first.chosen.foreign
    begun = log(1, base=theirs.save)
    assert chosen(decide(sources(shared=[theirs], attempts=[begun])))[0] == 5000
    later = decide(sources(*pair(save(10)), shared=[theirs], attempts=[begun]))
    assert chosen(later)[0] == 10
    lost = decide(sources(shared=[theirs], attempts=[log(1, base=theirs.save, completed=save(10))]))
    assert lost.error is not None
    assert lost.error[0] == "NoUsableSave"


def test_a_folder_that_names_no_run_is_a_start_for_a_run_without_saves() -> None:
    megatron = folder(SaveId(70, 0, ""), run=None, world=None)
    assert chosen(decide(sources(shared=[megatron])))[0] == 70
    assert chosen(decide(sources(*pair(save(10)), shared=[megatron])))[0] == 10


def test_a_checkpoint_to_start_from_that_is_damaged_is_not_silently_replaced_by_random_weights() -> None:
    decision = decide(sources(shared=[folder(save(5000), run="theirs", source="load", problem="torn")]))
    assert decision.error is not None
    assert decision.error[0] == "NoUsableSave"


def test_pretrained_weights_are_a_fresh_start_s_weights_and_nothing_else() -> None:
    weights = folder(SaveId(0, 0, ""), run=None, source="pretrained", world=64)
    policy = ElectionPolicy(pretrained=True)
    first = decide(sources(shared=[weights]), policy=policy)
    assert first.chosen is not None
    assert first.chosen.weights_only
    assert first.base is None
    assert chosen(decide(sources(*pair(save(10)), shared=[weights]), policy=policy))[0] == 10
    under_load = folder(save(5000), run="theirs", source="load")
    assert chosen(decide(sources(shared=[weights, under_load]), policy=policy))[0] == 5000
    missing = decide(sources(empty=["n0"]), policy=policy)
    assert missing.error is not None
    assert missing.error[0] == "CheckpointNotFound"


def test_the_generation_is_one_more_than_the_highest_seen_anywhere() -> None:
    assert decide(sources(*pair(save(40, 3)), attempts=[log(2)])).next_generation == 4
    assert decide(sources(*pair(save(40, 3)), attempts=[log(6)])).next_generation == 7
    assert decide(sources(node_save("n0", save(40, 5), [0], world=2), *pair(save(30)))).next_generation == 6
    assert decide(sources(shared=[folder(save(9, 90), run="other", source="load")])).next_generation == 1


# --- Properties ------------------------------------------------------------------------------------------------------

WORLD = 3
SAVES = st.builds(save, st.sampled_from([10, 20, 30]), st.integers(1, 2), st.sampled_from(["a" * 32, "b" * 32]))


@st.composite
def node_saves(draw: st.DrawFn) -> list[NodeSave]:
    made = {}
    for _ in range(draw(st.integers(0, 14))):
        node, which = draw(st.sampled_from(["n0", "n1", "n2"])), draw(SAVES)
        tier: Tier = draw(st.sampled_from(["in_memory", "local"]))
        owners = sorted(draw(st.sets(st.integers(0, WORLD - 1), min_size=1)))
        bad = dict.fromkeys(draw(st.sets(st.sampled_from(owners), max_size=1)), "xxh3-128-32m:bad")
        run = draw(st.sampled_from([RUN, RUN, RUN, "other"]))
        own = [owner for owner in owners if f"n{owner}" == node]
        made[node, which, tier, run] = node_save(
            node, which, owners, own=own, world=WORLD, tier=tier, run=run, digests=bad
        )
    return list(made.values())


STRIKES = st.lists(
    st.builds(
        Strike,
        st.sampled_from(["n0", "n1", "n2"]),
        st.sampled_from(["in_memory", "local"]),
        SAVES,
        st.none() | st.integers(0, WORLD - 1),
    ),
    max_size=6,
)


def digests(inputs: list[NodeSave], which: SaveId, owner: int, strikes: list[Strike]) -> set[str]:
    """Brute force: digests of the copies of one owner that were not struck off."""
    struck = {(s.where, s.tier, s.owner) for s in strikes if s.save == which}
    return {
        each.digests[each.owners.index(owner)]
        for each in inputs
        if each.run_id == RUN and each.save == which and owner in each.owners
        if not {(each.node_id, each.tier, None), (each.node_id, each.tier, owner)} & struck
    }


@given(node_saves(), STRIKES)
def test_what_is_elected_covers_every_owner_and_nothing_newer_could_be(
    inputs: list[NodeSave], strikes: list[Strike]
) -> None:
    decision = decide(sources(*inputs), world=WORLD, strikes=strikes)
    known = {each.save for each in inputs if each.run_id == RUN}
    covered = {which for which in known if all(digests(inputs, which, owner, strikes) for owner in range(WORLD))}
    agreed = {which for which in known if all(len(digests(inputs, which, owner, [])) == 1 for owner in range(WORLD))}
    if decision.chosen is None:
        newer = covered
    else:
        assert decision.chosen.save in covered
        newer = {which for which in covered if which > decision.chosen.save}
    assert not newer & agreed, "only a save whose records conflict may be passed over"
    assert {(p.iteration, p.generation) for p in decision.passed_over} >= {(w.iteration, w.generation) for w in newer}


@given(node_saves(), STRIKES, st.integers())
def test_the_decision_does_not_depend_on_who_answered_first(
    inputs: list[NodeSave], strikes: list[Strike], seed: int
) -> None:
    inventories = sources(*inputs, attempts=[log(1, completed=save(10)), log(2, base=save(10))])
    shuffled = list(inventories)
    random.Random(seed).shuffle(shuffled)
    shuffled = [
        dataclasses.replace(each, node_saves=each.node_saves[::-1], attempts=each.attempts[::-1]) for each in shuffled
    ]
    first = decide(inventories, world=WORLD, strikes=strikes)
    assert first.to_json() == decide(shuffled, world=WORLD, strikes=strikes[::-1]).to_json()


@given(node_saves(), STRIKES, st.booleans())
def test_a_decision_survives_its_journey_as_json(inputs: list[NodeSave], strikes: list[Strike], blind: bool) -> None:
    decision = decide(
        sources(*inputs, unknown=["n9"] if blind else []),
        world=WORLD,
        strikes=strikes,
        policy=ElectionPolicy(unknown_final=True),
    )
    assert Decision.from_json(decision.to_json()) == decision
    outcomes = [decision.chosen is not None, decision.fresh, decision.retry, decision.error is not None]
    assert sum(outcomes) == 1
