"""Simulated runs agree with theory where there is one, with the job's own election, and with themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice, takewhile
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.errors import ConfigError
from resilience.foresight.estimate import estimate, estimate_model, theory_of
from resilience.foresight.exposure import exposure_of
from resilience.foresight.failures import Failure, FailureModel, drawn
from resilience.foresight.job import Job, PlannedJob, plan_job
from resilience.foresight.simulation import Durations, RunPlan, simulate_run
from resilience.foresight.timetable import Timetable
from resilience.planning.copies import copy_table, holdings_of
from resilience.planning.inventory import Inventory, NodeSave, SaveId
from resilience.planning.schemes import SCHEMES
from resilience.planning.topology import make_topology

QUIET = FailureModel(64, 3600, process_share=1.0)


def plain(steps: int = 20_000, every: int = 50, stall_s: float = 5, restart_s: float = 60) -> RunPlan:
    """What Young and Daly have in mind: one kind of save, complete at once, and every failure comes back to it."""
    return RunPlan(Timetable(steps, 1.0, every, stall_s, None, 0.0), Durations(restart_s=restart_s), None)


@pytest.mark.parametrize("mtbf_s", [900, 3600, 36_000])
@pytest.mark.parametrize("every", [10, 50, 200])
@pytest.mark.parametrize("stall_s", [0.5, 5, 30])
def test_goodput_is_daly_s_within_two_percent_where_failures_have_no_memory(
    mtbf_s: float, every: int, stall_s: float
) -> None:
    plan = plain(every=every, stall_s=stall_s)
    found = estimate_model(plan, replace(QUIET, mtbf_s=mtbf_s), runs=60, seed=7)
    theory = theory_of(plan, mtbf_s, away_s=60)
    assert theory is not None
    assert found.goodput == pytest.approx(theory.goodput, rel=0.02)
    assert found.unfinished == 0


@pytest.mark.parametrize(("mtbf_s", "stall_s"), [(1800, 2), (7200, 10), (36_000, 30)])
def test_no_interval_is_noticeably_better_than_daly_s(mtbf_s: float, stall_s: float) -> None:
    theory = theory_of(plain(stall_s=stall_s), mtbf_s, away_s=60)
    assert theory is not None

    def goodput(every: int) -> float:
        plan = plain(steps=every * (40_000 // every), every=every, stall_s=stall_s)
        return estimate_model(plan, replace(QUIET, mtbf_s=mtbf_s), runs=80, seed=3).goodput

    best = theory.daly_interval
    others = [goodput(max(1, round(best * factor))) for factor in (0.25, 0.5, 2, 4)]
    assert goodput(best) >= max(others) - 0.005


def test_a_failure_in_a_burst_costs_less_than_one_that_stands_alone() -> None:
    """Two failures in one interval lose little more than one does."""
    plan = plain(every=200, restart_s=0)
    evenly = estimate_model(plan, QUIET, runs=120, seed=1)
    bursts = estimate_model(plan, replace(QUIET, distribution="weibull", shape=0.5), runs=120, seed=1)
    assert bursts.lost_steps / bursts.failures < 0.9 * evenly.lost_steps / evenly.failures


@pytest.mark.parametrize("shape", [0.5, 0.7, 1.0, 2.0])
def test_failures_are_as_far_apart_as_asked_on_average(shape: float) -> None:
    model = FailureModel(8, 100.0, "weibull", shape)
    last = list(islice(drawn(model, Random(5)), 20_000))[-1]
    assert last.at_s / 20_000 == pytest.approx(100, rel=0.05)


def test_shares_of_failures_are_those_asked_for_and_racks_fall_whole() -> None:
    model = FailureModel(30, 1.0, process_share=0.5, rack_share=0.2, nodes_per_rack=4)
    struck = [failure.nodes for failure in islice(drawn(model, Random(2)), 10_000)]
    assert sum(not nodes for nodes in struck) / 10_000 == pytest.approx(0.5, abs=0.02)
    assert sum(len(nodes) == 1 for nodes in struck) / 10_000 == pytest.approx(0.3, abs=0.02)
    racks = {nodes for nodes in struck if len(nodes) > 1}
    assert racks == {*(tuple(range(first, first + 4)) for first in range(0, 28, 4)), (28, 29)}


# Against a walk through every quarter of a second


@st.composite
def histories(draw: st.DrawFn) -> tuple[RunPlan, list[Failure]]:
    """A small plan and failures in it; all times are quarters of a second, so that sums are exact."""
    quarters = st.integers(0, 16).map(lambda each: each / 4)
    commit_s = draw(quarters)
    table = Timetable(
        draw(st.integers(1, 25)), draw(st.integers(1, 6)) / 4, draw(st.integers(1, 6)), draw(quarters),
        draw(st.one_of(st.none(), st.integers(1, 9))), draw(quarters),
    )  # fmt: skip
    takes = Durations(
        commit_s, commit_s + draw(quarters), draw(quarters), draw(quarters), draw(quarters), 0.25, draw(quarters),
        draw(quarters), draw(quarters),
    )  # fmt: skip
    nodes = 4
    topology = make_topology(nodes, [f"n{i}" for i in range(nodes)], jump=None, factor=2, domains=None, restart=False)
    exposure = draw(st.sampled_from([None, exposure_of(topology, range(nodes), SCHEMES["replica"])]))
    times = draw(st.lists(st.integers(1, 300).map(lambda each: each / 4 + 0.125), max_size=8, unique=True))
    lost = st.lists(st.integers(0, nodes - 1), max_size=2, unique=True).map(tuple)
    failures = [Failure(at_s, draw(lost)) for at_s in sorted(times)]
    return RunPlan(table, takes, exposure, keep_last=draw(st.integers(1, 3))), failures


@settings(max_examples=150, deadline=None)
@given(histories())
def test_the_seconds_of_a_run_add_up_and_its_steps_are_kept_or_lost(history: tuple[RunPlan, list[Failure]]) -> None:
    plan, failures = history
    run = simulate_run(plan, failures)
    assert run.finished
    assert run.wall_s == pytest.approx(run.useful_s + run.lost_s + run.stall_s + run.cut_s + run.away_s + run.end_s)
    assert min(run.lost_s, run.stall_s, run.away_s, run.end_s) >= 0
    assert run.cut_s >= -1e-9
    assert 0 < run.goodput <= 1
    assert run.failures == len([failure for failure in failures if failure.at_s < run.wall_s - run.end_s])
    assert sum(run.resumed_from.values()) <= run.failures
    assert run.steps == plan.timetable.steps


@settings(max_examples=150, deadline=None)
@given(histories())
def test_a_run_is_what_a_walk_through_its_every_step_finds(history: tuple[RunPlan, list[Failure]]) -> None:
    plan, failures = history
    run = simulate_run(plan, failures)
    assert (run.lost_steps, run.unrecoverable, run.resumed_from, run.wall_s) == walked(plan, failures)


def walked(plan: RunPlan, failures: Sequence[Failure]) -> tuple[int, int, dict[str, int], float]:
    """The same run, naively: lists of events of each attempt, a save at a time, nothing skipped."""
    table, takes = plan.timetable, plan.durations
    now, base, lost_steps, unrecoverable = 0.0, 0, 0, 0
    resumed = {"own_nodes": 0, "peers": 0, "persistent": 0, "beginning": 0}
    kept: list[dict[str, object]] = []  # oldest first
    persisted = 0
    waiting = list(failures)
    while True:
        ends = now + table.ready_s(table.steps) - table.ready_s(base)
        if not waiting or waiting[0].at_s >= ends:
            return lost_steps, unrecoverable, resumed, ends + (takes.persist_s if table.persist_every else 0.0)
        at_s = waiting[0].at_s
        if at_s - now >= takes.refill_s:
            for save in kept:
                save.update(gone=set(), protected=True)
        reached, t = base, now
        protected: list[dict[str, object]] = []
        primary: list[dict[str, object]] = []
        for step in range(base + 1, table.steps + 1):
            t += table.step_s
            if t > at_s:
                break
            reached = step
            t = now + table.ready_s(step) - table.ready_s(base)
            if t > at_s:
                break
            if step % table.save_every == 0:  # type: ignore[operator]
                if t + takes.protect_s <= at_s:
                    protected.append({"step": step, "protected": True, "gone": set()})
                elif t + takes.commit_s <= at_s:
                    primary = [{"step": step, "protected": False, "gone": set()}]
            if table.persist_every and (step % table.persist_every == 0 or step == table.steps) and t + takes.persist_s <= at_s:  # noqa: E501  # fmt: skip
                persisted = step
        kept = [*kept, *protected[-plan.keep_last :], *primary][-(plan.keep_last + 1) :]
        back = math.inf
        while waiting and waiting[0].at_s < back:  # a failure during the restart begins it anew
            failure = waiting.pop(0)
            had = bool(kept)
            for save in kept:
                save["gone"] |= set(failure.nodes)  # type: ignore[operator]
            kept = [
                save for save in kept
                if not save["gone"] or (save["protected"] and plan.exposure and plan.exposure.survives(save["gone"]))  # type: ignore[arg-type]
            ]  # fmt: skip
            unrecoverable += had and not kept
            source, base = ("persistent" if persisted else "beginning"), persisted
            if kept and kept[-1]["step"] >= base:  # type: ignore[operator]
                source, base = ("peers" if kept[-1]["gone"] else "own_nodes"), kept[-1]["step"]  # type: ignore[assignment]
            lost_steps += reached - base
            reached = base
            back = failure.at_s + takes.away_s(source)  # type: ignore[arg-type]
        resumed[source] += 1
        now = back


# Against the job's own election


@settings(max_examples=60)
@given(st.integers(2, 12), st.integers(1, 3), st.integers(2, 4), st.data())
def test_what_survives_is_what_the_job_s_own_election_finds_complete(
    nodes: int, per_node: int, factor: int, data: st.DataObject
) -> None:
    factor = min(factor, nodes)
    ranks = nodes * per_node
    node_of = [rank // per_node for rank in range(ranks)]
    names = [f"node{node:02d}" for node in node_of]
    topology = make_topology(ranks, names, jump=None, factor=factor, domains=None, restart=True)
    lost = data.draw(st.sets(st.integers(0, nodes - 1), max_size=min(4, nodes)))
    save = SaveId(10, 1, "a" * 32)
    held = topology.held()
    inventories = []
    for node in set(range(nodes)) - lost:
        mine = [rank for rank in range(ranks) if node_of[rank] == node]
        owners = tuple(sorted({*mine, *(owner for rank in mine for owner in held[rank])}))
        roles = tuple("primary" if owner in mine else "replica" for owner in owners)
        copies = NodeSave(f"node{node:02d}", "local", "run", save, ranks, owners,
                          tuple(f"xxh3-128-32m:{owner:032x}" for owner in owners), (1,) * len(owners), roles)  # type: ignore[arg-type]  # fmt: skip
        inventories.append(Inventory(f"node{node:02d}", (copies,)))
    holdings = holdings_of(inventories, "run", ranks).get(save, ())
    complete = not copy_table(save, holdings, ranks).missing
    assert exposure_of(topology, node_of, SCHEMES["replica"]).survives(lost) is complete


def test_parity_survives_as_many_nodes_of_a_clique_as_it_has_parities() -> None:
    names = [f"node{node}" for node in range(8)]
    topology = make_topology(8, names, jump=1, factor=4, domains=None, restart=False)
    xor, rs = (exposure_of(topology, range(8), SCHEMES[name]) for name in ("xor", "rs"))
    assert [xor.survives(lost) for lost in ({0}, {0, 4}, {0, 1})] == [True, True, False]
    assert [rs.survives(lost) for lost in ({0, 1}, {0, 1, 6, 7}, {0, 1, 2})] == [True, True, False]


# What a user reads off


def planned(durations: Durations | None = None, **changes: object) -> PlannedJob:
    job = Job(256, 20_000, 1.0, save_every=100, persist_every=2000, nodes_per_rack=4, stall_s=0.5, persist_stall_s=1)
    takes = Durations(1, 5, 60, 30, 30, 60, 2, 5, 60) if durations is None else durations
    return plan_job(replace(job, **changes), takes)  # type: ignore[arg-type]


RACKS = FailureModel(32, 1800, rack_share=1.0, nodes_per_rack=4)


def test_racks_that_fail_whole_take_all_copies_unless_cliques_keep_their_racks_apart() -> None:
    together = estimate_model(planned().run, RACKS, runs=30, seed=1)
    apart = estimate_model(planned(racks_apart=True, jump=32).run, RACKS, runs=30, seed=1)
    assert together.unrecoverable > 1
    assert apart.unrecoverable < together.unrecoverable / 20
    assert apart.goodput > together.goodput + 0.05


def test_a_loss_beyond_redundancy_goes_back_to_shared_storage_and_never_further() -> None:
    run = simulate_run(planned().run, [Failure(6_050, (0, 1)), Failure(9_000, (3,))])
    assert run.unrecoverable == 1
    assert run.resumed_from == {"own_nodes": 0, "peers": 1, "persistent": 1, "beginning": 0}
    assert 100 < run.most_lost_steps <= 2000 + 100


def test_without_redundancy_each_lost_node_costs_what_shared_storage_is_behind() -> None:
    nodes = replace(RACKS, rack_share=0.0)
    alone = estimate_model(planned(redundancy="none").run, nodes, runs=30, seed=1)
    copied = estimate_model(planned().run, nodes, runs=30, seed=1)
    assert alone.lost_steps > 5 * copied.lost_steps


@given(st.floats(600, 30_000), st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_twice_as_rare_failures_are_never_worse_in_expectation(mtbf_s: float, seed: int) -> None:
    often, rarely = (
        estimate_model(planned().run, FailureModel(32, each, process_share=0.5), runs=40, seed=seed)
        for each in (mtbf_s, 2 * mtbf_s)
    )
    assert rarely.goodput >= often.goodput - (rarely.high - rarely.low) / 2


def test_equal_seeds_give_equal_estimates_and_others_do_not() -> None:
    first, again, other = (estimate_model(planned().run, RACKS, runs=5, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_saves_that_take_longer_than_they_are_apart_are_made_less_often_and_it_is_said() -> None:
    slow = planned(Durations(commit_s=1, protect_s=250), persist_every=None)
    assert slow.run.timetable.save_every == 300
    assert "only every 3. one is made" in slow.notes[0]


def test_a_run_that_fails_too_often_to_finish_is_given_up_and_counted() -> None:
    plan = replace(plain(every=200, restart_s=600), most_failures=500)
    found = estimate_model(plan, replace(QUIET, mtbf_s=60), runs=2, seed=1)
    assert found.unfinished == 2
    assert found.goodput < 0.01


def test_no_failure_costs_nothing_but_the_saves() -> None:
    found = estimate(plain(steps=100, every=10, stall_s=1), lambda _: (), 1)
    assert found.goodput == pytest.approx(100 / 110)
    assert found.failures == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [({"step_s": 0.0}, "step_s=0"), ({"ranks": 0}, "ranks=0"), ({"save_every": -5}, "save_every=-5"),
     ({"factor": 64}, "replication_factor=64")],
)  # fmt: skip
def test_jobs_that_cannot_be_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        planned(**change)  # type: ignore[arg-type]


def test_failures_come_in_order_without_end() -> None:
    times = [failure.at_s for failure in islice(drawn(QUIET, Random(1)), 1000)]
    assert times == sorted(times)
    assert len(list(takewhile(lambda failure: failure.at_s < 1e6, _drawn()))) > 100


def _drawn() -> Iterator[Failure]:
    return drawn(replace(QUIET, distribution="weibull"), Random(1))
