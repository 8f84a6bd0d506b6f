"""A whole drill, from an empty directory to a verdict: the functions behind `resilience drill`."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

from resilience.drill import workdir
from resilience.drill.agents import Agents
from resilience.drill.environment import Plan, check_settings
from resilience.drill.flatness import judge
from resilience.drill.nodes import VirtualNodes, may_mount
from resilience.drill.orchestrate import DrillFailed, Explain, Orchestrator, Rehearsed, Watch
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
from resilience.drill.samples import Sampler
from resilience.drill.scenario import Scenario
from resilience.drill.soak import SoakResult, cut_short, problems_of_soak, soak_scenario
from resilience.drill.story import Story
from resilience.observe.events import EventLog, read_events
from resilience.observe.report import write_report
from resilience.observe.timeline import DRILL_RANK
from resilience.runtime.clock import SystemClock

_CHECKPOINTS_KEPT = 2  # in a soak, where the user's file does not say: all of them would fill the disk


@dataclass(frozen=True)
class Soak:
    """For how long a soak goes on, and the seed of its faults."""

    minutes: float
    seed: int


def run_drill(plan: Plan, story: Story, *, explain: Explain | None = None, report: Path | None = None) -> DrillResult:
    """Carry the plan out. Raises `ConfigError` before anything is started; what goes wrong later is in the result.

    Every process it started is gone, and every mount, when it returns or raises.
    """
    stage = _Stage(plan, story)
    plan, scenario = stage.plan, plan.scenario
    reference = Reference(None, 0.0)
    with stage:
        for fault in scenario.faults:
            if fault.kind == "full":
                every_node = range(scenario.nodes + scenario.spares)
                stage.nodes.give_own_mount(fault.index, scenario.saves_live_on, every_node)
        try:
            reference = stage.undisturbed(plan)
            done = stage.orchestrator(plan, explain, None).run()
        except DrillFailed as failure:
            done = Rehearsed(failure=failure)
    return stage.verdict(plan, done, _result(plan, done, reference, stage.wall_s, report))


def run_soak(
    plan: Plan, soak: Soak, story: Story, *, explain: Explain | None = None, report: Path | None = None
) -> tuple[DrillResult, SoakResult]:
    """Faults drawn from the seed for so many minutes, in one run; then its end, and an undisturbed run to compare with.

    Raises as `run_drill` does. The scenario's own faults and length are not used.
    """
    config = plan.resiliency
    keep = config if config.keep_persistent is not None else replace(config, keep_persistent=_CHECKPOINTS_KEPT)
    mounts = may_mount() and plan.scenario.save_type != "global"
    endless = soak_scenario(plan.scenario, soak.seed, soak.minutes, mounts=mounts)
    stage = _Stage(replace(plan, scenario=endless, resiliency=keep), story, soak.minutes * 60)
    plan, reference, done = stage.plan, Reference(None, 0.0), Rehearsed()
    sampler = Sampler(stage.clock, soak.minutes * 60, stage.kept_by_the_job)
    with stage:
        for index in range(endless.nodes + endless.spares) if mounts else ():
            stage.nodes.give_own_mount(index, endless.saves_live_on, range(endless.nodes + endless.spares))
        orchestrator = stage.orchestrator(plan, explain, sampler)
        done = orchestrator.run()
        plan = replace(plan, scenario=cut_short(endless, len(done.records), done.reached))
        if done.over:
            story.tell("drill", f"the time is up: a last attempt trains to iteration {plan.scenario.train_iters}")
            orchestrator.finish(plan, done)
        try:
            reference = stage.undisturbed(plan)
        except DrillFailed as failure:
            done.failure = done.failure or failure
    result = _result(plan, done, reference, stage.wall_s, report)
    settled_at = (plan.resiliency.keep_persistent or 0) * (plan.scenario.persist_every or 0) + plan.scenario.save_every
    flatness = judge(sampler.processes, sampler.directories, settled_at)
    soaked = SoakResult.of(
        plan.scenario, result.faults, flatness, minutes=soak.minutes, seed=soak.seed, attempts=done.attempts
    )
    problems = [*result.problems, *problems_of_soak(soaked, plan.scenario, result.faults)]
    sampler.write(plan.workdir / "samples.jsonl")
    return stage.verdict(plan, done, replace(result, problems=problems, passed=not problems)), soaked


class _Stage:
    """What every drill needs around it: directories, processes, clock and log; cleared away at the end."""

    def __init__(self, plan: Plan, story: Story, more_s: float = 0.0) -> None:
        check_settings(plan)
        self.plan = replace(plan, workdir=plan.workdir.resolve())
        workdir.prepare(self.plan.workdir)
        self.clock, self.agents, self.nodes = SystemClock(), Agents(), VirtualNodes(self.plan.workdir)
        self._story = story
        self._log = EventLog(self.plan.workdir, "drill", DRILL_RANK, self.clock)
        self._began = self.clock.wall()
        self.deadline = self._began + more_s + plan.timeout_s

    @property
    def wall_s(self) -> float:
        return self.clock.wall() - self._began

    def orchestrator(self, plan: Plan, explain: Explain | None, watch: Watch | None) -> Orchestrator:
        return Orchestrator(
            plan, self.nodes, self.agents, self._story, explain, self.deadline, self.clock, self._log, watch
        )

    def undisturbed(self, plan: Plan) -> Reference:
        """The run to compare with; its losses are told for the report."""
        reference = reference_run(plan, self.agents, self._story, self.deadline)
        for iteration, loss in reference.losses:
            self._log.emit("metric", name="undisturbed_loss", iteration=iteration, value=loss)
        return reference

    def kept_by_the_job(self) -> list[Path]:
        return [*self.nodes.directories(), self.plan.save_dir, *filter(None, [self.plan.global_dir])]

    def __enter__(self) -> None:
        return

    def __exit__(self, *_: object) -> None:
        self.agents.end(grace_s=0)
        self.nodes.close()

    def verdict(self, plan: Plan, done: Rehearsed, result: DrillResult) -> DrillResult:
        """Write the answer down, and tell it."""
        kept = (
            "passed", "bit_identical", "why_not_bits", "loss_difference", "world_sizes", "final_digest",
            "reference_digest", "problems", "train_iters",
        )  # fmt: skip
        self._log.emit("verdict", **{name: getattr(result, name) for name in kept})
        self._log.close()
        (plan.workdir / "result.json").write_text(json.dumps(result.as_json(), indent=2) + "\n", encoding="utf-8")
        write_report([plan.events_dir, plan.workdir / "drill.jsonl"], Path(result.report))
        _tell_verdict(self._story, result, done)
        return result


def _result(plan: Plan, done: Rehearsed, undisturbed: Reference, wall_s: float, report: Path | None) -> DrillResult:
    scenario, reference = plan.scenario, undisturbed.digest
    events = read_events([plan.events_dir, plan.workdir / "drill.jsonl"])
    final = digest_of(events, scenario.train_iters, scenario.world_sizes[-1])
    faults = recoveries(done.records, events)
    difference = loss_difference(events, undisturbed.losses)
    problems = problems_of(scenario, done.records, faults, events, final, reference, difference)
    if done.failure is not None:
        problems = [str(done.failure)]  # the rest follows from it
    return DrillResult(
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
        report=str(report or plan.workdir / "report.html"),
        workdir=str(plan.workdir),
    )


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
