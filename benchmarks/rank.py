"""One rank process of a benchmark: joins its world, then measures what it is told to, one order after the other.

Started by `Crew`: its only argument is JSON, orders come as lines on standard input, answers go to a pipe of their own
(libraries print on standard output).
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Protocol, cast

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, but not in so many words
from torch.distributed.distributed_c10d import PrefixStore

from benchmarks.settings import Settings

__all__ = ["Bench", "Place", "boundary_and_step", "timed", "waited"]

#: Role → the module whose `make(place)` gives the bench. Imported only when asked for: some need packages that the
#: other roles' environment must not have.
_ROLES: Final = {
    "saves": "benchmarks.saves",
    "persistent": "benchmarks.persistent",
    "nvrx": "benchmarks.nvrx_rank",
    "peers": "benchmarks.peers_rank",
    "restores": "benchmarks.restores",
    "putting_back": "benchmarks.putting_back",
    "putting_back_nvrx": "benchmarks.putting_back_nvrx",
    "putting_back_peers": "benchmarks.putting_back_peers",
    "boundaries": "benchmarks.boundaries",
    "redundancy": "benchmarks.redundancy",
    "device": "benchmarks.device",
    "overlap": "benchmarks.overlap",
    "growth": "benchmarks.growth",
}


@dataclass(frozen=True)
class Place:
    """Where this process stands. `directory` is the crew's, on the shared-memory mount."""

    rank: int
    size: int
    directory: Path
    settings: Settings
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def node_directory(self) -> Path:
        """This virtual node's own."""
        return self.directory / f"node{self.rank}"


class Bench(Protocol):
    """What a role can measure. Each measure is done by all ranks at once and says seconds (or counts) by name."""

    def measures(self) -> dict[str, Callable[..., dict[str, Any]]]: ...
    def close(self) -> None: ...


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes on this rank, begun together with the others."""
    dist.barrier()
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def boundary_and_step(boundary: Callable[[], object], step: Callable[[], object], pause_s: float) -> float:
    """Seconds that a boundary takes, and the optimizer's step after a pause in which a copy may run."""
    boundary_s = timed(boundary)
    time.sleep(pause_s)
    return boundary_s + timed(step)


def waited(save: Callable[[], Any], complete: Callable[[Any], object]) -> dict[str, Any]:
    """`save` returns when the training thread may go on; what it returns is handed to `complete`, which waits."""
    dist.barrier()
    began = time.perf_counter()
    pending = save()
    stall_s = time.perf_counter() - began
    complete(pending)
    return {"stall": stall_s, "seconds": time.perf_counter() - began}


def main(argument: str) -> None:
    """Serve orders until standard input ends."""
    order = json.loads(argument)
    torch.set_num_threads(1)
    store = TCPStore("127.0.0.1", order["port"], is_master=False)
    world = PrefixStore("world", store)
    dist.init_process_group(
        "gloo", store=world, rank=order["rank"], world_size=order["size"], timeout=timedelta(seconds=120)
    )
    settings = Settings.from_json(order["settings"])
    place = Place(order["rank"], order["size"], Path(order["directory"]), settings, order["options"])
    bench = cast("Bench", importlib.import_module(_ROLES[order["role"]]).make(place))
    measures = bench.measures()
    try:
        for line in sys.stdin:
            asked = json.loads(line)
            answer = measures[asked["do"]](**asked["arguments"])
            os.write(order["replies"], json.dumps(answer).encode() + b"\n")
    finally:
        bench.close()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
