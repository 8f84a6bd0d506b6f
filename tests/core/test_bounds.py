"""How long replication waits, and how fast it sends: slow peers are waited for, stuck ones given up, caps are kept."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from resilience.observe.events import read_events
from resilience.planning.inventory import SaveId
from resilience.replication.clique import CliqueExchange, Offer
from resilience.replication.gloo import TorchCommunicator
from resilience.replication.pace import Pace
from resilience.snapshot.arena import Arena
from resilience.stores.digest import digest_of
from tests.core.fakes import FS, CountingInbox
from tests.core.training import Act, Training, World, reference
from tests.ranks import run_ranks, values

MIB = 1 << 20
CAP = 4 * MIB
SHARD = 24 * MIB


def swap_under_a_cap(rank: int, directory: str) -> tuple[float, bool]:
    """Two ranks swap shards under the cap: how long it took, and whether what arrived is what the other one sent."""
    communicator = TorchCommunicator(2.0)  # a segment alone takes eight seconds at this rate
    links = communicator.links("clique", (0, 1))
    here = Path(directory) / str(rank)
    here.mkdir()
    arena = Arena(FS.create_mapping(here / "own", SHARD))
    arena.mapped.view[:] = bytes([rank + 1]) * SHARD
    offer = Offer(SaveId(7, 1, "a" * 32), arena, lambda: digest_of(arena.mapped.view))
    pace = Pace(CAP, time.monotonic, time.sleep)
    exchange = CliqueExchange(links, rank, (1 - rank,), (1 - rank,), pace)
    dist.barrier()
    began = time.monotonic()
    (received,), reasons = exchange.run(offer, CountingInbox(here / "in"))
    took = time.monotonic() - began
    exchange.close()
    communicator.close()
    return took, not reasons and bytes(received.slot.mapped.view) == bytes([2 - rank]) * SHARD


def test_a_cap_far_below_a_segment_a_bound_is_kept_and_breaks_nothing(memory_mount: Path) -> None:
    for took, whole in values(run_ranks(2, swap_under_a_cap, str(memory_mount))):
        assert whole
        assert SHARD / took <= CAP


def test_training_under_a_cap_that_cannot_keep_up_says_so_and_ends_in_the_same_bits(world: World) -> None:
    plan = world.plan("a", "b", steps=24, paced=False, resiliency={"replication_bytes_per_s": 100_000})
    results = values(world.run(plan))
    assert tuple(ran.digest for ran in results) == reference(2, 24)
    assert not world.events("replication_down")
    told = [event["what"] for event in world.events("warning", rank=0) if "cannot keep up" in event["what"]]
    assert len(told) == 1
    newest = max(world.copies("a"))
    assert world.copies("a")[newest] == {0: "primary", 1: "replica"}
    assert world.copies("b")[newest] == {1: "primary", 0: "replica"}


def test_a_peer_whose_exchange_is_slow_is_waited_for_far_beyond_the_bound(world: World) -> None:
    plan = world.plan("a", "b", settle=(6,), make=late_on_rank_1, resiliency={"exchange_timeout_s": 2.0})
    values(world.run(plan))
    assert not world.events("replication_down")
    assert {6, 9, 12} <= {event["iteration"] for event in world.events("protected", rank=0)}


def late_on_rank_1(training: Training) -> None:
    if training.rank == 1:
        before_the_exchange_of_6(lambda: time.sleep(6))  # three bounds


@pytest.mark.long  # a peer that lives is given up after ten bounds
def test_a_peer_that_lives_and_is_stuck_is_given_up_by_name_and_replication_goes_on_later(world: World) -> None:
    plan = world.plan(
        "a", "b", steps=24, settle=(6, 7, 8, 9, 12), make=stuck_on_rank_1, resiliency={"exchange_timeout_s": 2.0}
    )
    results = values(world.run(plan, timeout_s=120.0))
    assert tuple(ran.digest for ran in results) == reference(2, 24)
    down = world.events("replication_down", rank=0)[0]
    assert (down["peer"], down["peer_node"], down["iteration"]) == (1, "b", 6)
    assert (down["received_bytes"], down["expected_bytes"]) == (0, 0), "it had not said a word"
    assert down["offered_bytes"] > 0
    assert "rank 1 on node b was given up" in down["error"]
    assert "nothing moved" in down["error"]
    assert results[0].status["failed_saves"] == 0, "a save without replicas is no failed save"
    assert world.copies("a")[24] == {0: "primary", 1: "replica"}


def stuck_on_rank_1(training: Training) -> None:
    if training.rank == 1:
        events = Path(training.plan.disk, "events")

        def until_given_up() -> None:
            deadline = time.monotonic() + 90
            while time.monotonic() < deadline:
                if any(each["event"] == "replication_down" for each in read_events([events])):
                    return
                time.sleep(0.1)

        before_the_exchange_of_6(until_given_up)


def before_the_exchange_of_6(act: Any) -> None:
    run = CliqueExchange.run

    def late(self: CliqueExchange, offer: Any, inbox: Any) -> Any:
        if offer.save.iteration == 6:
            act()
        return run(self, offer, inbox)

    CliqueExchange.run = late  # type: ignore[method-assign]


def test_a_link_that_breaks_says_which_peer_on_which_node(world: World) -> None:
    plan = world.plan("a", "b", steps=24, settle=(4, 6, 7, 8, 9), acts=(Act(4, give_up_the_links, 1),))
    values(world.run(plan))
    down = world.events("replication_down", rank=0)
    assert (down[0]["peer"], down[0]["peer_node"]) == (1, "b")
    assert world.copies("a")[24] == {0: "primary", 1: "replica"}


def give_up_the_links(training: Training) -> None:
    training.trainer._controller._saving.replicas._protection._exchange.close(failed=True)
