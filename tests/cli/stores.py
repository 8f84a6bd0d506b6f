"""Stores of jobs that never ran: real shards, records, certificates and logs of several nodes, from one process."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from resilience.cli import main
from resilience.planning.inventory import AttemptLog, Role, SaveId, Tier
from resilience.snapshot.layout import Piece, ShardIdentity, plan_layout
from resilience.stores.digest import digest_of
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.lock import DirectoryLock
from resilience.stores.node_store import NodeStore
from resilience.stores.records import ShardRecord

FS = PosixFileSystem()
RUN = "run"
VALUES = json.dumps({"train_state": {"step": 7}, "rng": {"torch": {"$tensor": "rng/torch"}}}).encode()


def attempt_id(generation: int) -> str:
    return f"{generation:x}".rjust(2, "0") * 16


def save_id(iteration: int, generation: int = 1) -> SaveId:
    return SaveId(iteration, generation, attempt_id(generation))


def shard_bytes(save: SaveId, owner: int, world_size: int, run_id: str = RUN, *, split: bool = True) -> bytes:
    """A shard with its rows of a weight that is split over all ranks, and a random state of its own."""
    group = range(world_size) if split else (owner,)
    rows = (owner, owner + 1) if split else (0, world_size)
    pieces = [
        Piece("model/0/w", torch.float32, (world_size, 3), (rows[0], 0), (rows[1] - rows[0], 3), split, 0, *rows),
        Piece("rng/torch", torch.uint8, (16,), (0,), (16,), False, 1),
    ]
    layout = plan_layout(pieces, {"model/0/tied": "model/0/w"}, len(VALUES), tuple(group))
    identity = ShardIdentity(
        run_id, save.attempt, save.generation, save.iteration, owner, world_size, len(VALUES)
    )  # fmt: skip
    content = bytearray(layout.nbytes)
    content[: layout.data_start] = layout.header(identity)
    for placed in layout.placed:
        content[placed.start : placed.start + placed.piece.nbytes] = bytes([owner + 1]) * placed.piece.nbytes
    content[layout.values_start :] = VALUES.ljust(layout.values_capacity, b" ")
    return bytes(content)


@dataclass
class World:
    """`ranks` ranks, one per node, each node with a base directory of its own below `root`."""

    root: Path
    ranks: int = 4
    run_id: str = RUN
    tier: Tier = "local"
    node_of: Callable[[int], str] = field(default=lambda rank: f"node{rank}")

    def base(self, node: str) -> Path:
        return self.root / node

    def store(self, node: str) -> NodeStore:
        store = NodeStore(self.base(node), self.run_id, node, self.tier, FS)
        store.prepare()
        (store.root / "lock").touch(0o600)
        return store

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.node_of(rank) for rank in range(self.ranks)))

    @property
    def local(self) -> list[str]:
        """The options that name all nodes."""
        return [word for node in self.nodes for word in ("--local", str(self.base(node)))]

    def local_but(self, *lost: str) -> list[str]:
        """The options that name all nodes but these."""
        return [word for node in self.nodes if node not in lost for word in ("--local", str(self.base(node)))]

    def commit(self, save: SaveId, owner: int, node: str, role: Role, *, split: bool = True) -> Path:
        content = shard_bytes(save, owner, self.ranks, self.run_id, split=split)
        digest = digest_of(content)
        record = ShardRecord(
            self.run_id, save, owner, self.ranks, role, self.tier, node, len(content), digest, 0.0, split
        )  # fmt: skip
        return self.store(node).commit_bytes(memoryview(content), record)

    def save(
        self,
        iteration: int,
        generation: int = 1,
        *,
        owners: Sequence[int] | None = None,
        replicas: bool = True,
        certified: bool = True,
        split: bool = True,
    ) -> SaveId:
        """A save with each shard on its own node and, with `replicas`, on the next one too."""
        save = save_id(iteration, generation)
        for owner in range(self.ranks) if owners is None else owners:
            self.commit(save, owner, self.node_of(owner), "primary", split=split)
            if replicas:
                self.commit(save, owner, self.node_of((owner + 1) % self.ranks), "replica", split=split)
        if certified:
            for node in self.nodes:
                self.store(node).write_certificate(save, self.ranks, protected=replicas)
        return save

    def log(self, generation: int, **fields: Any) -> None:
        for node in self.nodes:
            log = AttemptLog(self.run_id, attempt_id(generation), generation, **fields)
            self.store(node).write_attempt_log(log)

    def abandon(self) -> None:
        """Saves 10 and 20 of one attempt; a second one went back to 10 and completed 11."""
        base = self.save(10)
        self.save(20)
        newer = self.save(11, generation=2)
        self.log(1, completed=save_id(20))
        self.log(2, base=base, completed=newer)

    @contextlib.contextmanager
    def live(self, node: str) -> Iterator[None]:
        """As if a job were running on `node`."""
        lock = DirectoryLock(self.store(node).root, 0)
        lock.acquire()
        try:
            yield
        finally:
            lock.release()

    def shard(self, save: SaveId, owner: int, node: str) -> Path:
        return self.store(node).shard_path(save, owner, self.ranks)


def flip(path: Path, *, at: int = -1) -> None:
    """Change one byte of a file."""
    content = bytearray(path.read_bytes())
    content[at] ^= 0xFF
    path.write_bytes(content)


@dataclass(frozen=True)
class Answer:
    status: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


def ask(capsys: Any, *words: object) -> Answer:
    """Run one command in this process."""
    capsys.readouterr()
    status = main([str(word) for word in words])
    captured = capsys.readouterr()
    return Answer(status, captured.out, captured.err)


def ask_json(capsys: Any, *words: object, status: int = 0) -> dict[str, Any]:
    """The JSON document of a command that must end with `status`."""
    answer = ask(capsys, *words, "--json")
    assert answer.status == status, answer
    return answer.document
