"""What the redundancy schemes cost and survive: bytes kept, bytes sent, losses, and the risk of losing a save.

A scheme is chosen by name, once; everything that differs between schemes is asked of it (or of its exchange, in
`replication/redundancy.py`). `compare` is what `advise` shows. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import comb
from typing import Final, Protocol

from resilience.planning.erasure import Code
from resilience.planning.inventory import Kept, ParityName
from resilience.planning.pacing import ring_buffer_bytes
from resilience.planning.parity_topology import make_parity_topology
from resilience.planning.topology import Topology, make_topology

__all__ = ["SCHEMES", "Comparison", "Parity", "Replicas", "Scheme", "compare", "loss_probability"]


class Scheme(Protocol):
    """How a clique protects its members' shards. `clique`: its members, each in a failure domain of its own."""

    @property
    def name(self) -> str:
        """As in `redundancy`."""
        ...

    @property
    def files_named(self) -> str:
        """What its files are called, for people."""
        ...

    @property
    def smallest_clique(self) -> int:
        """With fewer members it protects nothing."""
        ...

    def losses(self, clique: int) -> int:
        """How many members may be lost at once."""
        ...

    def kept_bytes(self, shard_bytes: int, clique: int) -> int:
        """What a rank keeps of one save for the others' sake, beside its own shard."""
        ...

    def sent_bytes(self, shard_bytes: int, clique: int) -> int:
        """What a rank sends for one save; it receives as much."""
        ...

    def place(
        self,
        nodes: Sequence[str],
        *,
        jump: int | None,
        factor: int,
        domains: Mapping[str, str] | None,
        restart: bool,
    ) -> Topology:
        """The cliques of a job whose ranks run on `nodes`. ConfigError at a first start that cannot be protected."""
        ...

    def files(self, topology: Topology, rank: int, shard_bytes: Sequence[int]) -> Mapping[Kept, int]:
        """What `rank` keeps of one save for the others' sake, and each file's bytes. `shard_bytes`: of each rank."""
        ...

    def traffic(self, topology: Topology, rank: int, shard_bytes: int) -> int:
        """What `rank` sends for one save in this very topology."""
        ...

    def buffer_bytes(self, topology: Topology) -> int:
        """The exchange's own buffers on one rank."""
        ...


@dataclass(frozen=True)
class Replicas:
    """Whole copies: a rank's shard lies on all members of its clique."""

    name: str = "replica"
    files_named: str = "replicas"
    smallest_clique: int = 2

    def losses(self, clique: int) -> int:
        return clique - 1

    def kept_bytes(self, shard_bytes: int, clique: int) -> int:
        return (clique - 1) * shard_bytes

    def sent_bytes(self, shard_bytes: int, clique: int) -> int:
        return (clique - 1) * shard_bytes

    def place(
        self,
        nodes: Sequence[str],
        *,
        jump: int | None,
        factor: int,
        domains: Mapping[str, str] | None,
        restart: bool,
    ) -> Topology:
        return make_topology(len(nodes), nodes, jump=jump, factor=factor, domains=domains, restart=restart)

    def files(self, topology: Topology, rank: int, shard_bytes: Sequence[int]) -> Mapping[Kept, int]:
        return {owner: shard_bytes[owner] for owner in topology.held()[rank]}

    def traffic(self, topology: Topology, rank: int, shard_bytes: int) -> int:
        return len(topology.holders[rank]) * shard_bytes

    def buffer_bytes(self, topology: Topology) -> int:
        return 0


@dataclass(frozen=True)
class Parity:
    """One or two parities over the clique's shards, spread over its members."""

    name: str
    parities: int
    files_named: str = "parity files"

    @property
    def smallest_clique(self) -> int:
        return self.parities + 1

    def losses(self, clique: int) -> int:
        return self.parities

    def kept_bytes(self, shard_bytes: int, clique: int) -> int:
        return self.parities * Code(clique, self.parities).stripe_bytes(shard_bytes)

    def sent_bytes(self, shard_bytes: int, clique: int) -> int:
        """A partial sum per hop and parity; the first hop's, which is the bare stripe, serves both."""
        code = Code(clique, self.parities)
        messages = self.parities * code.data
        if self.parities == 2 and code.data > 1:
            messages -= 1
        return messages * code.stripe_bytes(shard_bytes)

    def place(
        self,
        nodes: Sequence[str],
        *,
        jump: int | None,
        factor: int,
        domains: Mapping[str, str] | None,
        restart: bool,
    ) -> Topology:
        return make_parity_topology(
            len(nodes), nodes, scheme=self.name, parities=self.parities, jump=jump, size=factor, domains=domains,
            restart=restart,
        )  # fmt: skip

    def files(self, topology: Topology, rank: int, shard_bytes: Sequence[int]) -> Mapping[Kept, int]:
        clique = topology.clique_of(rank)
        if len(clique) == 1:
            return {}
        nbytes = Code(len(clique), self.parities).file_bytes(max(shard_bytes[member] for member in clique))
        return {ParityName(clique[0], clique.index(rank)): nbytes}

    def traffic(self, topology: Topology, rank: int, shard_bytes: int) -> int:
        clique = topology.clique_of(rank)
        return self.sent_bytes(shard_bytes, len(clique)) if len(clique) > 1 else 0

    def buffer_bytes(self, topology: Topology) -> int:
        sizes = {len(clique) for clique in topology.cliques if len(clique) > 1}
        return max((ring_buffer_bytes(Code(size, self.parities)) for size in sizes), default=0)


#: By the name that `redundancy` gives.
SCHEMES: Final[Mapping[str, Scheme]] = {
    scheme.name: scheme for scheme in (Replicas(), Parity("xor", 1), Parity("rs", 2))
}


@dataclass(frozen=True)
class Comparison:
    """One scheme with one clique size, per rank and save. `kept_bytes`: beside its own shard; `kept_ratio`: of it.

    `survives`: any so many failure domains may be lost at once. `loss_probability`: by the number of domains that are
    lost at once, how likely some shard is lost with them (all sets of that many domains being equally likely).
    """

    scheme: str
    clique: int
    kept_bytes: int
    kept_ratio: float
    sent_bytes: int
    survives: int
    loss_probability: Mapping[int, float] = field(default_factory=dict)


def compare(
    shard_bytes: int,
    domains: int,
    *,
    options: Sequence[tuple[str, int]] = (("replica", 2), ("replica", 3), ("xor", 4), ("rs", 4), ("xor", 8), ("rs", 8)),
    failures: Sequence[int] = (1, 2, 3),
) -> tuple[Comparison, ...]:
    """Compare `(scheme, clique size)` pairs for a job on so many failure domains, in the given order.

    `shard_bytes`: of one rank at one save. Options that the domains do not allow are left out.
    """
    found: list[Comparison] = []
    for name, clique in options:
        scheme = SCHEMES[name]
        if not scheme.smallest_clique <= clique <= domains:
            continue
        kept, losses = scheme.kept_bytes(shard_bytes, clique), scheme.losses(clique)
        risk = {lost: loss_probability(domains, clique, losses, lost) for lost in failures if lost <= domains}
        ratio, sent = kept / shard_bytes if shard_bytes else 0.0, scheme.sent_bytes(shard_bytes, clique)
        found.append(Comparison(name, clique, kept, ratio, sent, losses, risk))
    return tuple(found)


def loss_probability(domains: int, clique: int, losses: int, lost: int) -> float:
    """How likely a shard is lost when `lost` of the job's domains fail at once, any set of them as likely as another.

    The domains form cliques of `clique` that each survive `losses` (what does not divide joins the last one). Counted
    exactly: the sets with at most `losses` in each clique are a coefficient of a product of polynomials.
    """
    if lost <= losses:
        return 0.0
    cliques = max(1, domains // clique)
    sizes = {clique: cliques - 1, domains - clique * (cliques - 1): 1} if domains != clique * cliques else {
        clique: cliques
    }  # fmt: skip
    ways = [1] + [0] * lost
    for size, count in sizes.items():
        survived = [comb(size, failed) for failed in range(min(losses, size, lost) + 1)]
        ways = _times(ways, _power(survived, count, lost), lost)
    return 1.0 - ways[lost] / comb(domains, lost)


def _power(base: list[int], exponent: int, degree: int) -> list[int]:
    result = [1]
    while exponent:
        if exponent & 1:
            result = _times(result, base, degree)
        base = _times(base, base, degree)
        exponent >>= 1
    return result


def _times(one: list[int], other: list[int], degree: int) -> list[int]:
    """The product of two polynomials, up to `degree`."""
    product = [0] * (degree + 1)
    for i, a in enumerate(one):
        for j, b in enumerate(other[: degree + 1 - i]):
            product[i + j] += a * b
    return product
