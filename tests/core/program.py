"""A training program as users start it: its own interpreter, from its first import to its exit status.

python -m tests.core.program RANK NODES STORE MEMORY DISK ACT[@RANK][+unclosed]
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
import torch.distributed as dist

from resilience.errors import StoreError
from resilience.replication.clique import CliqueExchange
from resilience.replication.gathering import ShardGatherer
from tests.core.training import Act, Plan, Training, fail, stop


def slow_exchange(training: Training) -> None:
    """A transfer is under way whenever something happens."""
    run = CliqueExchange.run

    def slowly(self: CliqueExchange, offer: Any, inbox: Any) -> Any:
        links = self._links
        wait = links.wait

        def slow_wait(transfer: Any) -> None:
            time.sleep(0.2)
            wait(transfer)

        links.wait = slow_wait  # type: ignore[method-assign]
        try:
            return run(self, offer, inbox)
        finally:
            links.wait = wait  # type: ignore[method-assign]

    CliqueExchange.run = slowly  # type: ignore[method-assign]


def stall_here(training: Training) -> None:
    time.sleep(300)


def refuse_what_comes(training: Training) -> None:
    """What another node sends at a start is of no use to this one."""

    def take(*_: object) -> None:
        raise StoreError("this node takes nothing")

    ShardGatherer._take = take  # type: ignore[method-assign, assignment]


class Unclosed(Training):
    """A script that forgets `with`, and `close`; with a note it leaves the loop."""

    def run(self) -> None:  # type: ignore[override]
        trainer = self.start()
        for batch in trainer.iterations(self.plan.steps):
            self.between(trainer.iteration)
            if self.notes:
                break
            self.step(batch)


def leave_the_loop(training: Training) -> None:
    training.notes.append("left")


ACTS = {"none": None, "stop": stop, "fail": fail, "hang": stall_here, "refuse": None, "leave": leave_the_loop}


def main() -> None:
    rank, nodes, store, memory, disk, what = sys.argv[1:]
    torch.set_num_threads(1)
    names = tuple(nodes.split(","))
    if len(names) > 1:
        dist.init_process_group("gloo", store=dist.FileStore(store, len(names)), rank=int(rank), world_size=len(names))
    what, _, unclosed = what.partition("+")
    act, _, whom = what.partition("@")
    acts = () if ACTS[act] is None else (Act(5, ACTS[act], int(whom) if whom else None),)
    make = slow_exchange if len(names) > 1 else None
    make = refuse_what_comes if what == "refuse" else make
    limits = {"hang_timeout_s": 1.0} if what == "hang" else {}
    plan = Plan(memory, disk, names, every=2, acts=acts, make=make, paced=False, resiliency=limits)
    (Unclosed if unclosed else Training)(int(rank), plan).run()
    if len(names) > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
