"""A peer that stops without dying, in the middle of an exchange: the others notice, say who and where, and end."""

from __future__ import annotations

import os
import signal
from dataclasses import replace
from typing import Any

from resilience.replication.clique import CliqueExchange
from resilience.replication.gathering import ShardGatherer
from tests.core.training import Act, Training, World, die, reference
from tests.ranks import TIMEOUT_S, killed, values

BOUND = {"exchange_timeout_s": 2.0}
ENDS_S = 0.75 * TIMEOUT_S  # dozens of bounds: on a machine that is busy with other things


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def stop_in_the_exchange_of_6(training: Training) -> None:
    """Rank 1, when the first transfers are over and others under way. No collective of the training's own."""
    training.plan = replace(training.plan, nodes=(training.node,))
    run = CliqueExchange.run
    if training.rank == 0:
        return

    def stopping(self: CliqueExchange, offer: Any, inbox: Any) -> Any:
        if offer.save.iteration == 6:
            wait, waited = self._links.wait, iter(range(1000))

            def wait_or_stop(transfer: Any) -> None:
                wait(transfer)
                if next(waited) == 1:
                    stop()

            self._links.wait = wait_or_stop  # type: ignore[method-assign]
        return run(self, offer, inbox)

    CliqueExchange.run = stopping  # type: ignore[method-assign]


def test_a_peer_that_stops_in_the_middle_of_an_exchange_is_named_and_the_survivor_ends(world: World) -> None:
    plan = world.plan("a", "b", steps=30, settle=(3,), make=stop_in_the_exchange_of_6, resiliency=BOUND)
    survivor, stopped = world.run(plan, until=(0,))
    assert survivor.error == "PeerLostError", survivor
    assert "no sign of life from rank(s) [1]" in survivor.message
    assert survivor.seconds < ENDS_S
    (told,) = world.events("exception", rank=0)
    assert (told["peer"], told["peer_node"]) == (1, "b")
    assert told["error"].endswith("Rank 1 runs on node b.")
    assert stopped.error == "TimeoutError", "it stood still until it was killed"
    results = values(world.run(replace(plan, make=None, steps=12, settle=(), seed=1)))
    assert results[0].resumed.iteration in (3, 6)
    assert [ran.iteration for ran in results] == [12, 12]


def stop_before_sending(training: Training) -> None:
    """Rank 0, when it is asked for the first shard that rank 1 lacks."""
    read = ShardGatherer._read
    if training.rank == 0:

        def stopping(self: ShardGatherer, save: Any, fetch: Any) -> Any:
            stop()
            return read(self, save, fetch)

        ShardGatherer._read = stopping  # type: ignore[method-assign]


def test_a_peer_that_stops_in_the_middle_of_a_restore_is_named_and_the_survivor_ends(world: World) -> None:
    plan = world.plan("a", "b", settle=(6,), acts=(Act(8, die),), resiliency=BOUND)
    assert all(map(killed, world.run(plan)))
    world.lose("b")
    again = replace(plan, acts=(), settle=(), seed=1)
    stopped, survivor = world.run(replace(again, make=stop_before_sending), until=(1,))
    assert survivor.error == "PeerLostError", survivor
    assert "rank(s) [0]" in survivor.message
    assert survivor.seconds < ENDS_S
    assert stopped.error == "TimeoutError"
    results = values(world.run(again))
    assert results[0].resumed.iteration == 6
    assert tuple(ran.digest for ran in results) == reference(2)
