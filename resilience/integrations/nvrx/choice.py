"""Which local checkpoint is loaded, and who reads which copy for whom: a pure function of what all ranks see.

A checkpoint is complete when of each rank's shard there is a copy that nobody has found bad. The newest complete one is
taken; each rank's own shard is read on its own node where that has it, else sent by a rank of a node that does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

__all__ = ["Choice", "Copy", "Found", "View", "choose"]


@dataclass(frozen=True, order=True)
class Found:
    """One committed copy of a shard in a node's directory. `save`: which attempt at this iteration it belongs to."""

    iteration: int
    save: str
    owner: int
    folder: str  # the name of the rank's directory it lies in
    world_size: int
    nbytes: int
    digest: str


@dataclass(frozen=True)
class View:
    """What one rank tells: of its node's directory, all of it, where it is the first rank of the node; else nothing."""

    node: str
    found: tuple[Found, ...] = ()


@dataclass(frozen=True, order=True)
class Copy:
    """A copy and the node that has it."""

    node: str
    found: Found


@dataclass(frozen=True)
class Read:
    """`reader` takes the copy of `rank`'s shard from its node; the same rank, or one that sends it."""

    rank: int
    reader: int
    copy: Copy


@dataclass(frozen=True)
class Choice:
    """`reads`: one for each rank, in order; empty (and `iteration` -1) where nothing can be loaded.

    `passed_over`: of each newer iteration, why it is not taken. `copies`: all that there are of the chosen one.
    """

    iteration: int
    save: str = ""
    reads: tuple[Read, ...] = ()
    passed_over: tuple[str, ...] = ()
    copies: tuple[Copy, ...] = ()

    def holders(self, owner: int) -> frozenset[str]:
        """The nodes that have a copy of this rank's shard."""
        return frozenset(copy.node for copy in self.copies if copy.found.owner == owner)


def choose(views: Sequence[View], struck: Collection[Copy] = ()) -> Choice:
    """`views`: of each rank, in order; its length is the world's size. `struck`: copies that were found bad."""
    bad = frozenset(struck)
    nodes = [view.node for view in views]
    saves: dict[tuple[int, str], list[Copy]] = {}
    for view in views:
        for found in view.found:
            saves.setdefault((found.iteration, found.save), []).append(Copy(view.node, found))
    passed_over: list[str] = []
    # of two attempts at one iteration, the one of which more is there: their digests, not clocks, tell them apart
    for iteration, save in sorted(saves, key=lambda each: (each[0], len(saves[each]), each[1]), reverse=True):
        copies = sorted(set(saves[iteration, save]) - bad)
        problem = _problem(saves[iteration, save], copies, len(views))
        if problem:
            passed_over.append(f"iteration {iteration}: {problem}")
        else:
            return Choice(iteration, save, _reads(copies, nodes), tuple(passed_over), tuple(copies))
    return Choice(-1, passed_over=tuple(passed_over))


def _problem(all_copies: Sequence[Copy], copies: Sequence[Copy], world_size: int) -> str:
    saved_by = all_copies[0].found.world_size
    if saved_by != world_size:
        return f"it was saved by {saved_by} ranks, and this job has {world_size}"
    missing = sorted(set(range(world_size)) - {copy.found.owner for copy in copies})
    if not missing:
        return ""
    damaged = {copy.found.owner for copy in all_copies}
    return "; ".join(
        f"rank {rank}'s shard {'is damaged in every copy' if rank in damaged else 'is on none of the nodes'}"
        for rank in missing[:4]
    ) + (f"; and {len(missing) - 4} more" if len(missing) > 4 else "")


def _reads(copies: Sequence[Copy], nodes: Sequence[str]) -> tuple[Read, ...]:
    of_owner: dict[int, list[Copy]] = {}
    for copy in copies:
        of_owner.setdefault(copy.found.owner, []).append(copy)
    ranks_of: dict[str, list[int]] = {}
    for rank, node in enumerate(nodes):
        ranks_of.setdefault(node, []).append(rank)
    sending: Counter[int] = Counter()
    reads = []
    for rank, node in enumerate(nodes):
        at_home = [copy for copy in of_owner[rank] if copy.node == node]
        if at_home:
            own = [copy for copy in at_home if copy.found.folder == str(rank)]
            reads.append(Read(rank, rank, (own or at_home)[0]))
            continue
        reader, copy = min(
            ((reader, copy) for copy in of_owner[rank] for reader in ranks_of[copy.node]),
            key=lambda each: (sending[each[0]], each),
        )
        sending[reader] += 1
        reads.append(Read(rank, reader, copy))
    return tuple(reads)
