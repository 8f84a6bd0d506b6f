"""Faults are read exactly as they are written, and a drill that cannot work is refused before anything starts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.drill.scenario import KINDS, Fault, Scenario, parse_fault, random_faults, rosters
from resilience.errors import ConfigError

FAULTS = st.builds(
    Fault,
    st.sampled_from(sorted(KINDS)),
    st.integers(0, 999),
    st.integers(0, 10**6),
)


@given(FAULTS)
def test_a_fault_reads_back_as_it_was_written(fault: Fault) -> None:
    assert parse_fault(fault.spec) == fault


def test_which_copy_is_damaged_can_be_said() -> None:
    assert parse_fault("corrupt:node=1,copy=all@35") == Fault("corrupt", 1, 35, "all")
    assert parse_fault("torn:node=1,copy=primary@35").spec == "torn:node=1@35"


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("kill:node=1@20", "kill wants rank=<number>"),
        ("lose:node@20", "lose wants node=<number>"),
        ("explode:node=1@20", "no fault 'explode'"),
        ("kill:rank=1", "cannot be read"),
        ("kill:rank=-1@5", "cannot be read"),
        ("kill:rank=1,copy=all@5", "corrupt and torn only"),
        ("corrupt:node=1,copy=some@5", "none of primary, replica, all"),
        ("slow:shared@20", "cannot be rehearsed yet"),
    ],
)
def test_a_fault_that_makes_no_sense_is_refused_with_what_is_allowed(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        parse_fault(spec)
    assert "kill:rank=K@N" in refused.value.advice


def scenario(*specs: str, **shape: object) -> Scenario:
    return Scenario(faults=tuple(parse_fault(spec) for spec in specs), **shape)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("specs", "shape", "says"),
    [
        (["kill:rank=4@20"], {}, r"ranks are 0…3"),
        (["kill:rank=7@20"], {"ranks_per_node": 2, "spares": -1}, "--spares -1"),
        (["lose:node=4@20"], {}, "does not train then; these do: node=0, node=1, node=2, node=3"),
        (["lose:node=1@20", "lose:node=2@30"], {}, "no spare is left to take node2's place. Give --spares 2"),
        (["lose:node=1@20", "stop:node=1@30"], {}, "does not train then; these do: node=0, node=4"),
        (["kill:rank=0@60"], {}, "not within 1…59"),
        (["kill:rank=0@0"], {}, "not within"),
        (["kill:rank=0@20", "kill:rank=0@20"], {}, "given twice"),
        (["torn:node=0@20"], {"save_type": "global"}, "no node holds copies"),
        (["join:node=5@20"], {}, "nodes join an elastic job only"),
        (["join:node=1@20"], {"elastic": True}, "that node trains or waits then"),
        (["join:node=4@20"], {"elastic": True, "spares": 1}, "that node trains or waits then"),
        (["join:node=64@20"], {"elastic": True}, "none of 0…63"),
        (["lose:node=0@20", "lose:node=1@30"], {"elastic": True, "nodes": 2, "spares": 0}, "no spare is left"),
        (["lose:node=3@20", "kill:rank=3@30"], {"elastic": True, "spares": 0}, r"ranks are 0…2"),
        ([], {"nodes": 0}, "--nodes 0"),
        ([], {"nodes": 40, "ranks_per_node": 10}, "too many for one machine"),
    ],
)
def test_faults_that_do_not_fit_the_shape_are_refused(specs: list[str], shape: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        scenario(*specs, **shape)


def test_a_spare_takes_the_place_of_the_lost_node_and_can_be_lost_itself() -> None:
    plan = scenario("lose:node=4@30", "lose:node=2@20", "stop:node=5@40", spares=2)
    assert rosters(plan) == ((0, 1, 2, 3), (0, 1, 4, 3), (0, 1, 5, 3), (0, 1, 5, 3))


def test_an_elastic_job_goes_on_without_a_lost_node_and_with_those_that_join() -> None:
    plan = scenario(
        "lose:node=0@10", "lose:node=2@20", "join:node=0@30", "join:node=7@30", "stop:node=7@40",
        elastic=True, spares=0, ranks_per_node=2,
    )  # fmt: skip
    assert rosters(plan) == ((0, 1, 2, 3), (1, 2, 3), (1, 3), (1, 3, 0, 7), (1, 3, 0, 7))
    assert plan.world_sizes == (8, 6, 4, 8, 8)
    assert plan.resized
    with_a_spare = scenario("lose:node=0@10", elastic=True, spares=1)
    assert (with_a_spare.world_sizes, with_a_spare.resized) == ((4, 4), False)


def test_faults_of_one_iteration_strike_together() -> None:
    plan = scenario("corrupt:node=1@35", "kill:rank=0@20", "corrupt:node=0,copy=replica@35")
    first, second = plan.strikes
    assert (first.ends_attempt, first.restarts) == (False, True)
    assert (second.ends_attempt, second.restarts) == (True, True)
    assert second.spec == "corrupt:node=1@35 + corrupt:node=0,copy=replica@35"


@given(
    st.integers(0, 10**9),
    st.integers(2, 5),
    st.integers(0, 3),
    st.sampled_from(["local", "global", "in_memory"]),
    st.booleans(),
)
def test_random_faults_always_make_a_drill_that_can_work(
    seed: int, nodes: int, spares: int, kind: str, elastic: bool
) -> None:
    shape = Scenario(nodes=nodes, spares=spares, train_iters=60, save_type=kind, elastic=elastic)  # type: ignore[arg-type]
    drawn = random_faults(shape, seed)
    assert drawn == random_faults(shape, seed)
    assert 1 <= len(drawn.faults) <= 3
    assert min(fault.iteration for fault in drawn.faults) > shape.save_every
    assert min(drawn.world_sizes) >= 2
    assert elastic or not drawn.resized
