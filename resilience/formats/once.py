"""Who writes what several ranks have: the lowest of them, if they have it alike.

`Claims` holds the rules, `once` carries them out for a checkpoint that is being written.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import xxhash

from resilience.errors import SaveFailedError
from resilience.formats.protocol import Chunk
from resilience.replication.communicator import Agreements
from resilience.state.sharding import may_be_cut
from resilience.state.tensors import memory_of

__all__ = ["Claims", "claim_of", "may_join", "once", "place_of"]


def once(chunks: Sequence[Chunk], group: Agreements) -> list[Chunk]:
    """The same chunks, but what several ranks have as their own and alike, the lowest of them has alone, for all.

    That is how experts, and shards of FSDP, that data parallelism repeats are written once. What only one rank has, or
    all have alike, becomes a part of the whole. Of what is whole and differs, each rank keeps its own. SaveFailedError
    on all ranks if two have different bytes for one part of a whole, or parts that overlap. Collective over all ranks.
    """
    mine = {_place(chunk): chunk for chunk in chunks if _may_join(chunk)}
    names = {place: chunk.key for place, chunk in mine.items()}
    told = []
    for payload in group.gather(_packed(word for each in mine.values() for word in _told(each))):
        words = _numbers(payload)
        told.append(list(zip(words[::4], words[1::4], words[2::4], words[3::4], strict=True)))
    claims = Claims(told)
    _fail_with(claims.overlap(names))
    contested = [place for place in mine if place in claims.contested]
    contents: dict[int, set[int]] = {}
    for payload in group.gather(_packed(word for place in contested for word in (place, _content(mine[place])))):
        words = _numbers(payload)
        for place, content in zip(words[::2], words[1::2], strict=True):
            contents.setdefault(place, set()).add(content)
    differ = {place for place, found in contents.items() if len(found) > 1}
    _fail_with(claims.conflict(differ, names))
    kept = [chunk for place, chunk in mine.items() if place in differ]
    kept += [chunk for chunk in chunks if not _may_join(chunk)]
    for place, chunk in mine.items():
        if place not in differ and claims.holders[place][0] == group.rank:
            kept.append(replace(chunk, per_rank=False))
    return kept


class Claims:
    """Which ranks have what as their own, each under its `place_of`; the rules by which that becomes one tensor.

    The same for what is being written to shared storage and for shards on nodes that another number of ranks reads.
    `told`: by rank, of each of its tensors that may join: place, a number that stands for the key, elements, elements
    of the whole.
    """

    def __init__(self, told: Sequence[Iterable[tuple[int, int, int, int]]]) -> None:
        self.holders: dict[int, list[int]] = {}
        self._parts: dict[int, tuple[int, int, int]] = {}
        for rank, claims in enumerate(told):
            for place, key, elements, whole in claims:
                self.holders.setdefault(place, []).append(rank)
                if place & 1:
                    self._parts[place] = key, elements, whole

    @property
    def contested(self) -> frozenset[int]:
        """Places at which several ranks have something: whether it is the same has to be looked at."""
        return frozenset(place for place, ranks in self.holders.items() if len(ranks) > 1)

    def overlap(self, names: Mapping[int, str]) -> tuple[str, str]:
        """What to say (and to advise) of parts that make up more than their whole: nobody could say which counts.

        Empty if there are none. `names`: keys by place, as far as they are known.
        """
        held: dict[int, int] = {}
        for key, elements, _ in self._parts.values():
            held[key] = held.get(key, 0) + elements
        beyond = [place for place, (key, _, whole) in self._parts.items() if held[key] > whole]
        if not beyond:
            return "", ""
        named = next((names[place] for place in beyond if place in names), "one tensor")
        return (
            f"the parts of {named} that the ranks hold overlap: they have more elements than the whole.",
            "Say with resilience.shard which parts of a whole tensors are. Groups of a DistributedOptimizer that "
            "train one parameter (tied over pipeline stages) have to divide it alike.",
        )

    def conflict(self, differ: Collection[int], names: Mapping[int, str]) -> tuple[str, str]:
        """The same of parts at one place whose contents differ (`differ`: all places where they do)."""
        parts = sorted(place for place in differ if place & 1)
        if not parts:
            return "", ""
        named = [place for place in parts if place in names] or parts
        key = names.get(named[0], "one tensor")
        return (
            f"ranks {self.holders[named[0]]} hold the same part of {key} and differ in its bytes "
            f"({len(parts)} such parts).",
            "Replicas have diverged, or parts of a tensor were said to lie at the same place (resilience.shard).",
        )


def place_of(key: str, shape: tuple[int, ...], global_shape: tuple[int, ...], offsets: tuple[int, ...]) -> int:
    """Of what two ranks cannot have beside each other: one part, or the whole whatever its shape. Odd for a part."""
    part = shape != global_shape
    return _hash64(f"{key} {(shape, global_shape, offsets) if part else ''}".encode()) & ~1 | part


def claim_of(
    key: str, shape: tuple[int, ...], global_shape: tuple[int, ...], offsets: tuple[int, ...]
) -> tuple[int, int, int, int]:
    """What `Claims` wants to be told of a tensor that may join."""
    place = place_of(key, shape, global_shape, offsets)
    return place, _hash64(key.encode()), math.prod(shape), math.prod(global_shape)


def may_join(key: str, shape: tuple[int, ...], global_shape: tuple[int, ...]) -> bool:
    """Whether a rank's own tensor may be what others have too, or a part of what they have parts of."""
    return may_be_cut(key) or shape != global_shape


def _fail_with(said: tuple[str, str]) -> None:
    if said[0]:
        raise SaveFailedError(said[0], advice=said[1])


def _may_join(chunk: Chunk) -> bool:
    return chunk.per_rank and may_join(chunk.key, tuple(chunk.tensor.shape), tuple(chunk.global_shape))


def _place(chunk: Chunk) -> int:
    return place_of(chunk.key, tuple(chunk.tensor.shape), tuple(chunk.global_shape), tuple(chunk.offsets))


def _told(chunk: Chunk) -> tuple[int, int, int, int]:
    return claim_of(chunk.key, tuple(chunk.tensor.shape), tuple(chunk.global_shape), tuple(chunk.offsets))


def _content(chunk: Chunk) -> int:
    digest = xxhash.xxh3_128(f"{chunk.tensor.dtype} {tuple(chunk.tensor.shape)}".encode())
    digest.update(memory_of(chunk.tensor))
    return int.from_bytes(digest.digest()[:8], "little")


def _hash64(content: bytes) -> int:
    return int.from_bytes(xxhash.xxh3_128_digest(content)[:8], "little")


def _packed(numbers: Iterable[int]) -> bytes:
    return b"".join(number.to_bytes(8, "little") for number in numbers)


def _numbers(payload: bytes) -> list[int]:
    return [int.from_bytes(payload[start : start + 8], "little") for start in range(0, len(payload), 8)]
