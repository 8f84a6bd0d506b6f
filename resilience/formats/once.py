"""Who writes what several ranks have: the lowest of them, if they have it alike."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import xxhash

from resilience.errors import SaveFailedError
from resilience.formats.protocol import Chunk
from resilience.replication.communicator import Agreements
from resilience.state.sharding import may_be_cut
from resilience.state.tensors import byte_view

__all__ = ["once"]


def once(chunks: Sequence[Chunk], group: Agreements) -> list[Chunk]:
    """The same chunks, but what several ranks have as their own and alike, the lowest of them has alone, for all.

    That is how experts, and shards of FSDP, that data parallelism repeats are written once. What only one rank has, or
    all have alike, becomes a part of the whole. Of what is whole and differs, each rank keeps its own. SaveFailedError
    on all ranks if two have different bytes for one part of a whole, or parts that overlap. Collective over all ranks.
    """
    mine = {_place(chunk): chunk for chunk in chunks if _may_join(chunk)}
    holders: dict[int, list[int]] = {}
    parts: dict[int, tuple[int, int, int]] = {}
    for rank, payload in enumerate(group.gather(_packed(word for each in mine.items() for word in _told(*each)))):
        words = _numbers(payload)
        for place, key, elements, whole in zip(words[::4], words[1::4], words[2::4], words[3::4], strict=True):
            holders.setdefault(place, []).append(rank)
            if place & 1:
                parts[place] = key, elements, whole
    _refuse_overlaps(parts, mine)
    contested = [place for place in mine if len(holders[place]) > 1]
    contents: dict[int, set[int]] = {}
    for payload in group.gather(_packed(word for place in contested for word in (place, _content(mine[place])))):
        words = _numbers(payload)
        for place, content in zip(words[::2], words[1::2], strict=True):
            contents.setdefault(place, set()).add(content)
    differ = {place for place, found in contents.items() if len(found) > 1}
    _refuse_parts_that_differ(differ, holders, mine)
    kept = [chunk for place, chunk in mine.items() if place in differ]
    kept += [chunk for chunk in chunks if not _may_join(chunk)]
    for place, chunk in mine.items():
        if place not in differ and holders[place][0] == group.rank:
            kept.append(replace(chunk, per_rank=False))
    return kept


def _refuse_overlaps(parts: Mapping[int, tuple[int, int, int]], mine: Mapping[int, Chunk]) -> None:
    """Parts that make up more than their whole: nobody could say which of them counts. `parts`: place → key, elements,
    elements of the whole."""
    held: dict[int, int] = {}
    for key, elements, _ in parts.values():
        held[key] = held.get(key, 0) + elements
    beyond = [place for place, (key, _, whole) in parts.items() if held[key] > whole]
    if not beyond:
        return
    named = next((mine[place].key for place in beyond if place in mine), "one tensor")
    raise SaveFailedError(
        f"the parts of {named} that the ranks hold overlap: they have more elements than the whole.",
        advice="Say with resilience.shard which parts of a whole tensors are. Groups of a DistributedOptimizer that "
        "train one parameter (tied over pipeline stages) have to divide it alike.",
    )


def _refuse_parts_that_differ(
    differ: Collection[int], holders: Mapping[int, Sequence[int]], mine: Mapping[int, Chunk]
) -> None:
    parts = sorted(place for place in differ if place & 1)
    if not parts:
        return
    named = [place for place in parts if place in mine] or parts
    key = mine[named[0]].key if named[0] in mine else "one tensor"
    raise SaveFailedError(
        f"ranks {holders[named[0]]} hold the same part of {key} and differ in its bytes ({len(parts)} such parts).",
        advice="Replicas have diverged, or parts of a tensor were said to lie at the same place (resilience.shard).",
    )


def _may_join(chunk: Chunk) -> bool:
    """Whether a rank's own chunk may be what others have too, or a part of what they have parts of."""
    return chunk.per_rank and (may_be_cut(chunk.key) or _is_part(chunk))


def _is_part(chunk: Chunk) -> bool:
    return tuple(chunk.tensor.shape) != tuple(chunk.global_shape)


def _place(chunk: Chunk) -> int:
    """Of what two ranks cannot have beside each other: one part, or the whole whatever its shape. Odd for a part."""
    part = (tuple(chunk.tensor.shape), tuple(chunk.global_shape), tuple(chunk.offsets)) if _is_part(chunk) else ""
    return _hash64(f"{chunk.key} {part}".encode()) & ~1 | _is_part(chunk)


def _told(place: int, chunk: Chunk) -> tuple[int, int, int, int]:
    return place, _hash64(chunk.key.encode()), chunk.tensor.numel(), math.prod(chunk.global_shape)


def _content(chunk: Chunk) -> int:
    digest = xxhash.xxh3_128(f"{chunk.tensor.dtype} {tuple(chunk.tensor.shape)}".encode())
    digest.update(byte_view(chunk.tensor).numpy().data)
    return int.from_bytes(digest.digest()[:8], "little")


def _hash64(content: bytes) -> int:
    return int.from_bytes(xxhash.xxh3_128_digest(content)[:8], "little")


def _packed(numbers: Iterable[int]) -> bytes:
    return b"".join(number.to_bytes(8, "little") for number in numbers)


def _numbers(payload: bytes) -> list[int]:
    return [int.from_bytes(payload[start : start + 8], "little") for start in range(0, len(payload), 8)]
