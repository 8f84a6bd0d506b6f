"""Which losses of nodes a save survives: the cliques of a topology, seen from the nodes that hold the bytes."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from resilience.planning.schemes import Replicas, Scheme
from resilience.planning.topology import Topology

__all__ = ["Exposure", "exposure_of"]


@dataclass(frozen=True)
class Exposure:
    """`groups[node]`: (nodes, tolerated) of everything that this node has a part in.

    A save is lost where more nodes of one group are lost than tolerated. Most ranks of a node share their group, so
    that there are about as many groups as nodes.
    """

    groups: tuple[tuple[tuple[frozenset[int], int], ...], ...]

    def survives(self, lost: Collection[int]) -> bool:
        """Whether every shard can still be had from the nodes that are left; cost: that of the lost nodes' groups."""
        gone = frozenset(lost)
        return all(len(nodes & gone) <= tolerated for node in gone for nodes, tolerated in self.groups[node])


def exposure_of(topology: Topology, node_of: Sequence[int], scheme: Scheme) -> Exposure:
    """`node_of` each rank. With replicas a shard is lost with all its holders' nodes.

    With parity it is lost when a clique loses more nodes than the scheme survives.
    """
    found: set[tuple[frozenset[int], int]] = set()
    if isinstance(scheme, Replicas):
        for rank, holders in enumerate(topology.holders):
            nodes = frozenset(node_of[each] for each in (rank, *holders))
            found.add((nodes, len(nodes) - 1))
    else:
        for clique in topology.cliques:
            nodes = frozenset(node_of[rank] for rank in clique)
            found.add((nodes, min(scheme.losses(len(nodes)), len(nodes) - 1)))
    groups: list[list[tuple[frozenset[int], int]]] = [[] for _ in range(max(node_of) + 1)]
    for group in sorted(found, key=lambda group: (sorted(group[0]), group[1])):
        for node in group[0]:
            groups[node].append(group)
    return Exposure(tuple(map(tuple, groups)))
