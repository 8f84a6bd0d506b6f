"""The order of events of a drill: a reference run, then attempt after attempt, with faults when they are due.

A rank's death is left to torchrun, which restarts in place. The death of a node ends the attempt, as with a scheduler:
every agent is ended, and the next attempt starts on the survivors and a spare, with a rendezvous of its own. (Adding a
node to the rendezvous of a dead one does not work: the dead node is counted into the next round.)
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from resilience.drill import damage
from resilience.drill.agents import Agents, last_words
from resilience.drill.environment import Plan, drill_settings, environment, fault_variables
from resilience.drill.nodes import VirtualNode, VirtualNodes
from resilience.drill.output import LossTail
from resilience.drill.progress import JobProgress, RankProgress
from resilience.drill.rehearsal import at
from resilience.drill.result import Decision, StrikeRecord
from resilience.drill.scenario import KINDS, Fault, Strike, rosters
from resilience.drill.story import Story
from resilience.errors import CommandError, ResilienceError
from resilience.observe.events import EventLog, EventTail
from resilience.observe.phrases import phrase, shortened
from resilience.runtime.clock import Clock

_POLL_S = 0.05
_OVERRIDDEN = " was given in code, "
_TERM_GRACE_S = 8.0
_TOLD = frozenset(
    {"resume", "fresh", "save_failed", "warning", "exception", "hang", "replication_down", "unequal_items"}
)


@dataclass(frozen=True)
class Sources:
    """What `explain` is asked about: the directories that the next start will find."""

    local: tuple[Path, ...]
    save: Path
    global_dir: Path | None
    run_id: str
    world_size: int


class Explain(Protocol):
    def __call__(self, sources: Sources) -> Decision | None:
        """What a start on these sources would resume from; None: a fresh start. Raises where it cannot tell."""


class Watch(Protocol):
    """Looks at a drill that has no fixed end (a soak)."""

    def look(self, ranks: Mapping[int, RankProgress]) -> None:
        """Called again and again; takes little time."""

    def over(self) -> bool:
        """Whether it is time to come to an end."""


class DrillFailed(CommandError):
    """The drill could not go on; carries the last lines of the logs."""

    def __init__(self, message: str, tail: list[str]) -> None:
        super().__init__(message, status=1)
        self.tail = tail


@dataclass
class Rehearsed:
    """What came of the attempts: the strikes as carried out, and why it ended early, if it did.

    `over`: the watch said so, before training had finished; `reached` is how far it was then.
    """

    records: list[StrikeRecord] = field(default_factory=list)
    failure: DrillFailed | None = None
    attempts: int = 0
    over: bool = False
    reached: int = 0


class Orchestrator:
    """Runs all attempts of one drill. `explain` may be None: then nothing is predicted."""

    def __init__(
        self,
        plan: Plan,
        nodes: VirtualNodes,
        agents: Agents,
        story: Story,
        explain: Explain | None,
        deadline: float,
        clock: Clock,
        log: EventLog,
        watch: Watch | None = None,
    ) -> None:
        self._plan = plan
        self._nodes = nodes
        self._agents = agents
        self._story = story
        self._explain = explain
        self._deadline = deadline  # by `clock`
        self._clock = clock
        self._log = log
        self._watch = watch
        self._tail = EventTail(plan.events_dir)
        self._progress = JobProgress()
        self._world_size = plan.scenario.world_size
        self._told_iteration = 0
        self._full: dict[int, int] = {}  # nodes whose mounts are full, and since which iteration
        self._logs: list[Path] = []
        self._losses = LossTail([])
        self._loss = ""

    def run(self) -> Rehearsed:
        """Attempts until training has finished or cannot go on. Leaves no process behind, whatever happens."""
        done = Rehearsed()
        waiting = list(self._plan.scenario.strikes)
        try:
            for attempt in range(1, len(waiting) + 2):
                roster = rosters(self._plan.scenario)[len(self._plan.scenario.strikes) - len(waiting)]
                self._start(attempt, roster, tuple(waiting))
                done.attempts = attempt
                ended = self._until_ended(waiting, done.records)
                done.reached = max(done.reached, self._progress.iteration)
                if ended == "over":
                    done.over = True
                    self._agents.end(grace_s=_TERM_GRACE_S)
                    self._follow(expected_end=True)
                    break
                if ended == "finished":
                    self._story.tell("drill", f"training finished at iteration {self._progress.iteration}")
                    break
        except DrillFailed as failure:
            done.failure = failure
        finally:
            self._agents.end(grace_s=0)
        return done

    def finish(self, plan: Plan, done: Rehearsed) -> None:
        """After a drill that was `over`: one more attempt, undisturbed, to the end that `plan` sets."""
        self._plan, self._watch = plan, None
        done.attempts += 1
        try:
            self._start(done.attempts, rosters(plan.scenario)[-1], ())
            self._until_ended([], [])
            self._story.tell("drill", f"training finished at iteration {self._progress.iteration}")
        except DrillFailed as failure:
            done.failure = failure
        finally:
            self._agents.end(grace_s=0)

    # One attempt

    def _start(self, attempt: int, roster: tuple[int, ...], waiting: tuple[Strike, ...]) -> None:
        nodes = [self._nodes.node(index) for index in roster]
        self._world_size = len(nodes) * self._plan.scenario.ranks_per_node
        names = ", ".join(node.node_id for node in nodes)
        self._story.tell(
            "attempt", f"{attempt}: training {'starts' if attempt == 1 else 'is started again'} on {names}"
        )
        self._logs = [node.home / f"log-{attempt}.txt" for node in nodes]
        self._losses = LossTail(self._logs)
        self._progress = JobProgress(last_event_t=self._clock.wall())
        self._log.emit("launch", nodes=[node.node_id for node in nodes])
        in_place = sum(not strike.ends_attempt and strike.restarts for strike in waiting)
        self._agents.start(
            [node.node_id for node in nodes],
            self._plan.scenario.ranks_per_node,
            self._plan.script,
            [self._environment(node, waiting) for node in nodes],
            self._logs,
            max_restarts=3 + in_place,
        )

    def _environment(self, node: VirtualNode, waiting: tuple[Strike, ...]) -> dict[str, str]:
        settings = drill_settings(self._plan, node)
        base = environment(os.environ, self._plan, node.node_id, node.memory, settings)
        return base | fault_variables(self._plan, node.index, waiting)

    def _until_ended(self, waiting: list[Strike], records: list[StrikeRecord]) -> Literal["finished", "struck", "over"]:
        """Follow one attempt until training finished, a strike ended the attempt, or the watch says it is over."""
        while True:
            self._follow()
            self._relieve()
            if self._watch is not None:
                self._watch.look(self._progress.ranks)
                if self._watch.over():
                    return "over"
            if waiting and all(self._progress.is_due(fault) for fault in waiting[0].faults):
                strike = waiting.pop(0)
                records.append(self._carry_out(strike))
                if strike.ends_attempt:
                    return "struck"
            exits = self._agents.exits()
            if any(exits.values()):
                failed = ", ".join(f"{node_id} with {code}" for node_id, code in exits.items() if code)
                self._agents.end(grace_s=_TERM_GRACE_S)
                self._follow()
                raise self._failed(f"An agent of torchrun gave up: {failed}.")
            if all(code == 0 for code in exits.values()):
                self._follow()
                if not self._progress.all_finished(self._world_size):
                    raise self._failed("All processes ended well, but training had not finished.")
                return "finished"
            self._check_bounds(waiting)
            self._clock.sleep(_POLL_S)

    def _check_bounds(self, waiting: list[Strike]) -> None:
        now = self._clock.wall()
        if now > self._deadline:
            raise self._failed(f"The drill took longer than --timeout-s {self._plan.timeout_s:.0f}.")
        if now - self._progress.last_event_t > self._plan.stalled_after_s:
            awaited = f" while waiting for {waiting[0].spec}" if waiting else ""
            raise self._failed(f"Nothing happened for {self._plan.stalled_after_s:.0f} s{awaited}.")

    def _follow(self, *, expected_end: bool = False) -> None:
        for event in self._tail.poll():
            self._progress.take(event)
            if expected_end and event["event"] == "exception":
                continue  # survivors that lost a peer: their logs have it, the story knows why
            if event["event"] == "warning" and _OVERRIDDEN in str(event.get("what")):
                continue  # the drill's own doing, at every start; the report lists it
            own_trouble = event["event"] in ("save_failed", "hang") and not event.get("elsewhere")
            if event["event"] in _TOLD and (event["rank"] == 0 or own_trouble):
                if event["event"] == "resume":
                    self._told_iteration = int(event["iteration"])
                    self._losses.forget()
                who = "recover" if event["event"] == "resume" else "job"
                rank = f"rank {event['rank']}: " if event["rank"] else ""
                self._story.tell(who, rank + shortened(phrase(event), 200))
        for iteration, loss in self._losses.poll():
            self._log.emit("metric", name="loss", iteration=iteration, value=loss)
            self._loss = f", loss {loss:.4g} at {iteration}"
        every = 100 if self._watch else 10
        reached = self._progress.iteration // every * every
        if reached > self._told_iteration:
            of_all = "" if self._watch else f" of {self._plan.scenario.train_iters}"
            self._story.tell("job", f"iteration {reached}{of_all}{self._loss}")
            self._told_iteration = reached

    def _failed(self, message: str) -> DrillFailed:
        tail: list[str] = []
        for log in self._logs:
            tail += [f"{log.parent.name}: {line}" for line in last_words(log, 12)]
        return DrillFailed(message, tail)

    # One strike

    def _carry_out(self, strike: Strike) -> StrikeRecord:
        reached, pids = self._progress.iteration, self._progress.pids
        for fault in strike.faults:
            what = KINDS[fault.kind].happens.format(fault.index)
            self._story.tell("fault", f"after iteration {fault.iteration}, {what}  [{fault.spec}]")
            restarts = KINDS[fault.kind].restarts
            self._log.emit("fault", iteration=fault.iteration, spec=fault.spec, what=what, restarts=restarts)
        fault_t = self._clock.wall()
        for fault in strike.faults:
            self._break(fault)
        if not strike.ends_attempt:
            self._note_fired(strike)
        if not strike.restarts:
            return StrikeRecord(strike, fault_t, fault_t, reached)
        if strike.ends_attempt:
            self._agents.end(
                grace_s=_TERM_GRACE_S if any(f.kind in ("lose", "stop", "reboot") for f in strike.faults) else 0
            )
            self._note_fired(strike)  # not before: who waits would be let go, and train on until its end comes
        elif not self._agents.wait_gone(pids, self._plan.stalled_after_s):
            raise self._failed(f"After {strike.spec} the old processes did not end.")
        gone_t = self._clock.wall()
        self._follow(expected_end=True)
        self._log.emit("gone", iteration=strike.iteration)
        for fault in strike.faults:
            self._spoil(fault)
        explained, decision = self._predict(strike)
        self._log.emit("predicted", explained=explained, decision=decision)
        self._progress.last_event_t = self._clock.wall()
        return StrikeRecord(strike, fault_t, gone_t, reached, explained, decision)

    def _note_fired(self, strike: Strike) -> None:
        """Each fault happens once, also to the ranks that torchrun restarts in place; who still waits is let go."""
        with self._plan.fired.open("a", encoding="ascii") as stream:
            for fault in strike.faults:
                for rank, progress in self._progress.ranks.items():
                    hit = progress.node_id == f"node{fault.index}" if fault.on_node else rank == fault.index
                    if hit or fault.kind == "join":
                        stream.write(at(rank, fault.iteration) + "\n")

    def _break(self, fault: Fault) -> None:
        """What happens to living processes."""
        if fault.kind == "kill":
            self._agents.kill_process(self._progress.ranks[fault.index].pid)
        elif fault.kind in ("lose", "stop", "reboot"):
            self._agents.kill_node(f"node{fault.index}")
        elif fault.kind == "full":
            self._nodes.fill(fault.index, self._plan.scenario.saves_live_on)
            self._full[fault.index] = fault.iteration

    def _spoil(self, fault: Fault) -> None:
        """What happens to what the node holds, once its processes are gone."""
        if fault.kind == "lose":
            self._nodes.wipe(fault.index, memory=True, disk=True)
        elif fault.kind == "reboot":
            self._nodes.wipe(fault.index, memory=True, disk=False)
        elif fault.kind in ("corrupt", "torn"):
            node = self._nodes.node(fault.index)
            copies = damage.committed_copies([node.memory, node.disk], self._plan.run_id)
            chosen = damage.choose(copies, fault.copy)
            if not chosen:
                raise self._failed(f"{fault.spec}: {node.node_id} holds no committed {fault.copy} copy to damage.")
            for copy in chosen:
                damage.flip_bytes(copy.shard) if fault.kind == "corrupt" else damage.cut_in_half(copy.shard)
                self._story.tell(
                    "fault",
                    f"{'bytes flipped in' if fault.kind == 'corrupt' else 'cut in half:'} the {copy.role} copy of "
                    f"rank {copy.owner}'s iteration {copy.iteration} on {node.node_id}",
                )

    def _relieve(self) -> None:
        """Where nodes are repaired: room again on what has been full for two intervals."""
        scenario = self._plan.scenario
        for index, at_iteration in list(self._full.items()):
            if scenario.repaired and self._progress.iteration >= at_iteration + 2 * scenario.save_every:
                del self._full[index]
                self._nodes.relieve(index, scenario.saves_live_on)
                self._story.tell("drill", f"the mount that holds node{index}'s saves has room again")

    def _predict(self, strike: Strike) -> tuple[bool, Decision | None]:
        if self._explain is None:
            return False, None
        place = self._plan.scenario.strikes.index(strike) + 1
        nodes = [self._nodes.node(index) for index in rosters(self._plan.scenario)[place]]
        local = tuple(directory for node in nodes for directory in (node.memory, node.disk))
        world_size = self._plan.scenario.world_sizes[place]
        sources = Sources(local, self._plan.save_dir, self._plan.global_dir, self._plan.run_id, world_size)
        try:
            decision = self._explain(sources)
        except ResilienceError as error:
            self._story.tell("explain", f"cannot tell what will be resumed: {error}")
            return False, None
        if decision is None:
            self._story.tell("explain", "nothing to resume from: a fresh start is to be expected")
        else:
            self._story.tell(
                "explain", f"iteration {decision.get('iteration')} ({decision.get('tier')}) will be resumed"
            )
        return True, decision
