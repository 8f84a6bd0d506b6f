"""Real ranks for tests: processes forked from a server that has torch and this package loaded, in one gloo world.

    outcomes = run_ranks(2, train, plan, env=lambda rank: {"RESILIENCE_NODE_ID": f"node{rank}"})
    first, second = values(outcomes)

The ranks meet at a file, so that any of them may be killed (and because a TCP store asks the machine's resolver for the
name of every peer that connects: seconds, where that does not answer). Everything is bounded, nothing is left running.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import pickle
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

__all__ = ["PRELOAD", "TIMEOUT_S", "Outcome", "killed", "run_ranks", "values"]

#: `torch._dynamo` is what making an optimizer imports: 1.2 s of a process, if each pays for itself. Nearly all modules
#: that have a rank's work import pytest, many hypothesis, DCP or sharded optimizers: 0.1 to 0.4 s of each rank.
PRELOAD = [
    "torch",
    "torch.distributed.fsdp",
    "torch.distributed.checkpoint",
    "torch.distributed.optim",
    "torch._dynamo",
    "resilience.trainer",
    "resilience.replication.gloo",
    "pytest",
    "hypothesis",
]
#: Nothing is expected to come near it, on a machine that is busy with other things: only what hangs runs into it.
TIMEOUT_S = 120.0
_WORLD_TIMEOUT_S = 60  # of the training's own collectives

Environment = Mapping[str, str] | Callable[[int], Mapping[str, str]]


@dataclass(frozen=True)
class Outcome:
    """How one rank ended: with a value, with an exception (its class name, its text), or killed (`status` below 0)."""

    value: Any = None
    error: str = ""
    message: str = ""
    trace: str = ""
    status: int | None = None  # of the process; negative: the signal that ended it
    seconds: float = 0.0


def run_ranks(
    size: int,
    work: Callable[..., Any],
    *args: Any,
    env: Environment | None = None,
    timeout_s: float = TIMEOUT_S,
    distributed: bool = True,
    until: Sequence[int] = (),
) -> list[Outcome]:
    """Run `work(rank, *args)` in `size` processes; `work` is importable, arguments and results are picklable.

    A rank that is still running after `timeout_s` is killed, and its outcome says so: `TimeoutError`. So is, once the
    ranks of `until` have ended, every other one. Not `distributed`: torch.distributed is left alone.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    meeting = tempfile.TemporaryDirectory(prefix="resilience-ranks-", dir=_memory())
    place = f"{meeting.name}/store" if distributed else ""
    running: list[tuple[Any, Connection]] = []
    for rank in range(size):
        here, there = context.Pipe(duplex=False)
        variables = dict(env(rank) if callable(env) else env or {})
        process = context.Process(target=_rank, args=(there, work, rank, size, place, variables, args))
        process.daemon = True
        process.start()
        there.close()
        running.append((process, here))
    began = time.monotonic()  # now that the server is up: the first ranks of a test process wait for its imports
    try:
        deadline = began + timeout_s
        outcomes = {rank: _outcome(*running[rank], deadline, began) for rank in until or range(size)}
        now = time.monotonic()
        return [outcomes.get(rank) or _outcome(*running[rank], now, began) for rank in range(size)]
    finally:
        for process, _ in running:
            if process.is_alive():
                process.kill()
            process.join()
        meeting.cleanup()


def values(outcomes: Sequence[Outcome]) -> list[Any]:
    """What the ranks returned; a rank that did not return fails the test with its own trace."""
    for rank, outcome in enumerate(outcomes):
        if outcome.error or outcome.status not in (0, None):
            told = outcome.trace or f"{outcome.error}: {outcome.message} (status {outcome.status})"
            raise AssertionError(f"rank {rank} did not come back:\n{told}")
    return [outcome.value for outcome in outcomes]


def killed(outcome: Outcome) -> bool:
    """Whether the rank was ended by SIGKILL (by itself: the ones that hang are told by `error`)."""
    return outcome.status == -signal.SIGKILL and not outcome.error


def _memory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def _outcome(process: Any, end: Connection, deadline: float, began: float) -> Outcome:
    """Wait for what the process says, or for its end without a word."""
    told: dict[str, Any] = {}
    try:
        if end.poll(max(0.0, deadline - time.monotonic())):
            told = pickle.loads(end.recv_bytes())  # noqa: S301 - our own child's
        else:
            told = {"error": "TimeoutError", "message": "the rank was still running"}
    except EOFError:
        pass  # it ended without a word
    seconds = time.monotonic() - began
    if told.get("error") == "TimeoutError":
        process.kill()
    process.join(max(5.0, deadline - time.monotonic()))
    return Outcome(**told, status=process.exitcode, seconds=seconds)


def _rank(
    end: Connection,
    work: Callable[..., Any],
    rank: int,
    size: int,
    place: str,
    variables: Mapping[str, str],
    args: tuple[Any, ...],
) -> None:
    """In the child: join the world, work, say how it went."""
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    os.environ.update({"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank), **variables})
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    told: dict[str, Any]
    try:
        if place:
            store = dist.FileStore(place, size)
            timeout = timedelta(seconds=_WORLD_TIMEOUT_S)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timeout)
            dist.barrier()  # nobody leaves while another is still connecting
        told = {"value": work(rank, *args)}
    except BaseException as error:  # noqa: BLE001 - whatever it is (SystemExit too), the test has to see it
        told = {"error": type(error).__name__, "message": str(error), "trace": traceback.format_exc()}
    end.send_bytes(pickle.dumps(told))
    end.close()
    os._exit(0)  # as a worker whose peers may be gone: nothing is torn down together
