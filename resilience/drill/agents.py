"""The processes of a drill: one torchrun agent per virtual node, and the certainty that none outlives the drill.

Workers of torchrun live in sessions of their own and are re-parented when their agent is killed, so neither process
groups nor parents find them all. Everything a drill starts carries a mark in its environment instead; whoever carries
it is found in /proc.
"""

from __future__ import annotations

import ctypes
import os
import random
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from resilience.errors import CommandError

MARK = "RESILIENCE_DRILL_MARK"
_POLL_S = 0.02
_PORTS = range(20_000, 32_000)  # Linux gives out 32768 to 60999 to whoever asks for any
_WORKER_FAILED = re.compile(r"elastic/multiprocessing/api\.py:\d+\] failed \(exitcode")


class Agents:
    """Starts and ends the agents of one attempt after another. All waits are bounded."""

    def __init__(self) -> None:
        if not Path("/proc/self/environ").exists():
            raise CommandError("A drill needs Linux: it finds its processes in /proc.")
        self._mark = secrets.token_hex(8)
        self._agents: dict[str, subprocess.Popen[bytes]] = {}

    def start(
        self,
        node_ids: Sequence[str],
        ranks_per_node: int,
        script: Sequence[str],
        environments: Sequence[Mapping[str, str]],
        logs: Sequence[Path],
        max_restarts: int,
    ) -> None:
        """Start one agent per node with a rendezvous of their own; ranks follow the order given (parallel lists)."""
        self._agents = {}
        port = free_port()
        for place, (node_id, environment, log) in enumerate(zip(node_ids, environments, logs, strict=True)):
            command = agent_command(place, len(node_ids), ranks_per_node, port, max_restarts, script)
            with log.open("ab") as stream:
                self._agents[node_id] = subprocess.Popen(
                    command,
                    env={**environment, MARK: f"{self._mark}:{node_id}"},
                    stdin=subprocess.DEVNULL,
                    stdout=stream,
                    stderr=stream,
                    start_new_session=True,
                    preexec_fn=_die_with_parent,  # noqa: PLW1509 -- a drill has one thread
                )

    def exits(self) -> dict[str, int | None]:
        """Exit status per node; None while the agent runs."""
        return {node_id: agent.poll() for node_id, agent in self._agents.items()}

    def processes(self, node_id: str | None = None) -> list[int]:
        """Living processes of this drill, or of one of its nodes."""
        wanted = f"{MARK}={self._mark}:{node_id or ''}".encode()
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and _carries(int(entry), wanted, whole=node_id is not None):
                found.append(int(entry))
        return found

    def kill_process(self, pid: int) -> bool:
        """SIGKILL one process, if it is one of ours."""
        return pid in self.processes() and _send(pid, signal.SIGKILL)

    def kill_node(self, node_id: str) -> None:
        """SIGKILL everything on the node at once, as when its power fails. Returns when all of it is gone."""
        self._end(node_id, signal.SIGKILL, 20.0)

    def end(self, grace_s: float) -> None:
        """End all: TERM, as a scheduler does, then KILL after `grace_s` (0: KILL at once)."""
        if grace_s > 0:
            for agent in self._agents.values():
                _send(agent.pid, signal.SIGTERM) if agent.poll() is None else None
            until = time.monotonic() + grace_s
            while self.processes() and time.monotonic() < until:
                self.exits()  # reaps
                time.sleep(_POLL_S)
        self._end(None, signal.SIGKILL, 20.0)

    def wait_gone(self, pids: Sequence[int], timeout_s: float) -> bool:
        """Wait until none of these processes lives; False when one still does after `timeout_s`."""
        until = time.monotonic() + timeout_s
        while set(pids) & set(self.processes()):
            if time.monotonic() > until:
                return False
            self.exits()
            time.sleep(_POLL_S)
        return True

    def _end(self, node_id: str | None, signum: signal.Signals, timeout_s: float) -> None:
        until = time.monotonic() + timeout_s
        while pids := self.processes(node_id):
            for pid in pids:
                _send(pid, signum)
            self.exits()
            if time.monotonic() > until:
                raise CommandError(f"Processes {pids} of the drill cannot be killed.")
            time.sleep(_POLL_S)


def agent_command(
    place: int, nodes: int, ranks_per_node: int, port: int, max_restarts: int, script: Sequence[str]
) -> list[str]:
    """torchrun for the node at `place`. Ranks are given out by the order of addresses, then of process ids."""
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nnodes={nodes}",
        f"--nproc-per-node={ranks_per_node}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        f"--rdzv-conf=is_host={1 if place == 0 else 0},join_timeout=120",
        f"--rdzv-id=drill-{port}",
        # All of 127.0.0.0/8 is this machine; an address per place makes the order of ranks that of the nodes.
        f"--local-addr=127.0.0.{100 + place}",
        f"--max-restarts={max_restarts}",
        "--monitor-interval=0.1",
        "-m",
        "resilience.drill.worker",
        *script,
    ]


def last_words(log: Path, lines: int) -> list[str]:
    """The end of what the workers said before the last one failed; torchrun's own traceback after it says nothing."""
    said = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    failed = [place for place, line in enumerate(said) if _WORKER_FAILED.search(line)]
    return said[: failed[-1] + 1][-lines:] if failed else said[-lines:]


def free_port() -> int:
    """A port for torchrun's store, which binds it seconds later: below those that the kernel gives out meanwhile."""
    for port in random.SystemRandom().sample(_PORTS, 100):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise OSError(f"none of 100 ports of {_PORTS.start} to {_PORTS.stop - 1} is free on this host")


def _carries(pid: int, wanted: bytes, *, whole: bool) -> bool:
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False  # ended meanwhile, or another user's
    return any(entry == wanted if whole else entry.startswith(wanted) for entry in environment)


def _send(pid: int, signum: signal.Signals) -> bool:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return False
    return True


def _die_with_parent() -> None:
    """In the child: TERM when the drill itself is killed, so that even then no agent stays behind."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
