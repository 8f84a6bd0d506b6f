"""Which of the tensors that a model wants stored as one (its layers, its experts) are stored so in a save.

All of them, as long as each of the alike is there. A stack with a gap would be no tensor: where only some layers are
trained, the others have no moments; where frozen parameters are left out, it may be some layers' that stay. Then each
is stored by itself, under its own name. The ranks tell each other what they have when that changed; else nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from resilience.formats.protocol import Chunk, RankShare
from resilience.replication.communicator import Agreements
from resilience.state.stored_place import StoredPlace, StoredPlaces

__all__ = ["Stacks", "under_stored_keys"]


@dataclass
class Stacks:
    """What was found out in one series of saves, by the directory that it went to; the same on all ranks."""

    _found: dict[str, tuple[str, frozenset[str]]] = field(default_factory=dict)

    def store(self, share: RankShare, places: StoredPlaces, group: Agreements, directory: str) -> RankShare:
        """`share` under the keys that the model names. Collective over all ranks of the save."""
        mine = {_short(path): [total, _bits(slots)] for path, (total, slots) in _slots(share, places).items()}
        digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
        known, gaps = self._found.get(directory, ("", frozenset()))
        if group.maximum([int(known != digest)])[0]:
            gaps = _with_gaps([json.loads(each) for each in group.gather(json.dumps(mine).encode())])
            self._found[directory] = digest, gaps
        chunks, aliases = under_stored_keys(share.chunks, share.aliases, places, gaps)
        return replace(share, chunks=chunks, aliases=aliases)


def under_stored_keys(
    chunks: Sequence[Chunk], aliases: Mapping[str, str], places: StoredPlaces, gaps: Collection[str] = ()
) -> tuple[list[Chunk], dict[str, str]]:
    """One of several layers becomes a part of what all of them make up. `gaps`: stacks that are not all there.

    A second name of a tensor that lies in a stack is a part of its own there; the others stay second names.
    """
    stored = [_stored(chunk, places, gaps) for chunk in chunks]
    left: dict[str, str] = {}
    for alias, root in aliases.items():
        found = [places.named(path) for path in (alias, root)]
        if any(place is not None and place.index for place in found):
            stored += [_stored(replace(chunk, key=alias), places, gaps) for chunk in chunks if chunk.key == root]
        else:
            first, second = (place.path if place else path for place, path in zip(found, (alias, root), strict=True))
            left[first] = second
    return stored, left


def _stored(chunk: Chunk, places: StoredPlaces, gaps: Collection[str]) -> Chunk:
    place = places.of(chunk.key, tuple(chunk.global_shape))
    whole = chunk.sizes == tuple(chunk.global_shape)
    if place is None or (chunk.per_rank and whole and not place.index):
        return chunk  # a rank's own is found by the name that its values have for it
    if place.index and _short(place.path) in gaps:
        return chunk
    tensor = chunk.tensor
    for _ in place.index:
        tensor = tensor.unsqueeze(0)
    shape, offsets = (*place.counts, *chunk.global_shape), (*place.index, *chunk.offsets)
    return replace(chunk, key=place.path, tensor=tensor, global_shape=shape, offsets=offsets)


def _slots(share: RankShare, places: StoredPlaces) -> dict[str, tuple[int, set[int]]]:
    """Of each stack that this rank has something of: how many are alike, and which of them it has."""
    found: dict[str, tuple[int, set[int]]] = {}
    for place in _stack_places(share, places):
        slot = 0
        for at, count in zip(place.index, place.counts, strict=True):
            slot = slot * count + at
        found.setdefault(place.path, (math.prod(place.counts), set()))[1].add(slot)
    return found


def _stack_places(share: RankShare, places: StoredPlaces) -> Iterator[StoredPlace]:
    roots: dict[str, tuple[int, ...]] = {}
    for chunk in share.chunks:
        roots[chunk.key] = tuple(chunk.global_shape)
    for key, shape in (*roots.items(), *((alias, roots[r]) for alias, r in share.aliases.items() if r in roots)):
        place = places.of(key, shape)
        if place is not None and place.index:
            yield place


def _with_gaps(told: Sequence[Mapping[str, tuple[int, str]]]) -> frozenset[str]:
    have: dict[str, int] = {}
    totals: dict[str, int] = {}
    for mine in told:
        for stack, (total, bits) in mine.items():
            have[stack], totals[stack] = have.get(stack, 0) | int(bits, 16), total
    return frozenset(stack for stack, bits in have.items() if bits.bit_count() < totals[stack])


def _bits(slots: Collection[int]) -> str:
    return f"{sum(1 << slot for slot in slots):x}"


def _short(path: str) -> str:
    return hashlib.sha256(path.encode()).hexdigest()[:16]
