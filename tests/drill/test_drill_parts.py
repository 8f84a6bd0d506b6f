"""The parts of a drill that need no training: hooks, damage, directories, processes, and the sums."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from resilience.config import ResiliencyConfig
from resilience.drill import workdir
from resilience.drill.agents import MARK, Agents
from resilience.drill.damage import choose, committed_copies, cut_in_half, flip_bytes
from resilience.drill.environment import Plan, drill_settings, environment, fault_variables, reference_settings
from resilience.drill.nodes import VirtualNodes
from resilience.drill.orchestrate import Orchestrator
from resilience.drill.output import LossTail
from resilience.drill.progress import JobProgress
from resilience.drill.rehearsal import Rehearsal
from resilience.drill.result import (
    StrikeRecord,
    digest_of,
    goodput_of,
    loss_difference,
    problems_of,
    recoveries,
    stall_per_save,
    unplanned_restarts,
)
from resilience.drill.scenario import Scenario, parse_fault
from resilience.drill.story import Story
from resilience.errors import CommandError, ConfigError
from resilience.observe.events import EventLog
from resilience.runtime.clock import SystemClock


def plan_with(*specs: str, root: Path = Path("/work"), **shape: Any) -> Plan:
    return Plan(Scenario(faults=tuple(parse_fault(spec) for spec in specs), **shape), root, ("train.py",))


def test_a_node_fault_holds_whichever_rank_runs_there_and_a_fault_of_the_past_holds_nobody(tmp_path: Path) -> None:
    plan = plan_with("lose:node=2@35", "kill:rank=1@20", "hang:rank=0@50", root=tmp_path)
    variables = fault_variables(plan, 2, plan.scenario.strikes) | {"RESILIENCE_DRILL": "1"}
    part = Rehearsal.from_environment(variables, 3)
    assert part is not None
    assert part.due(35) == "hold"
    assert part.due(34) is None
    part = Rehearsal.from_environment(variables, 0)
    assert part is not None
    assert part.due(50) == "hang"
    plan.fired.write_text("0@50\n")
    assert part.due(50) is None
    elsewhere = Rehearsal.from_environment(
        fault_variables(plan, 1, plan.scenario.strikes) | {"RESILIENCE_DRILL": "1"}, 1
    )
    assert elsewhere is not None
    assert (elsewhere.due(35), elsewhere.due(20)) == (None, "hold")


class Clock:
    """Counts the waiting; at `fires_at` the drill notes the fault."""

    def __init__(self, fired: Path, note: str, fires_at: float) -> None:
        self.t, self._fired, self._note, self._fires_at = 0.0, fired, note, fires_at

    def now(self) -> float:
        return self.t

    def wall(self) -> float:
        return self.t

    def sleep(self, seconds: float) -> None:
        self.t += seconds
        if self.t >= self._fires_at:
            self._fired.write_text(self._note)
        if self.t > 1000:
            raise TimeoutError("it hangs")


def test_who_waits_first_settles_its_saves_and_is_let_go_when_the_fault_has_happened(tmp_path: Path) -> None:
    plan = plan_with("full:node=1@20", "hang:rank=0@50", root=tmp_path)
    variables = fault_variables(plan, 1, plan.scenario.strikes) | {"RESILIENCE_DRILL": "1"}
    part = Rehearsal.from_environment(variables, 1)
    assert part is not None
    did: list[str] = []

    def act(who: Rehearsal, iteration: int, clock: Clock) -> None:
        who.act(
            iteration,
            settle=lambda timeout_s: did.append("settled"),
            tell=lambda name, **_: did.append(name),
            clock=clock,
        )

    clock = Clock(plan.fired, "0@50\n1@20\n", fires_at=7.0)
    act(part, 19, clock)
    act(part, 20, clock)
    assert did == ["settled", "hold"]
    assert clock.t == pytest.approx(7.0, abs=0.1)
    act(part, 20, clock)
    assert did == ["settled", "hold"]
    plan.fired.unlink()
    never = Clock(plan.fired, "", fires_at=1e9)
    act(part, 20, never)
    assert never.t == pytest.approx(60, abs=0.1)
    hanging = Rehearsal.from_environment(variables, 0)
    assert hanging is not None
    with pytest.raises(TimeoutError, match="it hangs"):
        act(hanging, 50, never)


def test_outside_of_a_drill_there_is_no_part_to_play() -> None:
    assert Rehearsal.from_environment({"RESILIENCE_DRILL_HOLD": "0@1"}, 0) is None


def test_processes_get_settings_that_the_configuration_reads_back(tmp_path: Path) -> None:
    from resilience.config import load_config

    plan = plan_with("hang:rank=0@50", root=tmp_path)
    node = VirtualNodes(tmp_path, shared_memory=tmp_path).node(1)
    user = {"RESILIENCE_CHECKPOINT__SAVE": "/mine", "HOME": "/root"}
    variables = environment(user, plan, node.node_id, node.memory, drill_settings(plan, node))
    checkpoint, resiliency = load_config(env=variables)
    assert checkpoint.save == str(tmp_path / "save")
    assert (checkpoint.non_persistent_ckpt_type, checkpoint.non_persistent_save_interval) == ("local", 5)
    assert checkpoint.replication
    assert (resiliency.run_id, resiliency.node_id, resiliency.hang_timeout_s) == ("drill", "node1", 10.0)
    assert variables["HOME"] == "/root"
    checkpoint, _ = load_config(env=environment(user, plan, "x", None, reference_settings(plan, tmp_path)))
    assert (checkpoint.save, checkpoint.non_persistent_ckpt_type, checkpoint.replication) == (None, None, False)


def test_a_drill_does_not_write_into_the_cluster_s_metrics(tmp_path: Path) -> None:
    from resilience.config import load_config

    plan = replace(plan_with("kill:rank=0@5", root=tmp_path), resiliency=ResiliencyConfig(metrics="/textfiles/r.prom"))
    node = VirtualNodes(tmp_path, shared_memory=tmp_path).node(1)
    for settings in (drill_settings(plan, node), reference_settings(plan, tmp_path)):
        _, resiliency = load_config(env=environment({}, plan, node.node_id, node.memory, settings))
        assert resiliency.metrics is None


def test_the_loss_is_read_from_what_a_script_prints_each_iteration_once(tmp_path: Path) -> None:
    log = tmp_path / "log-1.txt"
    tail = LossTail([log, tmp_path / "not-there-yet.txt"])
    assert tail.poll() == []
    log.write_text("iteration       10  loss 3.675\n[rank1] step=15, loss: 2.5e-1, lr 0.1\niter 20 loss na")
    assert tail.poll() == [(10, 3.675), (15, 0.25)]
    with log.open("a") as stream:
        stream.write("n\niteration 10 loss 9.9\nloss of node2\nepoch 1 done\n")
    assert tail.poll() == []
    tail.forget()
    with log.open("a") as stream:
        stream.write("iteration 10 loss 3.675\n")
    assert tail.poll() == [(10, 3.675)]


def write_copy(disk: Path, iteration: int, owner: int, role: str, generation: int = 1) -> Path:
    folder = disk / "drill" / "node1" / f"iter_{iteration:07d}" / f"g{generation:04d}-00000000"
    folder.mkdir(parents=True, exist_ok=True)
    shard = folder / f"rank_{owner:05d}-of-00004.safetensors"
    shard.write_bytes(bytes(range(256)) * 16)
    record = {"iteration": iteration, "generation": generation, "owner": owner, "role": role}
    shard.with_suffix(".json").write_text(json.dumps(record))
    return shard


def test_damage_hits_committed_copies_of_the_newest_save_only(tmp_path: Path) -> None:
    write_copy(tmp_path, 30, 1, "primary")
    newest = {role: write_copy(tmp_path, 35, owner, role) for owner, role in ((0, "replica"), (1, "primary"))}
    uncommitted = write_copy(tmp_path, 40, 1, "primary")
    uncommitted.with_suffix(".json").unlink()
    copies = committed_copies([tmp_path], "drill")
    assert [copy.shard for copy in choose(copies, "primary")] == [newest["primary"]]
    assert [copy.shard for copy in choose(copies, "replica")] == [newest["replica"]]
    assert {copy.shard for copy in choose(copies, "all")} == set(newest.values())
    assert choose([], "all") == []


def test_flipped_bytes_keep_size_and_time_and_a_torn_file_is_half(tmp_path: Path) -> None:
    shard = write_copy(tmp_path, 35, 1, "primary")
    whole, before = shard.read_bytes(), shard.stat()
    flip_bytes(shard)
    assert len(shard.read_bytes()) == len(whole)
    assert sum(a != b for a, b in zip(shard.read_bytes(), whole, strict=True)) == 16
    assert shard.stat().st_mtime_ns == before.st_mtime_ns
    cut_in_half(shard)
    assert shard.stat().st_size == len(whole) // 2


def test_node_memory_lies_on_a_memory_mount_and_ends_up_in_the_work_directory(
    tmp_path: Path, memory_mount: Path
) -> None:
    nodes = VirtualNodes(tmp_path, shared_memory=memory_mount)
    node = nodes.node(2)
    assert memory_mount in node.memory.parents
    assert node.disk == tmp_path / "nodes" / "node2" / "disk"
    for directory in (node.memory, node.disk):
        assert directory.stat().st_mode & 0o777 == 0o700
        (directory / "kept").write_text("here")
    nodes.close()
    nodes.close()
    assert (tmp_path / "nodes" / "node2" / "memory" / "kept").read_text() == "here"
    assert not (tmp_path / "nodes" / "node2" / "memory").is_symlink()
    assert list(memory_mount.iterdir()) == []


def test_a_lost_node_has_nothing_and_a_rebooted_one_has_its_disk(tmp_path: Path) -> None:
    nodes = VirtualNodes(tmp_path, shared_memory=tmp_path / "none")
    for index in (0, 1):
        (nodes.node(index).memory / "run").mkdir()
        (nodes.node(index).disk / "run").mkdir()
    nodes.wipe(0, memory=True, disk=True)
    nodes.wipe(1, memory=True, disk=False)
    assert list(nodes.node(0).disk.iterdir()) == []
    assert [path.name for path in nodes.node(1).disk.iterdir()] == ["run"]
    assert list(nodes.node(1).memory.iterdir()) == []


def test_a_directory_with_other_files_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigError, match="holds other files"):
        workdir.prepare(tmp_path)
    mine = tmp_path / "drill-out"
    workdir.prepare(mine)
    (mine / "nodes" / "left").touch()
    (mine / "reference").mkdir()
    workdir.prepare(mine)
    assert sorted(path.name for path in mine.iterdir()) == ["drill.json", "events", "nodes", "reference", "save"]
    assert list((mine / "nodes").iterdir()) == []


def test_processes_that_escaped_their_agent_are_found_and_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    agents = Agents()
    monkeypatch.setenv(MARK, f"{agents._mark}:node1")
    subprocess.run(["setsid", "--fork", "sleep", "60"], check=True)  # re-parented, and in a session of its own
    monkeypatch.delenv(MARK)
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        until = time.monotonic() + 60
        while len(agents.processes("node1")) != 1 and time.monotonic() < until:
            time.sleep(0.01)
        assert agents.processes("node11") == []
        assert not agents.kill_process(bystander.pid)
        agents.kill_node("node1")
        assert agents.processes() == []
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_who_waits_for_a_fault_is_not_let_go_before_its_processes_are_gone(tmp_path: Path) -> None:
    """A rank that is let go trains on, and may complete a save that the fault was to come before."""
    plan = plan_with("corrupt:node=0@4", root=tmp_path, nodes=2)
    plan.events_dir.mkdir()
    known: list[bool] = []
    agents: Any = SimpleNamespace(end=lambda grace_s: known.append(plan.fired.exists()))
    nodes: Any = None
    clock = SystemClock()
    orchestrator = Orchestrator(
        plan, nodes, agents, Story(io.StringIO()), None, 0.0, clock, EventLog(None, "drill", 0, clock)
    )
    orchestrator._spoil = lambda fault: None  # type: ignore[method-assign]
    orchestrator._progress.take({**event(1, "start"), "node": "node0"})
    orchestrator._carry_out(plan.scenario.strikes[0])
    assert known == [False]
    assert plan.fired.read_text() == "0@4\n"


def event(t: float, name: str, rank: int = 0, attempt: str = "g1", pid: int = 1, **fields: Any) -> dict[str, Any]:
    return {"t": t, "event": name, "rank": rank, "node": f"node{rank}", "pid": pid, "attempt": attempt, **fields}


def test_a_rank_that_its_watchdog_ended_hung_once_and_not_at_every_later_hang() -> None:
    progress, first, second = JobProgress(), parse_fault("hang:rank=0@20"), parse_fault("hang:rank=0@50")
    event: dict[str, Any] = {"rank": 0, "pid": 7, "node": "node0", "t": 1.0}
    for more in ({"event": "start"}, {"event": "step", "iteration": 20}, {"event": "hang"}):
        progress.take(event | more)
    assert progress.is_due(first)
    assert not progress.is_due(second)


def test_a_fault_is_due_when_all_ranks_of_its_node_wait_for_it() -> None:
    progress, fault = JobProgress(), parse_fault("lose:node=1@20")
    assert not progress.is_due(fault)
    for rank in (2, 3):
        progress.take({**event(1, "start", rank, pid=rank), "node": "node1"})
        progress.take({**event(2, "step", rank, pid=rank, iteration=20), "node": "node1"})
    progress.take({**event(3, "hold", 2, pid=2, iteration=20), "node": "node1"})
    assert not progress.is_due(fault)
    progress.take({**event(3, "hold", 3, pid=3, iteration=20), "node": "node1"})
    assert progress.is_due(fault)
    progress.take({**event(4, "start", 3, pid=9), "node": "node1"})
    progress.take({**event(5, "hold", 3, pid=3, iteration=20), "node": "node1"})  # a dead process's last words
    assert not progress.is_due(fault)


def two_attempts() -> list[dict[str, Any]]:
    """Two ranks, ten iterations of a second each, killed at 7, resumed at 5."""
    events = [event(0, "fresh", reason="none")]
    events += [event(i, "step", rank, iteration=i, step_s=1.0) for i in range(1, 8) for rank in (0, 1)]
    events += [event(5, "snapshot", rank, iteration=5, stall_s=0.5) for rank in (0, 1)]
    events += [
        event(12, "resume", rank, "g2", iteration=5, generation=1, tier="local", seconds=0.5 + rank,
              retrieved_bytes=100, own_copies=1, replica_copies=1, rebuilt=0)
        for rank in (0, 1)
    ]  # fmt: skip
    events += [event(8 + i, "step", rank, "g2", iteration=i, step_s=1.0) for i in range(6, 11) for rank in (0, 1)]
    events += [event(20, "digest", rank, "g2", iteration=10, digest=f"d{rank}") for rank in (0, 1)]
    return events + [event(20, "finished", rank, "g2", iteration=10) for rank in (0, 1)]


def test_a_recovery_is_summed_up_over_its_ranks() -> None:
    scenario = Scenario(nodes=2, train_iters=10, faults=(parse_fault("kill:rank=1@7"),))
    decision = {"iteration": 5, "generation": 1, "tier": "local"}
    record = StrikeRecord(scenario.strikes[0], 7.5, 8.25, 7, True, decision)
    (fault,) = recoveries([record], two_attempts())
    assert fault.resumed_from == decision
    assert (fault.lost_iterations, fault.detect_s, fault.restore_s, fault.downtime_s) == (2, 0.75, 1.5, 6.5)
    assert (fault.retrieved_bytes, fault.own_copies, fault.replica_copies) == (100, 1, 1)
    assert fault.predicted is True
    assert unplanned_restarts([record], two_attempts()) == 0
    assert unplanned_restarts([], two_attempts()) == 1
    wrong = StrikeRecord(record.strike, 7.5, 8.25, 7, True, {**decision, "generation": 9})
    (fault,) = recoveries([wrong], two_attempts())
    assert fault.predicted is False


def test_a_fault_that_ends_nothing_is_not_what_a_later_resume_came_back_from() -> None:
    scenario = Scenario(nodes=2, train_iters=10, faults=(parse_fault("full:node=1@7"),))
    (fault,) = recoveries([StrikeRecord(scenario.strikes[0], 7.5, 7.5, 7, False, None)], two_attempts())
    assert (fault.resumed_from, fault.predicted, fault.own_copies, fault.lost_iterations) == (None, None, 0, 0)


def test_work_that_was_lost_or_waited_for_is_no_goodput() -> None:
    # 10 iterations of 1 s, one of them waited 0.5 s for a save that the first attempt took, in 20 s.
    assert goodput_of(two_attempts()) == pytest.approx((10 - 0.5) / 20)
    assert stall_per_save(two_attempts()) == 0.5
    assert goodput_of([]) == 0.0


def test_a_digest_needs_every_rank_at_the_last_iteration() -> None:
    events = two_attempts()
    assert digest_of(events, 10, 2) == digest_of(list(reversed(events)), 10, 2)
    assert digest_of(events, 10, 3) is None
    assert digest_of(events, 11, 2) is None


def test_a_drill_passes_only_if_all_that_was_to_happen_happened_and_the_ends_are_equal() -> None:
    scenario = Scenario(nodes=2, train_iters=10, faults=(parse_fault("kill:rank=1@7"),))
    record = StrikeRecord(scenario.strikes[0], 7.5, 8.25, 7)
    events = two_attempts()
    assert problems_of(scenario, [record], [], events, "a", "a") == []
    (never,) = problems_of(scenario, [], [], events, "a", "a")
    assert "never happened" in never
    (differs,) = problems_of(scenario, [record], [], events, "a", "b")
    assert "differs from the undisturbed run" in differs
    unfinished, no_digest = problems_of(scenario, [record], [], events[:-1], None, "b")
    assert "ranks [1]" in unfinished
    assert "the drill" in no_digest


def test_where_the_world_size_changed_losses_are_compared_and_not_bits() -> None:
    scenario = Scenario(nodes=3, spares=0, elastic=True, train_iters=10, faults=(parse_fault("lose:node=2@7"),))
    record = StrikeRecord(scenario.strikes[0], 7.5, 8.25, 7)
    events = two_attempts()  # two ranks finish, as many as are left
    assert problems_of(scenario, [record], [], events, "a", "b", 0.01) == []
    assert problems_of(scenario, [record], [], events, "a", "b", None) == [], "a script that tells no loss"
    (apart,) = problems_of(scenario, [record], [], events, "a", "b", 0.8)
    assert "differs by up to 80.0%" in apart
    (no_digest,) = problems_of(scenario, [record], [], events, None, "b", 0.01)
    assert "No digest" in no_digest, "every rank that is left has to have come to its end"


def test_the_loss_that_counts_is_the_one_that_was_told_last() -> None:
    told = [
        {"event": "metric", "name": "loss", "iteration": at, "value": value}
        for at, value in [(5, 4.0), (10, 9.0), (10, 3.0), (15, 2.0)]
    ]
    assert loss_difference(told, [(5, 4.0), (10, 2.0), (20, 1.0)]) == pytest.approx(0.5)
    assert loss_difference(told, [(40, 2.0)]) is None


def test_all_ranks_wait_for_a_node_that_is_to_join(tmp_path: Path) -> None:
    scenario = Scenario(nodes=2, spares=0, elastic=True, train_iters=20, faults=(parse_fault("join:node=5@7"),))
    plan = Plan(scenario, tmp_path, ("script",))
    for node in (0, 1):
        variables = fault_variables(plan, node, scenario.strikes) | {"RESILIENCE_DRILL": "1"}
        parts = [Rehearsal.from_environment(variables, rank) for rank in (0, 1)]
        assert [part.due(7) for part in parts if part] == ["hold", "hold"]
    progress = JobProgress()
    for rank in (0, 1):
        of_rank = {"t": 1.0, "rank": rank, "pid": 10 + rank, "node": f"node{rank}"}
        progress.take({"event": "start", **of_rank})
        assert not progress.is_due(scenario.faults[0])
        progress.take({"event": "hold", "iteration": 7, **of_rank})
    assert progress.is_due(scenario.faults[0])


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount")
@pytest.mark.parametrize("what", ["memory", "disk"])
def test_a_full_mount_has_no_room_for_a_byte_and_is_gone_afterwards(
    what: Literal["memory", "disk"], tmp_path: Path, memory_mount: Path
) -> None:
    nodes = VirtualNodes(tmp_path, shared_memory=memory_mount)
    try:
        nodes.give_own_mount(1, what, range(3))
    except CommandError as refused:
        pytest.skip(str(refused))
    try:
        directory = nodes.node(1).memory if what == "memory" else nodes.node(1).disk
        (directory / "before").write_bytes(b"x" * 10_000)
        nodes.fill(1, what)
        with pytest.raises(OSError, match="No space left"):
            (directory / "after").write_bytes(b"x" * 5000)
        (nodes.node(2).disk / "elsewhere").write_bytes(b"x" * 5000)
    finally:
        nodes.close()
    assert (tmp_path / "nodes" / "node1" / what / "before").stat().st_size == 10_000
    assert not (tmp_path / "nodes" / "node1" / what / "ballast").exists()
    assert not (tmp_path / "nodes" / "node1" / "disk.img").exists()
    mounts = Path("/proc/self/mounts").read_text()
    assert str(tmp_path) not in mounts
    assert str(memory_mount) not in mounts
