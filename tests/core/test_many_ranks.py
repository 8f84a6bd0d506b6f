"""32 real processes on 8 virtual nodes: one node is lost, a spare takes its place, training ends as undisturbed.

The first attempt agrees in one flat group, as jobs of up to 64 ranks do; the second in a tree of groups, by node and
then among the nodes' leaders, as larger ones do.
"""

from __future__ import annotations

import functools
import os
import shutil
from dataclasses import replace
from typing import Any

import pytest

import resilience.replication.gloo
from resilience.replication.gloo import TorchCommunicator
from tests.core.training import Act, Training, World, die
from tests.ranks import killed, values

NODES, PER_NODE = 8, 4
RANKS = NODES * PER_NODE
NAMES = tuple(f"n{rank // PER_NODE}" for rank in range(RANKS))
WITH_A_SPARE = tuple("spare" if name == "n5" else name for name in NAMES)
TIMEOUT_S = 500.0


def sockets(training: Training) -> None:
    """How many this process has open, and how much memory is its own."""
    opened = [_link(each) for each in os.listdir("/proc/self/fd")]
    anonymous = next(line for line in open("/proc/self/status") if line.startswith("RssAnon"))  # noqa: SIM115
    training.notes.append((sum(each.startswith("socket:") for each in opened), int(anonymous.split()[1])))


def _link(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except OSError:
        return ""  # that of the listing itself


def in_a_tree(training: Training) -> None:
    """Groups of 8 at most, so that 32 ranks need two levels. In this rank's process only."""
    narrow: Any = functools.partial(TorchCommunicator, widest=NODES)
    resilience.replication.gloo.TorchCommunicator = narrow  # type: ignore[misc]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_thirty_two_processes_lose_a_node_and_end_as_if_nothing_had_happened(
    world: World, record_property: Any
) -> None:
    undisturbed = replace(world.plan(*["alone"] * RANKS, kind=None), resiliency={"events": None})
    expected = [ran.digest for ran in values(world.run(undisturbed, timeout_s=TIMEOUT_S))]

    plan = world.plan(*NAMES, resiliency={"exchange_timeout_s": 120.0}, settle=(6,), acts=(Act(8, die),))
    outcomes = world.run(plan, timeout_s=TIMEOUT_S)
    assert all(killed(outcome) for outcome in outcomes), [outcome.error for outcome in outcomes]
    held = world.copies("n1")[6]
    assert sorted(held.values()) == ["primary"] * PER_NODE + ["replica"] * PER_NODE
    world.lose("n5")

    again = replace(plan, nodes=WITH_A_SPARE, settle=(), seed=1, make=in_a_tree, acts=(Act(11, sockets),))
    results = values(world.run(again, timeout_s=TIMEOUT_S))
    assert {(ran.resumed.iteration, ran.resumed.generation, ran.resumed.tier) for ran in results} == {(6, 1, "local")}
    assert [ran.digest for ran in results] == expected
    assert results[0].resumed.replica_copies >= PER_NODE
    assert world.copies("spare")[12] == {
        rank: "primary" if WITH_A_SPARE[rank] == "spare" else "replica" for rank in range(4 * PER_NODE, 6 * PER_NODE)
    }
    opened = [ran.notes[0][0] for ran in results]
    for line in told(world, opened, [ran.notes[0][1] for ran in results]):
        print(line)
    followers = [count for rank, count in enumerate(opened) if rank % PER_NODE]
    assert max(followers) < opened[0], "who leads nothing is connected to fewer"
    shutil.rmtree(world.disk / "events")


def told(world: World, opened: list[int], memory_kib: list[int]) -> list[str]:
    """The run's log in short, for whoever wants to read it (`pytest -s`)."""
    shown = ("fresh", "complete", "resume", "finished")
    lines = []
    for name in shown:
        for event in world.events(name, rank=0):
            kept = ("iteration", "generation", "tier", "seconds", "own_copies", "replica_copies", "retrieved_bytes")
            facts = ", ".join(f"{key} {event[key]}" for key in kept if event.get(key) not in (None, ""))
            lines.append((event["t"], f"{event['attempt'] or '-':14} {name:9} {facts}"))
    first = min(t for t, _ in lines)
    found = [f"{t - first:7.1f} s  {line}" for t, line in sorted(lines)]
    return [
        *found,
        f"sockets of a rank: {min(opened)} to {max(opened)}; memory of its own: "
        f"{min(memory_kib) / 1024:.0f} to {max(memory_kib) / 1024:.0f} MiB",
    ]
