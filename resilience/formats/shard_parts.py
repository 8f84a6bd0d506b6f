"""What the shards of all ranks of a save make up together: whole tensors, and what each rank had for itself.

The item index in each shard's header says which part of which tensor it holds. What becomes of what several ranks have
is decided by the rules by which a persistent checkpoint is written (`once.Claims`, `plain_names`), so that a save reads
the same from shards as from shared storage. Pure; every rank of a start works it out for itself and alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from resilience.errors import CorruptCopyError, LayoutMismatchError
from resilience.formats.folder_files import plain_names
from resilience.formats.in_common import sum_of
from resilience.formats.once import Claims, claim_of, may_join, place_of
from resilience.state.sharding import may_be_cut, without_block
from resilience.stores.shard_file import SavedPiece, ShardHeader

__all__ = ["SMALL_BYTES", "Assembled", "Part", "Together", "is_small", "parts_together", "to_be_marked"]

#: A tensor that a rank has for itself travels with the index up to this size, as its values do.
SMALL_BYTES = 64 << 10

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and shape


@dataclass(frozen=True)
class Part:
    """A box of a tensor, and where its bytes begin: (owner, byte) in each of the shards that hold the same ones."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    at: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Assembled:
    """One tensor and the parts that make it up, each element in exactly one of them."""

    dtype: str
    global_shape: tuple[int, ...]
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Together:
    """`whole`: by key, what all ranks made up together. `own`, `digests`: by rank, what each had for itself alone.

    A model's tensor that differs from rank to rank is in both: in `whole` it is the lowest rank's.
    """

    whole: Mapping[str, Assembled]
    own: Mapping[int, Mapping[str, Assembled]]
    digests: Mapping[int, Mapping[str, str]]


def is_small(piece: SavedPiece) -> bool:
    """Whether a rank shows the piece's bytes with its index: what may be compared while a load is planned.

    Random states, places in the data, hyperparameters; not parameters and what an optimizer keeps for them.
    """
    key = without_block(piece.key)
    of_parameter = key.startswith("model/") or (key.split("/")[2:3] == ["state"] and key.startswith("optimizer/"))
    return piece.stop - piece.start <= SMALL_BYTES and not (piece.shared and of_parameter)


def to_be_marked(headers: Mapping[int, ShardHeader]) -> dict[int, list[str]]:
    """Pieces, by owner, whose content has to be known before `parts_together` can say what belongs together.

    What several ranks have as their own, what several groups share, and what a rank has alone and is not small. The
    mark of a piece of its own is its fingerprint, that of a shared one its `place_sum`.
    """
    claims = _claims(headers)
    groups = _groups(headers)
    found: dict[int, list[str]] = {owner: [] for owner in headers}
    for owner, header in headers.items():
        for piece in header.pieces.values():
            if piece.shared:
                marked = len(groups[_item_of(piece)]) > 1
            elif _joins(piece):
                marked = _place(piece) in claims.contested
            else:
                marked = not is_small(piece)
            if marked:
                found[owner].append(piece.key)
    return found


def parts_together(headers: Mapping[int, ShardHeader], marks: Mapping[int, Mapping[str, str]]) -> Together:
    """`headers` of all owners; `marks`: of all pieces that `to_be_marked` names and of those that are small, by owner.

    LayoutMismatchError if they cannot be put together.
    """
    together = _Putting(headers, marks)
    together.take_shared()
    together.take_own()
    return together.done()


class _Putting:
    def __init__(self, headers: Mapping[int, ShardHeader], marks: Mapping[int, Mapping[str, str]]) -> None:
        self._headers = headers
        self._marks = marks
        self._whole: dict[str, list[tuple[SavedPiece, Part]]] = {}
        self._own: dict[int, dict[str, list[tuple[SavedPiece, Part]]]] = {owner: {} for owner in headers}
        self._digests: dict[int, dict[str, str]] = {owner: {} for owner in headers}

    def take_shared(self) -> None:
        """What data parallelism repeats: of each item the rows of one group, if all groups that have it agree."""
        for groups in _groups(self._headers).values():
            lowest = min(groups)
            if len(groups) == 1 or len({self._sum(pieces) for pieces in groups.values()}) == 1:
                for found in groups[lowest].values():
                    self._add(self._whole, found)
                continue
            for number, pieces in groups.items():
                digest = f"sum {self._sum(pieces)}"
                for rank in _members(self._headers, number):
                    keys = {self._add(self._own[rank], found) for found in pieces.values()}
                    for key in keys:  # one; a tensor of several blocks comes here for each of them
                        self._digests[rank][key] = f"{self._digests[rank].get(key, '')} {digest}"

    def _sum(self, pieces: Mapping[Box, list[tuple[int, SavedPiece]]]) -> int:
        return sum_of(int(self._mark(*found[0])) for found in pieces.values())

    def take_own(self) -> None:
        """What is each rank's own, unless ranks have it alike or it is a part of what others have parts of."""
        claims = _claims(self._headers)
        placed: dict[int, list[tuple[int, SavedPiece]]] = {}
        for owner, piece in _own_pieces(self._headers):
            if _joins(piece):
                placed.setdefault(_place(piece), []).append((owner, piece))
        names = {place: found[0][1].key for place, found in placed.items()}
        _refuse(claims.overlap(names))
        differ = {
            place for place in claims.contested if len({self._mark(owner, piece) for owner, piece in placed[place]}) > 1
        }
        _refuse(claims.conflict(differ, names))
        for place, found in placed.items():
            if place not in differ:
                self._add(self._whole, found)
        alone = [
            (owner, piece)
            for owner, piece in _own_pieces(self._headers)
            if not _joins(piece) or _place(piece) in differ
        ]
        self._keep_alone(alone)

    def _keep_alone(self, alone: Sequence[tuple[int, SavedPiece]]) -> None:
        for owner, piece in alone:
            key = self._add(self._own[owner], [(owner, piece)])
            self._digests[owner][key] = self._mark(owner, piece)
        ranks = sorted(self._headers)
        plain = plain_names([[key for key in self._own[rank] if may_be_cut(key)] for rank in ranks])
        for key, (place, only) in plain.items():
            if key in self._whole:
                continue
            rank = ranks[place]
            self._whole[key] = self._own[rank][key]
            if only:
                del self._own[rank][key], self._digests[rank][key]

    def done(self) -> Together:
        whole = {key: _assembled(key, found) for key, found in self._whole.items()}
        own = {rank: {key: _assembled(key, found) for key, found in mine.items()} for rank, mine in self._own.items()}
        for rank, header in self._headers.items():
            for alias, root in ((without_block(a), without_block(r)) for a, r in header.aliases.items()):
                if root in own[rank]:
                    own[rank][alias] = own[rank][root]
                    self._digests[rank][alias] = self._digests[rank][root]
                elif root in whole:
                    whole.setdefault(alias, whole[root])
        return Together(whole, own, self._digests)

    def _add(self, where: dict[str, list[tuple[SavedPiece, Part]]], found: Sequence[tuple[int, SavedPiece]]) -> str:
        """One part of a tensor, which all of `found` hold; its key."""
        piece = found[0][1]
        at = tuple((owner, each.start) for owner, each in found)
        key = without_block(piece.key)
        where.setdefault(key, []).append((piece, Part(piece.offsets, piece.shape, at)))
        return key

    def _mark(self, owner: int, piece: SavedPiece) -> str:
        try:
            return self._marks[owner][piece.key]
        except KeyError:
            raise CorruptCopyError(f"nobody told the content of {piece.key!r} in the shard of rank {owner}.") from None


def _assembled(key: str, found: Sequence[tuple[SavedPiece, Part]]) -> Assembled:
    first = found[0][0]
    other = next((p for p, _ in found if (p.dtype, p.global_shape) != (first.dtype, first.global_shape)), None)
    if other is not None:
        raise LayoutMismatchError(
            f"{key} was saved as {first.dtype} {list(first.global_shape)} by one rank and as {other.dtype} "
            f"{list(other.global_shape)} by another."
        )
    given, whole = sum(math.prod(part.shape) for _, part in found), math.prod(first.global_shape)
    if given != whole:
        raise LayoutMismatchError(f"the ranks' parts of {key} have {given} elements of {whole}.")
    parts = tuple(part for _, part in found if 0 not in part.shape)
    return Assembled(first.dtype, first.global_shape, parts)


def _refuse(said: tuple[str, str]) -> None:
    if said[0]:
        raise LayoutMismatchError(said[0], advice=said[1])


def _own_pieces(headers: Mapping[int, ShardHeader]) -> Iterator[tuple[int, SavedPiece]]:
    for owner in sorted(headers):
        for piece in headers[owner].pieces.values():
            if not piece.shared:
                yield owner, piece


def _joins(piece: SavedPiece) -> bool:
    return may_join(piece.key, piece.shape, piece.global_shape)


def _place(piece: SavedPiece) -> int:
    return place_of(without_block(piece.key), piece.shape, piece.global_shape, piece.offsets)


def _claims(headers: Mapping[int, ShardHeader]) -> Claims:
    return Claims(
        [
            [
                claim_of(without_block(piece.key), piece.shape, piece.global_shape, piece.offsets)
                for piece in headers[owner].pieces.values()
                if not piece.shared and _joins(piece)
            ]
            for owner in sorted(headers)
        ]
    )


def _item_of(piece: SavedPiece) -> SavedPiece:
    """The shared item that a piece is of, without where its bytes lie: equal for all its pieces, in all groups."""
    if piece.rows is None:
        box = piece.offsets, piece.shape
    else:
        box = (piece.rows[0], *piece.offsets[1:]), (piece.rows[1], *piece.shape[1:])
    return replace(piece, key=without_block(piece.key), offsets=box[0], shape=box[1], start=0, stop=0, rows=None)


def _groups(
    headers: Mapping[int, ShardHeader],
) -> dict[SavedPiece, dict[int, dict[Box, list[tuple[int, SavedPiece]]]]]:
    """Shared items, by data-parallel group (its lowest rank), by box: who holds that box of it, lowest owner first."""
    found: dict[SavedPiece, dict[int, dict[Box, list[tuple[int, SavedPiece]]]]] = {}
    for owner in sorted(headers):
        group = min(headers[owner].group, default=owner)
        for piece in headers[owner].pieces.values():
            if piece.shared:
                boxes = found.setdefault(_item_of(piece), {}).setdefault(group, {})
                boxes.setdefault((piece.offsets, piece.shape), []).append((owner, piece))
    return found


def _members(headers: Mapping[int, ShardHeader], group: int) -> list[int]:
    return [owner for owner in sorted(headers) if min(headers[owner].group, default=owner) == group]
