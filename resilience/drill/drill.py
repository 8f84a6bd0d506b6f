"""A whole drill, from an empty directory to a verdict: the function behind `resilience drill`."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from resilience.drill import workdir
from resilience.drill.agents import Agents
from resilience.drill.environment import Plan, check_settings
from resilience.drill.nodes import VirtualNodes
from resilience.drill.orchestrate import DrillFailed, Explain, Orchestrator, Rehearsed
from resilience.drill.reference import Reference, reference_run
from resilience.drill.result import (
    DrillResult,
    digest_of,
    goodput_of,
    loss_difference,
    problems_of,
    recoveries,
    stall_per_save,
    unplanned_restarts,
)
from resilience.drill.scenario import Scenario
from resilience.drill.story import Story
from resilience.observe.events import EventLog, read_events
from resilience.observe.report import write_report
from resilience.observe.timeline import DRILL_RANK
from resilience.runtime.clock import SystemClock


def run_drill(plan: Plan, story: Story, *, explain: Explain | None = None, report: Path | None = None) -> DrillResult:
    """Carry the plan out. Raises `ConfigError` before anything is started; what goes wrong later is in the result.

    Every process it started is gone, and every mount, when it returns or raises.
    """
    check_settings(plan)
    plan = replace(plan, workdir=plan.workdir.resolve())
    workdir.prepare(plan.workdir)
    agents, nodes, clock = Agents(), VirtualNodes(plan.workdir), SystemClock()
    log = EventLog(plan.workdir, "drill", DRILL_RANK, clock)
    began, deadline = clock.wall(), clock.wall() + plan.timeout_s
    reference = Reference(None, 0.0)
    try:
        for fault in plan.scenario.faults:
            if fault.kind == "full":
                every_node = range(plan.scenario.nodes + plan.scenario.spares)
                nodes.give_own_mount(fault.index, plan.scenario.saves_live_on, every_node)
        try:
            reference = reference_run(plan, agents, story, deadline)
            for iteration, loss in reference.losses:
                log.emit("metric", name="undisturbed_loss", iteration=iteration, value=loss)
            done = Orchestrator(plan, nodes, agents, story, explain, deadline, clock, log).run()
        except DrillFailed as failure:
            done = Rehearsed(failure=failure)
    finally:
        agents.end(grace_s=0)
        nodes.close()
    result = _result(plan, done, reference, clock.wall() - began, report or plan.workdir / "report.html")
    kept = (
        "passed", "bit_identical", "why_not_bits", "loss_difference", "world_sizes", "final_digest",
        "reference_digest", "problems", "train_iters",
    )  # fmt: skip
    log.emit("verdict", **{name: getattr(result, name) for name in kept})
    log.close()
    write_report([plan.events_dir, plan.workdir / "drill.jsonl"], Path(result.report))
    _tell_verdict(story, result, done)
    return result


def _result(plan: Plan, done: Rehearsed, undisturbed: Reference, wall_s: float, report: Path) -> DrillResult:
    scenario, reference = plan.scenario, undisturbed.digest
    events = read_events([plan.events_dir, plan.workdir / "drill.jsonl"])
    final = digest_of(events, scenario.train_iters, scenario.world_sizes[-1])
    faults = recoveries(done.records, events)
    difference = loss_difference(events, undisturbed.losses)
    problems = problems_of(scenario, done.records, faults, events, final, reference, difference)
    if done.failure is not None:
        problems = [str(done.failure)]  # the rest follows from it
    result = DrillResult(
        passed=not problems,
        nodes=scenario.nodes,
        ranks_per_node=scenario.ranks_per_node,
        train_iters=scenario.train_iters,
        faults=faults,
        world_sizes=list(scenario.world_sizes),
        final_digest=final,
        reference_digest=reference,
        bit_identical=None if scenario.resized else final is not None and final == reference,
        why_not_bits=_why_not_bits(scenario),
        loss_difference=None if difference is None else round(difference, 4),
        goodput=round(goodput_of(events), 4),
        stall_s_per_save=stall_per_save(events),
        saves_failed=sum(event["event"] == "save_failed" for event in events),
        unplanned_restarts=unplanned_restarts(done.records, events),
        wall_s=round(wall_s, 1),
        problems=problems,
        events=str(plan.events_dir),
        report=str(report),
        workdir=str(plan.workdir),
    )
    (plan.workdir / "result.json").write_text(json.dumps(result.as_json(), indent=2) + "\n", encoding="utf-8")
    return result


def _why_not_bits(scenario: Scenario) -> str:
    if not scenario.resized:
        return ""
    sizes = " → ".join(map(str, scenario.world_sizes))
    return f"the number of ranks changed ({sizes}), and with it the samples that each step averages over"


def _tell_verdict(story: Story, result: DrillResult, done: Rehearsed) -> None:
    if done.failure is not None:
        story.quote(done.failure.tail)
    if result.passed:
        story.tell("passed", _passed(result))
        return
    for problem in result.problems:
        story.tell("failed", problem)


def _passed(result: DrillResult) -> str:
    if result.bit_identical:
        return "the final state equals the undisturbed run's, bit for bit"
    if result.loss_difference is None:
        return f"training finished; bits are not compared: {result.why_not_bits}; the script tells no loss to compare"
    return (
        f"the loss stays within {result.loss_difference:.1%} of the undisturbed run's; bits are not compared: "
        f"{result.why_not_bits}"
    )
