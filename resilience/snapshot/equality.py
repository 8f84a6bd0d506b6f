"""Whether what data parallelism is said to keep equal really is equal, and for which items.

When a layout is made, every candidate is hashed on every rank, streamed through a bounded buffer, and the hashes are
compared by one maximum over `[h, -h]` (equal exactly if both ends agree). At every later save a rotating share is
copied beside the snapshot and compared the same way in the background. Groups that hold the same part of the same
tensor (norms under tensor parallelism, embeddings tied over pipeline stages) compare theirs when a layout is made.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch
import xxhash

from resilience.planning.typed_json import from_json
from resilience.replication.communicator import Agreements
from resilience.snapshot.memory_copy import check_memory
from resilience.state.items import Item
from resilience.state.tensors import memory_of

__all__ = ["Across", "RotatingShare", "Sample", "agree_across", "agree_shared", "hash_tensor"]

_BUFFER_BYTES: Final = 32 << 20
_SHARE_BYTES: Final = 2 << 20


def agree_shared(items: Sequence[Item], group: Agreements) -> tuple[frozenset[str], frozenset[str]]:
    """Keys of the candidates that have equal bytes on all ranks of `group`, and of those that differ. Collective.

    Candidates that not all ranks have, or with other shapes, are in neither.
    """
    candidates = [item for item in items if item.replicated and item.alias_of is None]
    if group.size == 1:
        return frozenset(item.key for item in candidates), frozenset()
    names = [_hash64(_structure(item).encode()) for item in candidates]
    whole = _hash64(b"".join(name.to_bytes(8, "little") for name in names))
    high, low = group.maximum([whole, -whole])
    if high != -low:  # other structures somewhere (an optimizer that shards its state): only what all have
        common = set.intersection(*(_words(payload) for payload in group.gather(_pack(names))))
        candidates = [item for item, name in zip(candidates, names, strict=True) if name in common]
        candidates.sort(key=_structure)
    if not candidates:
        return frozenset(), frozenset()
    hashes = [hash_tensor(item.tensor) for item in candidates]
    keys = [item.key for item in candidates]
    equal = frozenset(_equal_keys(keys, hashes, group))
    return equal, frozenset(keys) - equal


_Keys = tuple[str, ...]


@dataclass(frozen=True)
class Across:
    """Keys of a group's shared items that another group has too: equal ones, those of these that the other writes, and
    those that differ."""

    common: frozenset[str] = frozenset()
    elsewhere: frozenset[str] = frozenset()
    differ: frozenset[str] = frozenset()


def agree_across(
    items: Sequence[Item], shared: frozenset[str], group: Agreements, leaders: Agreements | None
) -> Across:
    """Which of the group's shared items another group has too.

    An item that several groups have with equal bytes is left to the first of them. Collective over `group`, whose rank
    0 has `leaders` (the first ranks of all groups), the others None.
    """
    if leaders is None:
        answer = group.broadcast(None)
    else:
        # also what is no longer shared in this group: it must not be shared in another one then
        candidates = {_hash64(_structure(i).encode()): i for i in items if i.replicated and i.alias_of is None}
        holders: dict[int, list[int]] = {}
        for number, payload in enumerate(leaders.gather(_pack(list(candidates)))):
            for name in _numbers(payload):
                holders.setdefault(name, []).append(number)
        contested = [name for name in candidates if len(holders[name]) > 1]
        mine = [word for name in contested for word in (name, _mark(candidates[name], shared, leaders.rank))]
        contents: dict[int, set[int]] = {}
        for payload in leaders.gather(_pack(mine)):
            words = _numbers(payload)
            for name, content in zip(words[::2], words[1::2], strict=True):
                contents.setdefault(name, set()).add(content)
        common = shared & {candidates[name].key for name in contested}
        unlike = shared & {candidates[name].key for name in contested if len(contents[name]) > 1}
        left = shared & {candidates[name].key for name in contested if holders[name][0] != leaders.rank}
        answer = group.broadcast(
            json.dumps([sorted(each) for each in (common - unlike, left - unlike, unlike)]).encode()
        )
    common, elsewhere, differ = map(frozenset, from_json(tuple[_Keys, _Keys, _Keys], answer, "the leaders' comparison"))
    return Across(common, elsewhere, differ)


@dataclass(frozen=True)
class Sample:
    """The rotating share of one save: which keys, and their bytes once they are copied (equal layout on all ranks)."""

    keys: tuple[str, ...]
    copies: tuple[torch.Tensor, ...]

    def fingerprint(self) -> int:
        """63 bits over the copied bytes; equal on all ranks of the group as long as the shared items are."""
        return _hash64(b"".join(hash_tensor(copy).to_bytes(8, "little") for copy in self.copies))


class RotatingShare:
    """Picks, for each save, the next two megabytes of the shared items."""

    def __init__(self, items: Sequence[Item], shared: Collection[str]) -> None:
        self._parts = list(_parts(items, shared))

    @torch.no_grad()
    def choose(self, items: Sequence[Item], turn: int) -> tuple[Sample, list[tuple[torch.Tensor, torch.Tensor]]]:
        """Part number `turn` (modulo their count): room for it on the host, and what is to be copied there."""
        if not self._parts:
            return Sample((), ()), []
        chosen = self._parts[turn % len(self._parts)]
        sources = [items[position].tensor.detach().reshape(-1)[start:stop] for position, start, stop in chosen]
        copies = [torch.empty_like(source, device="cpu", pin_memory=source.is_cuda) for source in sources]
        sample = Sample(tuple(items[position].key for position, _, _ in chosen), tuple(copies))
        return sample, list(zip(copies, sources, strict=True))


def _parts(items: Sequence[Item], shared: Collection[str]) -> Iterator[list[tuple[int, int, int]]]:
    """Cut the shared items into parts of about `_SHARE_BYTES`: lists of (item, first element, last element)."""
    part: list[tuple[int, int, int]] = []
    room = _SHARE_BYTES
    for position, item in enumerate(items):
        if item.key not in shared or not item.tensor.is_contiguous():
            continue
        size, width = item.tensor.numel(), item.tensor.element_size()
        start = 0
        while start < size:
            stop = min(size, start + max(1, room // width))
            part.append((position, start, stop))
            room -= (stop - start) * width
            start = stop
            if room <= 0:
                yield part
                part, room = [], _SHARE_BYTES
    if part:
        yield part


def _mark(item: Item, shared: Collection[str], group_number: int) -> int:
    """Equal where the bytes are; of an item that is not shared in its group, nobody else's."""
    return hash_tensor(item.tensor) if item.key in shared else _hash64(f"{item.key} of {group_number}".encode())


def _equal_keys(keys: Sequence[str], hashes: Sequence[int], group: Agreements) -> list[str]:
    ends = group.maximum([*hashes, *(-value for value in hashes)])
    count = len(keys)
    return [key for position, key in enumerate(keys) if ends[position] == -ends[count + position]]


def _structure(item: Item) -> str:
    return f"{item.key} {item.tensor.dtype} {tuple(item.tensor.shape)} {item.global_shape} {item.offsets}"


def hash_tensor(tensor: torch.Tensor) -> int:
    """63 bits of xxh3-128 over the elements in order, through a buffer of bounded size.

    SaveFailedError where a tensor on the host has no memory.
    """
    if tensor.device.type == "cpu":
        check_memory(tensor)
    hasher = xxhash.xxh3_128()
    flat = tensor.detach().reshape(-1) if tensor.is_contiguous() else None
    if flat is not None and flat.device.type == "cpu":
        if flat.numel():
            hasher.update(memory_of(flat))
        return _fold(hasher.digest())
    rows = tensor.detach() if tensor.dim() else tensor.detach().reshape(1)
    step = max(1, _BUFFER_BYTES // max(1, rows[:1].numel() * rows.element_size())) if rows.numel() else 1
    for start in range(0, rows.shape[0], step):
        block = rows[start : start + step].contiguous().cpu().reshape(-1)
        if block.numel():
            hasher.update(block.view(torch.uint8).numpy().data)
    return _fold(hasher.digest())


def _fold(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "little") >> 1


def _hash64(content: bytes) -> int:
    return _fold(xxhash.xxh3_128_digest(content))


def _pack(values: Sequence[int]) -> bytes:
    return b"".join(value.to_bytes(8, "little") for value in values)


def _words(payload: bytes) -> set[int]:
    return set(_numbers(payload))


def _numbers(payload: bytes) -> list[int]:
    return [int.from_bytes(payload[start : start + 8], "little") for start in range(0, len(payload), 8)]
