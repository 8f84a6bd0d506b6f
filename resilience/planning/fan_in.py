"""Who talks to whom when many ranks agree: groups of neighbours, then of their leaders, and so on to a last one.

A group in which everybody is connected to everybody costs each member a connection per other member, which many
thousand ranks cannot pay. Members within one group of the first level are neighbours (of one node, where nodes are
known); the first of each group stands for it in the next level, until one group is left.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final

__all__ = ["WIDEST", "connections", "fan_in"]

WIDEST: Final = 64  #: members of one group: so many are reached directly, and no tree is needed for fewer

Group = tuple[int, ...]


def fan_in(members: Sequence[int], nodes: Sequence[str] | None = None, widest: int = WIDEST) -> list[list[Group]]:
    """The groups of each level, lowest first; the last level is one group. Groups of one are left out.

    `nodes`: of each member; those of one node form the first level's groups (in parts of `widest`). With no more
    members than `widest` there is one group of all. The first member leads every group that it is in.
    """
    assert widest >= 2, f"a group of {widest} cannot become fewer"
    if len(members) <= widest:
        return [[tuple(members)]]
    levels: list[list[Group]] = []
    standing = list(members)
    together = _by_node(standing, nodes) if nodes is not None else [standing]
    while True:
        groups = [group for each in together for group in _parts(each, widest)]
        levels.append([group for group in groups if len(group) > 1])
        standing = [group[0] for group in groups]
        if len(standing) == 1:
            return [level for level in levels if level]
        together = [standing]


def connections(levels: Iterable[Iterable[Group]], member: int) -> int:
    """How many others a member is connected to."""
    return sum(len(group) - 1 for level in levels for group in level if member in group)


def _by_node(members: Sequence[int], nodes: Sequence[str]) -> list[list[int]]:
    by_node: dict[str, list[int]] = {}
    for member, node in zip(members, nodes, strict=True):
        by_node.setdefault(node, []).append(member)
    return list(by_node.values())


def _parts(members: Sequence[int], widest: int) -> list[Group]:
    """Neighbours in groups of nearly equal size."""
    count = -(-len(members) // widest)
    cuts = [len(members) * each // count for each in range(count + 1)]
    return [tuple(members[start:stop]) for start, stop in pairwise(cuts)]
