"""Rank processes that are told what to measure next, and wait asleep in between.

Several crews may stand side by side (the others' packages need an environment of their own); the caller takes turns
between them, so that whatever slows the machine down for a while slows all of them.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, but not in so many words

from benchmarks.settings import Settings

__all__ = ["Crew", "CrewError"]

REPOSITORY = Path(__file__).resolve().parent.parent


class CrewError(RuntimeError):
    """A rank process failed or fell silent; its own words are in its log."""


@dataclass
class _Member:
    process: subprocess.Popen[bytes]
    commands: IO[bytes]
    replies: int
    log: Path
    pending: bytes = b""


class Crew:
    """`size` processes of `benchmarks.rank`, one torch.distributed world. Use it as a context manager."""

    def __init__(
        self,
        role: str,
        settings: Settings,
        directory: Path,
        *,
        size: int = 2,
        python: str = sys.executable,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        """`role` names the benchmark of `benchmarks.rank` that they run; `directory` is theirs (logs, node folders)."""
        self.role = role
        self._timeout_s = settings.timeout_s
        directory.mkdir(parents=True, exist_ok=True)
        # The store lives here and not in rank 0: the ranks may then come and go as they like.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._members: list[_Member] = []
        for rank in range(size):
            order = {
                "role": role, "rank": rank, "size": size, "port": self._store.port, "directory": str(directory),
                "settings": settings.to_json(), "options": dict(options or {}),
            }  # fmt: skip
            self._members.append(_start(python, order, directory / f"{role}-{rank}.log"))

    def ask(self, what: str, **arguments: Any) -> list[dict[str, Any]]:
        """Have every rank do `what` at once; what each of them says, by rank."""
        order = json.dumps({"do": what, "arguments": arguments}).encode() + b"\n"
        for member in self._members:
            try:
                member.commands.write(order)
                member.commands.flush()
            except BrokenPipeError:
                raise self._failed(member, "is gone") from None
        deadline = time.monotonic() + self._timeout_s
        return [self._reply(member, deadline) for member in self._members]

    def close(self) -> None:
        """End the processes: asked at first, then killed."""
        for member in self._members:
            member.commands.close()
        for member in self._members:
            try:
                member.process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                member.process.kill()
                member.process.wait()
            os.close(member.replies)
        self._members = []

    def _reply(self, member: _Member, deadline: float) -> dict[str, Any]:
        while b"\n" not in member.pending:
            ready, _, _ = select.select([member.replies], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                raise self._failed(member, f"said nothing for {self._timeout_s:g} s")
            part = os.read(member.replies, 1 << 16)
            if not part:
                raise self._failed(member, "ended")
            member.pending += part
        line, _, member.pending = member.pending.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _failed(self, member: _Member, what: str) -> CrewError:
        last = member.log.read_text(errors="replace")[-3000:]
        return CrewError(f"a process of the crew {self.role!r} {what}; its log ends:\n{last}")

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is not None:
            for member in self._members:
                member.process.kill()
        self.close()


def _start(python: str, order: dict[str, Any], log: Path) -> _Member:
    reader, writer = os.pipe()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RESILIENCE_")}
    environment |= {
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(REPOSITORY),
        "RESILIENCE_NODE_ID": f"node{order['rank']}",
        "RANK": str(order["rank"]),
        "WORLD_SIZE": str(order["size"]),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [python, "-m", "benchmarks.rank", json.dumps(order | {"replies": writer})],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=[writer],
            env=environment,
            cwd=REPOSITORY,
        )
    os.close(writer)
    if process.stdin is None:
        raise CrewError("a process without a standard input")
    return _Member(process, process.stdin, reader, log)
