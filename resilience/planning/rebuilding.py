"""Which rank rebuilds a lost shard, and from whose files: the part of a retrieval that parity answers for.

A shard is rebuilt once, by its owner's rank on the node where that runs now; whoever else needs it fetches it from
there. Where another number of ranks starts than saved, any rank does it, and the shard is then a copy like others. The
sources stream what belongs to each stripe, so that no rank holds a clique's bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from resilience.errors import SourceUnavailableError
from resilience.planning.copies import CopyTable
from resilience.planning.erasure import ALIGNMENT, Code, StripePlan
from resilience.planning.inventory import TIERS, Kept, ParityCover, ParityName, Tier

__all__ = ["Part", "Rebuild", "RebuiltPiece", "Source", "plan_rebuilds"]


@dataclass(frozen=True)
class Source:
    """A file that a rebuild reads, and the rank that reads it: `member`'s shard or, with `parity`, its parity.

    `member` counts from 0 within the clique, which is called after its lowest rank; `owner` is that member's rank.
    `nbytes` and `digest` are those of the whole file.
    """

    clique: int
    member: int
    owner: int
    parity: bool
    node: str
    node_dir: str
    tier: Tier
    rank: int
    nbytes: int
    digest: str

    @property
    def kept(self) -> Kept:
        """The file, as a name."""
        return ParityName(self.clique, self.member) if self.parity else self.owner


@dataclass(frozen=True)
class Part:
    """Bytes `start` to `stop` of the file of source number `source`, times `coefficient`."""

    source: int
    start: int
    stop: int
    coefficient: int


@dataclass(frozen=True)
class RebuiltPiece:
    """Bytes `start` to `stop` of the lost shard are the sum of `parts`, which end in zeros where they are shorter.

    `sum_bytes`: the length of the sum, in whole lanes; what goes beyond `stop` is padding.
    """

    start: int
    stop: int
    sum_bytes: int
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Rebuild:
    """`rank` of `node` makes the shard of `owner`, a member of the clique that `cover` tells of, from `sources`."""

    owner: int
    node: str
    rank: int
    nbytes: int
    digest: str
    cover: ParityCover
    sources: tuple[Source, ...]

    @property
    def code(self) -> Code:
        return Code(len(self.cover.members), self.cover.parities)

    @property
    def stripe_bytes(self) -> int:
        return self.code.stripe_bytes(max(self.cover.nbytes))

    def stripes(self) -> tuple[StripePlan, ...]:
        """How each stripe follows from the sources; equal on all ranks."""
        place = self.cover.members.index(self.owner)
        plans = self.code.recover(place, _members(self.sources, parity=False), _members(self.sources, parity=True))
        assert plans is not None, f"the sources do not make up the shard of rank {self.owner}"
        return plans

    def pieces(self, piece_bytes: int) -> Iterator[RebuiltPiece]:
        """In the shard's order, the same on the rank that rebuilds and on those that send. Pieces are whole lanes."""
        stripe, end = self.stripe_bytes, -(-self.nbytes // ALIGNMENT) * ALIGNMENT
        place = {(source.member, source.parity): number for number, source in enumerate(self.sources)}
        for plan in self.stripes():
            for at in range(0, stripe, piece_bytes):
                start = plan.stripe * stripe + at
                stop = min(start + piece_bytes, (plan.stripe + 1) * stripe, end)
                if start >= end:
                    break
                parts = []
                for term in plan.terms:
                    source = self.sources[place[term.member, term.parity]]
                    first = term.index * stripe + at + (self.code.header_bytes if term.parity else 0)
                    last = min(first + stop - start, source.nbytes)
                    if first < last:
                        parts.append(Part(place[term.member, term.parity], first, last, term.coefficient))
                yield RebuiltPiece(start, min(stop, self.nbytes), stop - start, tuple(parts))

    def travelling(self) -> dict[str, int]:
        """How many bytes come from which other node."""
        found: Counter[str] = Counter()
        for piece in self.pieces(self.stripe_bytes):
            for part in piece.parts:
                if self.sources[part.source].node != self.node:
                    found[self.sources[part.source].node] += part.stop - part.start
        return dict(found)


def plan_rebuilds(
    table: CopyTable, homes: Mapping[int, int], nodes: Sequence[str], ranks_on: Mapping[str, Sequence[int]]
) -> tuple[Rebuild, ...]:
    """For owners of whom there is no copy. `homes`: which rank makes whose shard, one each; `nodes`: of each rank.

    SourceUnavailableError if what is needed is held only where no rank runs.
    """
    assert len(set(homes.values())) == len(homes), f"a rank rebuilds one shard at a time: {homes}"
    sent: Counter[int] = Counter()
    return tuple(_rebuild(table, owner, homes[owner], nodes, ranks_on, sent) for owner in sorted(homes))


def _rebuild(
    table: CopyTable,
    owner: int,
    home: int,
    nodes: Sequence[str],
    ranks_on: Mapping[str, Sequence[int]],
    sent: Counter[int],
) -> Rebuild:
    group = table.rebuilt_from.get(owner)
    if group is None:
        raise SourceUnavailableError(f"The shard of rank {owner} is held by no node that takes part in this start.")
    cover = group.cover
    held = {(place, False): table.held_in[member] for place, member in enumerate(cover.members)}
    held |= {(place, True): there for place, there in enumerate(group.held_in)}
    found = {key: [i for i in there if table.holdings[i].source in ranks_on] for key, there in held.items()}
    shards = [place for (place, parity), there in found.items() if there and not parity]
    parities = [place for (place, parity), there in found.items() if there and parity]
    plans = Code(len(cover.members), cover.parities).recover(cover.members.index(owner), shards, parities)
    if plans is None:
        raise SourceUnavailableError(
            f"What the shard of rank {owner} could be rebuilt from takes no part in this start."
        )
    used = sorted({(term.member, term.parity) for plan in plans for term in plan.terms})
    sources = []
    for place, parity in used:
        source = _source(table, cover, place, parity, found[place, parity], nodes, ranks_on, sent)
        sent[source.rank] += source.nbytes if source.rank != home else 0
        sources.append(source)
    index = cover.members.index(owner)
    return Rebuild(owner, nodes[home], home, cover.nbytes[index], cover.digests[index], cover, tuple(sources))


def _source(
    table: CopyTable,
    cover: ParityCover,
    place: int,
    parity: bool,
    there: Sequence[int],
    nodes: Sequence[str],
    ranks_on: Mapping[str, Sequence[int]],
    sent: Counter[int],
) -> Source:
    """The cheapest tier first; then the rank whose file it is, else whoever there has least to send."""
    member = cover.members[place]
    lives_on = nodes[member] if member < len(nodes) else ""  # there may be fewer ranks today than at the save

    def cost(i: int) -> tuple[int, bool, int, str]:
        holding = table.holdings[i]
        return TIERS.index(holding.copies.tier), holding.source != lives_on, i, holding.source

    holding = table.holdings[min(there, key=cost)]
    copies, node = holding.copies, holding.source
    rank = member if lives_on == node else min(ranks_on[node], key=lambda each: (sent[each], each))
    if parity:
        held = next(each for each in copies.parity if each.cover == cover and each.index == place)
        nbytes, digest = held.nbytes, held.digest
    else:
        nbytes, digest = table.nbytes[member], table.digests[member]
    return Source(cover.members[0], place, member, parity, node, copies.node_id, copies.tier, rank, nbytes, digest)


def _members(sources: Sequence[Source], *, parity: bool) -> list[int]:
    return [source.member for source in sources if source.parity == parity]
