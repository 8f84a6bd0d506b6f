"""How a clique's shards are cut, which parity covers what (the geometry of `xor` and `rs`), and how a loss is solved.

Every member's shard is cut into *stripes* of equal size (a short shard is taken to end in zeros). There is one *row*
per member: it consists of one stripe of each of `data` members, of their parity P, kept by the row's own member, and
for `rs` of a second parity Q, kept by the member after it. So every member keeps as much parity as every other, and
losing one member takes at most one piece of each row:

    n = 4, rs      row 0        row 1        row 2        row 3
    member 0       P            stripe 1     stripe 0     Q
    member 1       Q            P            stripe 1     stripe 0
    member 2       stripe 0     Q            P            stripe 1
    member 3       stripe 1     stripe 0     Q            P

P is the XOR of a row's stripes. Q is their sum with the weights 2^(data-1), …, 4, 2, 1 in GF(2^8) (polynomial 0x11d, as
in RAID 6): in that order a partial sum that goes from member to member is doubled before the next stripe is added. Any
two unknowns of a row follow from its P and Q; one follows from either. H. P. Anvin, "The mathematics of RAID-6".
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

__all__ = ["ALIGNMENT", "LARGEST_CLIQUE", "Code", "StripePlan", "Term", "gf_divide", "gf_multiply"]

ALIGNMENT: Final = 64  #: stripes are multiples of it, so that lanes of 8 bytes never cross one
LARGEST_CLIQUE: Final = 128  #: members; the weights are distinct up to 255
_HEADER_BYTES: Final = 1024
_HEADER_BYTES_PER_MEMBER: Final = 128
_PAGE: Final = 4096
_POLYNOMIAL: Final = 0x11D


def gf_multiply(one: int, other: int) -> int:
    """In GF(2^8)."""
    product = 0
    while other:
        if other & 1:
            product ^= one
        one <<= 1
        if one & 0x100:
            one ^= _POLYNOMIAL
        other >>= 1
    return product


def gf_divide(one: int, other: int) -> int:
    """In GF(2^8); `other` is not 0."""
    assert other, "division by zero in GF(2^8)"
    inverse = 1
    for _ in range(254):  # x^254 = 1/x
        inverse = gf_multiply(inverse, other)
    return gf_multiply(one, inverse)


@dataclass(frozen=True, order=True)
class Term:
    """One summand: stripe `index` of the shard of the clique's `member` or, of its `parity`, the P (0) or Q (1)."""

    member: int
    parity: bool
    index: int
    coefficient: int


@dataclass(frozen=True)
class StripePlan:
    """Stripe `stripe` of a lost shard is the sum of `terms`."""

    stripe: int
    terms: tuple[Term, ...]


@dataclass(frozen=True)
class Code:
    """The code of a clique of `members` with `parities` (1: xor, 2: rs). Members are counted from 0."""

    members: int
    parities: int

    def __post_init__(self) -> None:
        assert self.parities in (1, 2), f"{self.parities} parities"
        assert self.parities < self.members <= LARGEST_CLIQUE, f"{self.members} members, {self.parities} parities"

    @property
    def data(self) -> int:
        """Stripes of a shard, and of a row."""
        return self.members - self.parities

    def stripe_bytes(self, longest: int) -> int:
        """The size of every stripe in a clique whose longest shard has so many bytes."""
        return -(-longest // (self.data * ALIGNMENT)) * ALIGNMENT

    @property
    def header_bytes(self) -> int:
        """Of a parity file: room for the shards' sizes and digests, in whole pages."""
        return -(-(_HEADER_BYTES + self.members * _HEADER_BYTES_PER_MEMBER) // _PAGE) * _PAGE

    def file_bytes(self, longest: int) -> int:
        """Of the file in which a member keeps its parity."""
        return self.header_bytes + self.parities * self.stripe_bytes(longest)

    def row_of(self, member: int, stripe: int) -> int:
        """The row that a stripe belongs to."""
        return (member - self.parities - stripe) % self.members

    def contributor(self, row: int, stripe: int) -> int:
        """The member whose stripe with that number belongs to `row`: the inverse of `row_of`."""
        return (row + self.parities + stripe) % self.members

    def keeper(self, row: int, parity: int) -> int:
        """The member that keeps the row's P (0) or Q (1)."""
        return (row + parity) % self.members

    def kept_row(self, member: int, parity: int) -> int:
        """The row whose P (0) or Q (1) a member keeps: the inverse of `keeper`."""
        return (member - parity) % self.members

    def weight(self, stripe: int, parity: int) -> int:
        """What a stripe counts for in P (0) or Q (1)."""
        weight = 1
        for _ in range((self.data - 1 - stripe) if parity else 0):
            weight = gf_multiply(weight, 2)
        return weight

    def recover(self, lost: int, shards: Collection[int], parity: Collection[int]) -> tuple[StripePlan, ...] | None:
        """How the shard of `lost` follows from those of the members in `shards` and the parity of those in `parity`.

        One plan per stripe; None if there is too little.
        """
        plans: list[StripePlan] = []
        for stripe in range(self.data):
            terms = self._solve(stripe, self.row_of(lost, stripe), lost, shards, parity)
            if terms is None:
                return None
            plans.append(StripePlan(stripe, tuple(sorted(terms))))
        return tuple(plans)

    def _solve(
        self, stripe: int, row: int, lost: int, shards: Collection[int], parity: Collection[int]
    ) -> list[Term] | None:
        there = [each for each in range(self.parities) if self.keeper(row, each) in parity]
        known: list[tuple[int, int]] = []
        unknown: list[tuple[int, int]] = []
        for other in range(self.data):
            member = self.contributor(row, other)
            if member == lost:
                continue
            (known if member in shards else unknown).append((member, other))
        if not unknown and there:
            equation = there[0]
            own = self.weight(stripe, equation)
            terms = [Term(m, False, s, gf_divide(self.weight(s, equation), own)) for m, s in known]
            return [*terms, Term(self.keeper(row, equation), True, equation, gf_divide(1, own))]
        if len(unknown) == 1 and len(there) == 2:
            second = self.weight(unknown[0][1], 1)
            scale = gf_divide(1, self.weight(stripe, 1) ^ second)
            terms = [Term(m, False, s, gf_multiply(self.weight(s, 1) ^ second, scale)) for m, s in known]
            p = Term(self.keeper(row, 0), True, 0, gf_multiply(second, scale))
            return [*terms, p, Term(self.keeper(row, 1), True, 1, scale)]
        return None
