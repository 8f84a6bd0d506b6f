"""An I/O error is never read as an empty directory: what happens when a source does not answer."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.errors import SourceUnavailableError
from resilience.planning.election import ElectionPolicy
from tests.planning.world import chosen, decide, folder, log, pair, save, sources

FINAL = ElectionPolicy(unknown_final=True)


def test_an_unreadable_source_is_asked_again_before_anything_is_decided() -> None:
    decision = decide(sources(*pair(save(40)), unknown=["save"]))
    assert decision.retry
    assert decision.chosen is None
    assert decision.error is None
    assert decision.unknown == ("save: Input/output error",)


def test_after_the_bound_a_save_as_new_as_anything_known_is_good_enough() -> None:
    logs = [log(1, completed=save(40))]
    decision = decide(sources(*pair(save(40)), attempts=logs, unknown=["save"]), policy=FINAL)
    assert chosen(decision)[0] == 40


@pytest.mark.parametrize("evidence", ["certificate", "log", "base", "damaged folder"])
def test_after_the_bound_an_older_save_than_one_known_to_be_complete_is_refused(evidence: str) -> None:
    inventories = sources(
        *pair(save(30)),
        certificates=[save(40)] if evidence == "certificate" else [],
        attempts=[log(1, completed=save(40) if evidence == "log" else None)]
        + ([log(2, base=save(40))] if evidence == "base" else []),
        shared=[folder(save(40), problem="torn")] if evidence == "damaged folder" else [],
        unknown=["n5"],
    )
    with pytest.raises(SourceUnavailableError, match=r"iteration 40.*n5: Input/output error"):
        decide(inventories, policy=FINAL).raise_if_error()


def test_an_abandoned_save_does_not_hold_up_a_restart_with_an_unreadable_source() -> None:
    logs = [log(1, completed=save(40)), log(2, base=save(20), completed=save(30, 2))]
    inventories = sources(*pair(save(30, 2)), attempts=logs, unknown=["n5"])
    assert chosen(decide(inventories, policy=FINAL))[0] == 30


@pytest.mark.parametrize("policy", [FINAL, dataclasses.replace(FINAL, on_no_usable_save="fresh")])
def test_a_fresh_start_needs_every_source_to_answer(policy: ElectionPolicy) -> None:
    for inventories in (
        sources(empty=["n0"], unknown=["save"]),
        sources(shared=[folder(save(9), run="theirs", source="load")], unknown=["save"]),
        sources(attempts=[log(1, completed=save(40))], unknown=["save"]),
    ):
        with pytest.raises(SourceUnavailableError):
            decide(inventories, policy=policy).raise_if_error()


def test_ckpt_step_goes_on_without_the_unreadable_source_unless_that_is_where_it_must_be() -> None:
    policy = dataclasses.replace(FINAL, ckpt_step=20, fork_id="x")
    logs = [log(1, completed=save(40))]
    elsewhere = decide(sources(shared=[folder(save(20))], attempts=logs, unknown=["n5"]), policy=policy)
    assert chosen(elsewhere)[0] == 20
    with pytest.raises(SourceUnavailableError, match="ckpt_step=20"):
        decide(sources(attempts=logs, unknown=["save"]), policy=policy).raise_if_error()


@given(st.sets(st.integers(1, 6)), st.sets(st.integers(1, 6)))
def test_with_an_unreadable_source_nothing_older_than_the_newest_evidence_is_ever_resumed(
    complete: set[int], certified: set[int]
) -> None:
    copies = [each for iteration in complete for each in pair(save(iteration), certified=False)]
    inventories = sources(*copies, certificates=[save(each) for each in certified], unknown=["n9"])
    decision = decide(inventories, policy=FINAL)
    assert not decision.fresh
    if decision.chosen is None:
        assert max(complete, default=0) < max(certified, default=1)
    else:
        assert decision.chosen.save.iteration == max(complete)
        assert decision.chosen.save.iteration >= max(certified, default=0)
