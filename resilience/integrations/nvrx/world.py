"""This rank among the others: the groups it talks over, its directory, the ranks that keep its shards."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

from resilience.errors import ResilienceError, in_short
from resilience.integrations.nvrx.background import Background, Write
from resilience.integrations.nvrx.cliques import members_of
from resilience.integrations.nvrx.directory import RankDirectory, Session
from resilience.integrations.nvrx.names import LocalCheckpointError
from resilience.job import make_communicator
from resilience.replication.communicator import Agreements, Communicator

__all__ = ["World", "agreed", "join"]

_LOG = logging.getLogger(__name__)
_CLOSE_S: Final = 5.0


@dataclass
class World:
    """One world of torch.distributed, `group`. `calls`: all ranks, of the training thread. `nodes`: of each rank."""

    group: Any
    communicator: Communicator
    calls: Agreements
    saves: Agreements
    nodes: tuple[str, ...]
    members: tuple[int, ...]
    session: Session
    directory: RankDirectory
    background: Background
    neighbours: tuple[int, ...]  # ranks that write into this rank's session directory, itself included
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))  # of saves and loads; equal on all ranks

    @property
    def rank(self) -> int:
        return self.communicator.rank

    @property
    def node_ranks(self) -> tuple[int, ...]:
        return tuple(rank for rank, node in enumerate(self.nodes) if node == self.nodes[self.rank])

    def close(self) -> None:
        self.background.close(_CLOSE_S)
        for group in (self.calls, self.saves):
            group.close()
        self.communicator.close()
        self.directory.close()


def join(group: Any, session: Session, strategy: Any, write: Write, timeout_s: float) -> World:
    """Collective over all ranks; LocalCheckpointError on all of them if one cannot take part."""
    communicator = make_communicator(timeout_s)
    rank = communicator.rank
    calls, saves = communicator.agreements("local/calls"), communicator.agreements("local/saves")
    directory = session.rank(rank)
    node, problem = "", ""
    members: tuple[int, ...] = (rank,)
    try:
        members = members_of(strategy, rank)
        node = session.node()
        session.mark()
        directory.make()
    except (ResilienceError, OSError, ValueError) as error:
        problem = in_short(error)
    nodes = tuple(each.decode() for each in agreed(calls, node.encode(), problem))
    neighbours = _sharing(calls, session)
    at_home = [other for other in members if other != rank and nodes[other] == nodes[rank]]
    if at_home:
        _LOG.warning("ranks %s and %s keep each other's shards on one node: a lost node takes both", rank, at_home)
    background = Background(communicator, saves, directory, members, write)
    return World(group, communicator, calls, saves, nodes, members, session, directory, background, neighbours)


def _sharing(calls: Agreements, session: Session) -> tuple[int, ...]:
    """The ranks with this very directory: of one node, or of several where it lies on shared storage."""
    mark, problem = "", ""
    try:
        mark = session.marked()
    except OSError as error:
        problem = in_short(error)
    marks = agreed(calls, mark.encode(), problem)
    return tuple(rank for rank, other in enumerate(marks) if other.decode() == mark)


def agreed(calls: Agreements, payload: bytes, problem: str) -> list[bytes]:
    """Everybody's payload; LocalCheckpointError on all ranks if one has a problem. Collective over `calls`."""
    told = [json.loads(each) for each in calls.gather(json.dumps([problem, payload.decode()]).encode())]
    problems = [f"rank {rank}: {each[0]}" for rank, each in enumerate(told) if each[0]]
    if problems:
        raise LocalCheckpointError("; ".join(problems[:4]))
    return [each[1].encode() for each in told]
