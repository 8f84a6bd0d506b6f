"""How ranks that need the same regions of a checkpoint read each of them once and give it to each other.

    1. ask       every rank tells the group which regions it needs
    2. deal      each region goes to the least loaded of those that need it: the same answer everywhere, no exchange
    3. read      every rank reads what fell to it
    4. exchange  in rounds of bounded size, until every rank has all of its own

A rank that fails says so before the next step, so that nobody waits for it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import torch

from resilience.errors import CorruptCopyError
from resilience.formats.protocol import StateReader, Target
from resilience.planning.typed_json import from_json
from resilience.replication.communicator import Agreements, PeerFailedError

__all__ = ["PeerFailedError", "Region", "agree", "deal", "read_together"]

_ROUND_BYTES = 64 << 20  # what all members together send in one round
_LEAST_BYTES = 1 << 20  # of one member in one round: below that, rounds cost more than they carry


@dataclass(frozen=True, order=True)
class Region:
    """A part of a tensor that a rank needs, as `dtype`."""

    key: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, target: Target) -> Region:
        return cls(
            target.key, tuple(target.offsets), tuple(target.out.shape), str(target.out.dtype).removeprefix("torch.")
        )

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * int(getattr(torch, self.dtype).itemsize)


def deal(asked: Sequence[Sequence[Region]]) -> dict[Region, int]:
    """Which member reads a region, given what each one asks for. Pure; equal on all members.

    As Megatron Core deals: what few have comes first, then what is large, each to the least loaded that asks for it.
    """
    holders: dict[Region, list[int]] = {}
    for member, regions in enumerate(asked):
        for region in dict.fromkeys(regions):
            holders.setdefault(region, []).append(member)
    load = [0] * len(asked)
    dealt: dict[Region, int] = {}
    for region in sorted(holders, key=lambda region: (len(holders[region]), -region.nbytes, region)):
        reader = min(holders[region], key=lambda member: (load[member], member))
        dealt[region] = reader
        load[reader] += region.nbytes
    return dealt


def agree(group: Agreements, problem: Exception | None) -> None:
    """Raise `problem`, or PeerFailedError if another member has one. Collective."""
    failed = group.maximum([int(problem is not None)])[0]
    if problem is not None:
        raise problem
    if failed:
        raise PeerFailedError("another rank could not load its part of the checkpoint.")


def read_together(reader: StateReader, targets: Sequence[Target], group: Agreements) -> None:
    """Fill the targets of all members; see `CheckpointReader.read`. Collective over `group`.

    What a member alone needs it reads alone. PeerFailedError if another member could not read what fell to it.
    """
    mine = {Region.of(target): target for target in targets}
    told = group.gather(json.dumps([asdict(region) for region in mine]).encode())
    asked = [list(from_json(tuple[Region, ...], payload, "what a rank wants to load")) for payload in told]
    dealt = deal(asked)
    problem: Exception | None = None
    try:
        reader.read([target for region, target in mine.items() if dealt[region] == group.rank])
    except Exception as error:  # noqa: BLE001  (whatever it was: the others must hear of it, or they wait for us)
        problem = error
    agree(group, problem)
    streams: list[list[Region]] = [[] for _ in asked]
    for region in sorted(region for region in dealt if sum(region in regions for regions in map(set, asked)) > 1):
        streams[dealt[region]].append(region)
    _exchange(streams, mine, group)


def _exchange(streams: Sequence[Sequence[Region]], mine: dict[Region, Target], group: Agreements) -> None:
    """Send this member's stream, and put those of the others where they belong."""
    sizes = [sum(region.nbytes for region in stream) for stream in streams]
    piece = max(_LEAST_BYTES, _ROUND_BYTES // group.size)
    for start in range(0, max(sizes, default=0), piece):
        out = b"".join(bytes(part) for _, part in _parts(streams[group.rank], mine, start, start + piece))
        for member, content in enumerate(group.gather(out)):
            if len(content) != max(0, min(sizes[member] - start, piece)):
                raise CorruptCopyError(f"Member {member} sent {len(content)} bytes of the checkpoint's tensors.")
            if member != group.rank:
                for at, into in _parts(streams[member], mine, start, start + piece):
                    into[:] = memoryview(content)[at - start : at - start + len(into)]


def _parts(
    stream: Sequence[Region], mine: dict[Region, Target], start: int, stop: int
) -> Iterator[tuple[int, memoryview]]:
    """`(position in the stream, bytes)` of this member's tensors that lie between two positions of a stream."""
    at = 0
    for region in stream:
        low, high = max(start, at), min(stop, at + region.nbytes)
        if low < high and region in mine:
            content = mine[region].out.reshape(-1).view(torch.uint8).numpy().data
            yield low, content[low - at : high - at]
        at += region.nbytes
