"""Which ranks form a clique whose shards are covered by parity, and how many lost failure domains that survives.

Where jump × size divides the world the cliques are the documented ones, as with replicas. Elsewhere, and where those
would put more members into one failure domain than the parity makes up for, ranks are dealt out domain after domain:
the fewer cliques, the less memory; the more, the fewer members of one domain in each.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from resilience.errors import ConfigError
from resilience.planning.erasure import LARGEST_CLIQUE
from resilience.planning.topology import Topology, block_size, columns, unreplicated

__all__ = ["make_parity_topology"]

Clique = tuple[int, ...]


def make_parity_topology(
    world_size: int,
    nodes: Sequence[str],
    *,
    scheme: str,
    parities: int,
    jump: int | None,
    size: int,
    domains: Mapping[str, str] | None,
    restart: bool,
) -> Topology:
    """Cliques of `size` (or more, where that does not divide) for the scheme's `parities`; equal on all ranks.

    Raises ConfigError at a first start if a clique would not survive the loss of as many failure domains as it has
    parities; at a restart `survives` is lowered instead, and a note says so.
    """
    assert len(nodes) == world_size, f"{len(nodes)} nodes named for {world_size} ranks"
    domain = [domains.get(node, node) if domains else node for node in nodes]
    count = len(set(domain))
    stride = jump or block_size(nodes) or max(1, world_size // len(set(nodes)))
    if len(set(nodes)) == 1:
        note = f"one node ({nodes[0]}): no parity is kept; saves survive dead processes, not the loss of the node"
        return unreplicated(world_size, stride, (note,), protected=False)
    if not restart and count < size:
        raise ConfigError(
            f'redundancy="{scheme}" with replication_factor={size} needs {size} failure domains, and this job has '
            f"{count} (world size {world_size}).",
            advice=f"Use replication_factor={count}, or at least {size} failure domains."
            if count > parities
            else f'Use redundancy="replica", or at least {size} failure domains.',
        )
    cliques, note = _place(domain, stride, size, parities)
    survives = min(tolerance(clique, domain, parities) for clique in cliques)
    if survives < parities and not restart:
        raise ConfigError(
            f'redundancy="{scheme}" with cliques of {size}: members of one clique would lie in one failure domain '
            f"(world size {world_size}, {count} domains, jump {stride}).",
            advice="Leave replication_jump out, use a smaller replication_factor, or spread the ranks evenly.",
        )
    notes: tuple[str, ...] = (note,) if note else ()
    if survives < parities:
        notes += (
            f"not fully protected: parity survives the loss of {survives} of {parities} failure domains, because only "
            f"{count} are left",
        )
    if survives == 0:
        return unreplicated(world_size, stride, notes, protected=False)
    none: tuple[Clique, ...] = ((),) * world_size
    return Topology(
        world_size, stride, 1, tuple(sorted(cliques)), none, notes, survives == parities,
        parities=parities, survives=survives,
    )  # fmt: skip


def tolerance(clique: Clique, domain: Sequence[str], parities: int) -> int:
    """How many failure domains, whichever they are, a clique may lose."""
    lost = survived = 0
    for _, members in Counter(domain[rank] for rank in clique).most_common():
        lost += members
        if lost > parities or lost == len(clique):
            break
        survived += 1
    return survived


def _place(domain: Sequence[str], stride: int, size: int, parities: int) -> tuple[list[Clique], str]:
    """The cliques, and what to say about them."""
    world = len(domain)
    rings = columns(world, stride, size)
    if all(size <= len(ring) <= LARGEST_CLIQUE and tolerance(ring, domain, parities) == parities for ring in rings):
        return rings, ""
    largest = max(Counter(domain).values())
    most = world // (parities + 1)  # cliques that there can be at all
    fewest = max(1, world // size)
    for together in range(1, parities + 1):  # members of one domain in a clique
        count = max(fewest, -(-largest // together))
        if count <= most:
            break
    else:
        count = min(fewest, most)
    if count < 1:
        return [(rank,) for rank in range(world)], f"{world} ranks are too few for parity"
    by_domain = sorted(range(world), key=lambda rank: (domain[rank], rank))
    cliques = [tuple(sorted(by_domain[start::count])) for start in range(count)]
    return cliques, f"jump {stride} does not keep cliques of {size} apart; they are made by failure domain instead"
