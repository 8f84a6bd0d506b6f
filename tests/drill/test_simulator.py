"""The simulator itself: what it replays, what it finds, what it makes small; and histories that keep all promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from resilience.drill.simulator.cluster import Cluster, execute
from resilience.drill.simulator.fuzz import explain_failure, fuzz
from resilience.drill.simulator.history import FAULTS, SECRET_NAME, Fault, History, StartPlan, draw_history
from resilience.drill.simulator.storage import Inode
from resilience.stores.node_store import NodeStore

HISTORIES, PARTS = 500, 4
LONG_HISTORIES, LONG_PARTS = 5000, 10


def run_part(first: int, count: int) -> None:
    tally = fuzz(first, count)
    print("\n".join(tally.lines()))
    assert tally.histories == count, "stopped early"
    assert not tally.broken, "\n".join(tally.lines())


@pytest.mark.parametrize("part", range(PARTS))
def test_all_promises_are_kept(part: int) -> None:
    count = HISTORIES // PARTS
    run_part(part * count, count)


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(LONG_PARTS))
def test_all_promises_are_kept_in_many_more(part: int) -> None:
    count = LONG_HISTORIES // LONG_PARTS
    run_part(100_000 + part * count, count)


def test_a_seed_is_executed_again_to_the_last_point() -> None:
    for seed in (3, 17, 40):
        first, again = execute(draw_history(seed)), execute(draw_history(seed))
        assert (first.trace, first.points, first.story) == (again.trace, again.points, again.story)


@pytest.mark.parametrize("keyed", [True, False])
def test_a_history_with_a_key_seals_what_it_writes_and_is_replayed_alike(keyed: bool) -> None:
    given = {"resiliency": (("secret_env", SECRET_NAME),) if keyed else ()}
    history = History(1, steps=8, starts=(StartPlan(),), **given)
    cluster = Cluster(history)
    cluster.run()
    found = [
        json.loads(bytes(entry.content))
        for node in cluster.nodes.values()
        for _, below in node.mounts["disk"].root.walk(Path())
        for name, entry in below.names.items()
        if isinstance(entry, Inode) and name.startswith("rank_") and name.endswith(".json")
    ]
    assert found
    assert {"mac" in record for record in found} == {keyed}
    assert execute(history).trace == cluster.scheduler.trace


def test_another_process_comes_to_the_same_trace_whatever_its_hashes_are() -> None:
    command = [sys.executable, "-m", "resilience.drill.simulator", "--replay", "--seed", "17"]
    told = [
        subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": salt}, capture_output=True, text=True, check=True)
        for salt in ("1", "2")
    ]
    assert told[0].stdout == told[1].stdout
    assert "trace " in told[0].stdout


def test_other_seeds_are_other_executions() -> None:
    assert len({execute(draw_history(seed)).trace for seed in range(50, 54)}) == 4


def test_every_kind_of_fault_is_drawn_and_only_those_that_are_asked_for() -> None:
    drawn = {fault.kind for seed in range(400) for fault in draw_history(seed).faults}
    assert drawn == set(FAULTS)
    assert {fault.kind for seed in range(20) for fault in draw_history(seed, ("flip",)).faults} == {"flip"}


def test_a_job_that_loses_a_node_goes_on_from_the_replicas() -> None:
    history = History(7, nodes=3, steps=9, faults=(Fault("lose", 0, "train", 1, 250, 60.0),))
    outcome = execute(history)
    assert outcome.violation is None
    assert outcome.struck == {"lose": 1}
    assert outcome.ends[-1] == "finished"
    assert any("resumes from iteration" in line for line in outcome.story)


def test_a_promise_that_is_broken_is_found_and_the_history_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a node's directories were never made durable: a power failure then takes saves that were complete."""
    prepare = NodeStore.prepare

    def forgetful(store: NodeStore) -> None:
        prepare(store)
        store._durable = False

    monkeypatch.setattr(NodeStore, "prepare", forgetful)
    history = History(
        5, nodes=3, steps=8, interval=1, persist_every=None, starts=(StartPlan(), StartPlan(order=1), StartPlan()),
        faults=(
            Fault("clock", 0, "train", 2, 40), Fault("blackout", 0, "train", 0, 200),
            Fault("delay", 1, "train", 1, 30, 0.5),
        ),
    )  # fmt: skip
    small, outcome = explain_failure(history)
    assert outcome.violation is not None
    assert outcome.violation.promise.startswith("2 ")
    assert [fault.kind for fault in small.faults] == ["blackout"]
    assert small.nodes == 2
    assert small.steps < history.steps
    assert execute(small).trace == outcome.trace


def test_ranks_that_wait_for_each_other_for_ever_are_a_violation() -> None:
    from resilience.drill.simulator.schedule import Process, Scheduler, Violation
    from resilience.drill.simulator.threads import SimCondition

    scheduler = Scheduler(0, 0.5)
    one, other = SimCondition(scheduler), SimCondition(scheduler)

    def take(first: SimCondition, second: SimCondition) -> None:
        with first:
            scheduler.sleep(1.0)
            with second:
                pass

    def world() -> None:
        process = Process("p")
        scheduler.spawn("a", process, lambda: take(one, other))
        scheduler.spawn("b", process, lambda: take(other, one))
        scheduler.sleep(5.0)
        scheduler.block()

    with pytest.raises(Violation, match="everybody waits for ever"):
        scheduler.run(world)


def test_what_was_not_fsynced_is_at_the_mercy_of_a_power_failure() -> None:
    import random

    from resilience.drill.simulator.storage import Directory, Inode, Mount

    lost = set()
    for seed in range(40):
        mount = Mount("disk")
        folder, kept, loose = Directory(), Inode(bytearray(b"kept")), Inode(bytearray(b"loose"))
        mount.root.put("folder", folder)
        mount.root.sync()
        kept.sync()
        folder.put("kept", kept)
        folder.sync()
        loose.sync()
        folder.put("loose", loose)
        mount.fail_power(random.Random(seed))
        found = mount.find(("folder", "kept"))
        assert isinstance(found, Inode)
        assert found.content == b"kept"
        lost.add(mount.find(("folder", "loose")) is None)
    assert lost == {True, False}


def test_a_killed_process_takes_nothing_with_it_and_a_node_without_power_its_memory() -> None:
    for kind, tier in (("kill", "in_memory"), ("crash", "local")):
        history = replace(History(11, steps=8), kind=tier, faults=(Fault(kind, 0, "train", 0, 250),))
        outcome = execute(history)
        assert outcome.violation is None
        assert sum("resumes from iteration" in line for line in outcome.story) == 1
