"""Merging by maximum gives every rank the same agreement: any request, the slowest progress, one error for all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.errors import DivergedRanksError
from resilience.planning.control import (
    SLOTS,
    VECTOR_LENGTH,
    ControlAgreement,
    ControlReport,
    SlotReport,
    decode,
    encode,
    merge,
)
from resilience.planning.retention import Progress
from tests.planning.world import save

SAVES = tuple(save(10 * (place + 1)) for place in range(SLOTS))


def agree(*reports: ControlReport, slots: int = 0) -> ControlAgreement:
    return decode(merge([encode(report, SAVES[:slots]) for report in reports]))


SLOT_REPORTS = st.builds(
    SlotReport,
    save=st.just(SAVES[0]),
    progress=st.sampled_from(["pending", "primary", "protected"]),
    failed=st.booleans(),
    settled=st.booleans(),
    cost_us=st.integers(0, 2**40),
)
REPORTS = st.builds(
    ControlReport,
    iteration=st.just(35),
    stop=st.booleans(),
    save_non_persistent=st.booleans(),
    save_persistent=st.booleans(),
    leaving=st.booleans(),
    epoch_wanted=st.integers(0, 9),
    step_us=st.integers(0, 2**40),
    failures=st.integers(0, 9),
    free_arenas=st.integers(0, 5),
    last=st.just(False),  # as on all others
    stall_us=st.integers(0, 2**40),
    idle_us=st.integers(0, 2**40),
    saves=st.tuples(SLOT_REPORTS),
)


@given(st.lists(REPORTS, min_size=1, max_size=5))
def test_a_request_of_any_rank_is_everybody_s_and_progress_is_that_of_the_slowest(reports: list[ControlReport]) -> None:
    agreed = agree(*reports, slots=1)
    assert agreed.iteration == 35
    asked = {"stop": "stop", "save_non_persistent": "non_persistent", "save_persistent": "persistent"}
    assert agreed.requests == {asked[name] for name in asked if any(getattr(report, name) for report in reports)}
    assert agreed.leaving == any(report.leaving for report in reports)
    assert agreed.epoch_wanted == max(report.epoch_wanted for report in reports)
    assert agreed.free_arenas == min(report.free_arenas for report in reports)
    assert agreed.stall_us == max(report.stall_us for report in reports)
    assert agreed.idle_us == min(report.idle_us for report in reports)
    slots = [report.saves[0] for report in reports]
    order: list[Progress] = ["pending", "primary", "protected"]
    slowest = min((slot.progress for slot in slots), key=order.index)
    assert agreed.saves[0].progress == ("failed" if any(slot.failed for slot in slots) else slowest)
    assert agreed.saves[0].settled == all(slot.settled or slot.failed for slot in slots)
    assert agreed.saves[0].cost_us == max(slot.cost_us for slot in slots)


@given(st.lists(REPORTS, min_size=1, max_size=6), st.integers(1, 3))
def test_node_leaders_may_merge_first(reports: list[ControlReport], cut: int) -> None:
    vectors = [encode(report, SAVES[:1]) for report in reports]
    nodes = [vectors[start : start + cut] for start in range(0, len(vectors), cut)]
    assert merge([merge(node) for node in nodes]) == merge(vectors)


@given(st.integers(0, SLOTS))
def test_the_vector_has_one_length_however_many_saves_are_outstanding(slots: int) -> None:
    vector = encode(ControlReport(35), SAVES[:slots])
    assert len(vector) == VECTOR_LENGTH
    assert [each.iteration for each in decode(vector).saves] == [each.iteration for each in SAVES[:slots]]


def test_a_rank_without_a_report_on_a_save_holds_it_back() -> None:
    done = ControlReport(35, saves=(SlotReport(SAVES[0], "protected", settled=True),))
    assert agree(done, ControlReport(35), slots=1).saves[0].progress == "pending"


@given(st.lists(st.integers(1, 3), min_size=2, max_size=5))
def test_ranks_at_different_iterations_all_raise_the_same_error(iterations: list[int]) -> None:
    if len(set(iterations)) == 1:
        return
    with pytest.raises(DivergedRanksError, match=f"furthest finished {max(iterations)}.*last one {min(iterations)}"):
        agree(*map(ControlReport, iterations))


def test_ranks_that_mean_different_saves_diverged() -> None:
    vectors = [encode(ControlReport(35), [save(20)]), encode(ControlReport(35), [save(30)])]
    with pytest.raises(DivergedRanksError, match="iteration 20 on one, 30 on another"):
        decode(merge(vectors))
    with pytest.raises(DivergedRanksError, match="0 to 1 saves"):
        decode(merge([encode(ControlReport(35), [save(20)]), encode(ControlReport(35), [])]))


def test_a_rank_whose_loader_ended_says_leaving_and_is_no_divergence() -> None:
    staying = encode(ControlReport(36), SAVES[:2])
    leaving = encode(ControlReport(35, leaving=True), SAVES[:1])
    agreed = decode(merge([staying, leaving]))
    assert agreed.leaving
    assert agreed.iteration == 35
    assert [each.iteration for each in agreed.saves] == [10]


def test_a_vector_of_another_version_is_refused() -> None:
    with pytest.raises(DivergedRanksError, match="numbers"):
        decode([0] * (VECTOR_LENGTH - 1))
