"""Which ranks hold each other's replicas: cliques, and inside them who holds whose.

Where jump × factor divides the world, the cliques are exactly the documented ones: `n, n+J, …, n+(F-1)J`. Elsewhere
the last ranks of each column join the last clique (F to 2F-1 members), and every member's copies go to the next F-1
members around the ring. Where even that would put two copies of a shard into one failure domain (uneven nodes), ranks
are dealt out by failure domain instead. Everything here is close to linear in the number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from resilience.errors import ConfigError


@dataclass(frozen=True)
class Topology:
    """Cliques and holders of one world. `holders[r]`: ranks with replicas of r, in the order of sending.

    `factor` is the number of copies of each shard that really exist (the owner's included), `protected` whether that is
    what was asked for, `notes` what a user should be told once. `jump` is the distance that was asked for or derived;
    where ranks were dealt out by failure domain it describes nothing, the cliques do. With `parities` (1: xor, 2: rs)
    nobody holds replicas, and every member keeps parity of its clique. `survives`: any so many failure domains may be
    lost at once.
    """

    world_size: int
    jump: int
    factor: int
    cliques: tuple[tuple[int, ...], ...]
    holders: tuple[tuple[int, ...], ...]
    notes: tuple[str, ...]
    protected: bool
    parities: int = 0
    survives: int = 0

    @property
    def replicates(self) -> bool:
        """Whether anybody keeps anything for others."""
        return any(len(clique) > 1 for clique in self.cliques)

    def held(self) -> tuple[tuple[int, ...], ...]:
        """For each rank the owners whose replicas it keeps: the inverse of `holders`, owners ascending."""
        owners: list[list[int]] = [[] for _ in range(self.world_size)]
        for owner, ranks in enumerate(self.holders):
            for rank in ranks:
                owners[rank].append(owner)
        return tuple(tuple(each) for each in owners)

    def clique_of(self, rank: int) -> tuple[int, ...]:
        """The clique that a rank belongs to."""
        return next(clique for clique in self.cliques if rank in clique)


@dataclass(frozen=True)
class _Clique:
    """`ring`: any `factor` neighbours lie in different domains. `extras`: ranks for whose domain no ring was left."""

    ring: tuple[int, ...]
    extras: tuple[int, ...] = ()


def make_topology(
    world_size: int,
    nodes: Sequence[str],
    *,
    jump: int | None,
    factor: int,
    domains: Mapping[str, str] | None,
    restart: bool,
) -> Topology:
    """Place `factor` copies of each rank's shard in different failure domains; a pure function, equal on all ranks.

    `nodes` names the node of each rank; `domains` maps nodes to failure domains (a node that it leaves out is its own).
    Raises ConfigError at a first start if two copies would lie in one domain; at a restart the number of copies is
    lowered instead, and a note says so.
    """
    assert len(nodes) == world_size, f"{len(nodes)} nodes named for {world_size} ranks"
    _check_numbers(jump, factor)
    domain = [domains.get(node, node) if domains else node for node in nodes]
    per_node = block_size(nodes)
    stride = jump or per_node or max(1, world_size // len(set(nodes)))
    if factor == 1:
        return unreplicated(world_size, stride, (), protected=True)
    if len(set(nodes)) == 1:
        note = f"one node ({nodes[0]}): nothing is replicated; saves survive dead processes, not the loss of the node"
        return unreplicated(world_size, stride, (note,), protected=False)
    copies, notes = _affordable_copies(world_size, stride, factor, len(set(domain)), restart)
    if copies == 1:
        return unreplicated(world_size, stride, notes, protected=False)
    cliques, more_notes = _place(domain, jump or per_node, copies, restart)
    holders: list[tuple[int, ...]] = [()] * world_size
    for clique in cliques:
        _hold(clique, copies, domain, holders)
    return Topology(
        world_size,
        stride,
        copies,
        tuple(tuple(sorted(clique.ring + clique.extras)) for clique in cliques),
        tuple(holders),
        notes + more_notes,
        copies == factor,
        survives=copies - 1,
    )


def _check_numbers(jump: int | None, factor: int) -> None:
    if factor < 1:
        raise ConfigError(f"replication_factor={factor}: it counts all copies, the owner's included.", advice="Use 2.")
    if jump is not None and jump < 1:
        raise ConfigError(
            f"replication_jump={jump}: it is a distance between ranks, at least 1.",
            advice="Leave it out to use the number of ranks per node.",
        )


def unreplicated(world_size: int, jump: int, notes: tuple[str, ...], *, protected: bool) -> Topology:
    alone = tuple((rank,) for rank in range(world_size))
    return Topology(world_size, jump, 1, alone, ((),) * world_size, notes, protected)


def block_size(nodes: Sequence[str]) -> int | None:
    """Ranks per node if every node has one block of equally many consecutive ranks; otherwise None."""
    size = len(nodes) // len(set(nodes))
    even = all(nodes[rank] == nodes[rank - rank % size] for rank in range(len(nodes)))
    return size if even and len(nodes) % size == 0 and len(set(nodes)) == len(nodes) // size else None


def _affordable_copies(
    world_size: int, jump: int, factor: int, domain_count: int, restart: bool
) -> tuple[int, tuple[str, ...]]:
    if domain_count >= factor:
        return factor, ()
    have = f"{domain_count} failure domain{'s' if domain_count > 1 else ''}"
    if not restart:
        raise ConfigError(
            f"replication_factor={factor} needs {factor} failure domains, and this job has {have} "
            f"(world size {world_size}, jump {jump}): two copies of a shard would be lost together.",
            advice=f"Use replication_factor={domain_count}, or at least {factor} failure domains."
            if domain_count > 1
            else f"Use replication=False, or at least {factor} failure domains.",
        )
    return domain_count, (
        f"not fully protected: {domain_count} of {factor} copies of each shard, because only {have} are left",
    )


def _place(
    domain: Sequence[str], stride: int | None, copies: int, restart: bool
) -> tuple[list[_Clique], tuple[str, ...]]:
    """Cliques by distance where that keeps copies apart, else by failure domain; and what to say about it."""
    if stride is None:
        return _by_domain(domain, copies)
    world_size = len(domain)
    documented = world_size % (stride * copies) == 0
    rings = columns(world_size, stride, copies)
    clash = _clash(rings, copies, domain)
    if not clash:
        return [_Clique(ring) for ring in rings], ()
    if documented and not restart:
        fitting = _fitting_jumps(domain, copies)
        raise ConfigError(
            f"replication_jump={stride} with replication_factor={copies} at world size {world_size} {clash}.",
            advice=f"Jumps that fit: {', '.join(map(str, fitting))}."
            if fitting
            else "No jump fits this placement of ranks on nodes; leave replication_jump out.",
        )
    cliques, notes = _by_domain(domain, copies)
    return cliques, (f"jump {stride} {clash}; copies are placed by failure domain instead", *notes)


def columns(world_size: int, jump: int, copies: int) -> list[tuple[int, ...]]:
    """Rings of ranks `jump` apart: whole blocks of jump × copies first, what remains joins the last block.

    A column that is too short for `copies` members comes out short; `_clash` says so.
    """
    block = jump * copies
    whole = world_size // block
    if world_size % block:
        whole = max(0, whole - 1)
    rings = [
        tuple(range(start + offset, start + block, jump))
        for start in range(0, whole * block, block)
        for offset in range(jump)
    ]
    for offset in range(min(jump, world_size - whole * block)):
        column = range(whole * block + offset, world_size, jump)
        cuts = max(1, len(column) // copies)
        ends = [*(copies * cut for cut in range(1, cuts)), len(column)]
        rings += [tuple(column[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
    return rings


def _clash(rings: Sequence[tuple[int, ...]], copies: int, domain: Sequence[str]) -> str:
    """Why these rings do not keep the copies of every shard apart; empty if they do."""
    for ring in rings:
        if len(ring) < copies:
            return f"leaves rank {ring[0]} with {len(ring)} of {copies} copies"
        for place in range(len(ring) if len(ring) > copies else 1):
            seen: dict[str, int] = {}
            for step in range(copies):
                rank = ring[(place + step) % len(ring)]
                other = seen.setdefault(domain[rank], rank)
                if other != rank:
                    return (
                        f"puts copies of one shard on ranks {other} and {rank}, both in failure domain {domain[rank]!r}"
                    )
    return ""


def _fitting_jumps(domain: Sequence[str], copies: int) -> list[int]:
    """The first few jumps with which the documented cliques keep copies apart."""
    world_size = len(domain)
    fitting: list[int] = []
    for jump in range(1, world_size // copies + 1):
        if world_size % (jump * copies) == 0 and not _clash(columns(world_size, jump, copies), copies, domain):
            fitting.append(jump)
            if len(fitting) == 4:
                break
    return fitting


def _by_domain(domain: Sequence[str], copies: int) -> tuple[list[_Clique], tuple[str, ...]]:
    """Deal the ranks out, domain after domain, to as many rings as there can be with `copies` different domains each.

    A domain puts at most one rank into a ring, because its ranks are dealt one after the other and it gives no more of
    them than there are rings. What a very large domain has left over joins a ring as an extra: its copies lie on the
    ring, but it holds none itself.
    """
    members: dict[str, list[int]] = {}
    for rank, name in enumerate(domain):
        members.setdefault(name, []).append(rank)
    count = _most_rings([len(ranks) for ranks in members.values()], copies, len(domain))
    dealt = [rank for ranks in members.values() for rank in ranks[:count]]
    left = [rank for ranks in members.values() for rank in ranks[count:]]
    cliques = [_Clique(tuple(sorted(dealt[i::count])), tuple(left[i::count])) for i in range(count)]
    if not left:
        return cliques, ()
    largest = max(members, key=lambda name: len(members[name]))
    return cliques, (
        f"failure domain {largest!r} has {len(members[largest])} of {len(domain)} ranks: the others hold more than "
        f"{copies - 1} replica{'s' if copies > 2 else ''} per rank",
    )


def _most_rings(sizes: Sequence[int], copies: int, world_size: int) -> int:
    """The largest n for which n rings of at least `copies` different domains can be dealt; found by bisection."""
    low, high = 1, world_size // copies
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(size, middle) for size in sizes) >= copies * middle:
            low = middle
        else:
            high = middle - 1
    return low


def _hold(clique: _Clique, copies: int, domain: Sequence[str], holders: list[tuple[int, ...]]) -> None:
    """Ring members are held by the next ones; extras by ring members of other domains, each starting elsewhere."""
    ring = clique.ring
    for place, rank in enumerate(ring):
        holders[rank] = tuple(ring[(place + step) % len(ring)] for step in range(1, copies))
    for place, rank in enumerate(clique.extras):
        turned = (ring[(place + step) % len(ring)] for step in range(len(ring)))
        holders[rank] = tuple(other for other in turned if domain[other] != domain[rank])[: copies - 1]
