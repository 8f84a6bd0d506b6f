"""Whether an overlapped copy has what the live tensors were at the boundary: a quick witness and a strict one.

torch counts the writes to a tensor that it knows of (`Tensor._version`). It does not know of all: fused optimizers,
`tensor.data.add_` and NumPy views write without being counted. So a few elements here and there are copied at the
boundary, and compared with what arrives: who writes to a good part of all tensors (weights that are exchanged for an
evaluation) is found at once. And now and then the bytes themselves are hashed: at the boundary, again before the
optimizer may change them, and once more in the arena.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Final, Protocol

import torch

from resilience.errors import SaveFailedError
from resilience.snapshot.equality import hash_tensor
from resilience.snapshot.memory_copy import is_block, read_block

__all__ = ["Observed", "Quick", "Strict"]

_PROBES: Final = 16  # of tensors that are looked at in each copy
_PROBE_ELEMENTS: Final = 16


class Observed(Protocol):
    """What is copied: numbered tensors, their names, and where the copy of each is to be."""

    @property
    def sources(self) -> Sequence[torch.Tensor]: ...
    def name(self, number: int) -> str: ...
    def view(self, number: int) -> torch.Tensor: ...


class Quick:
    """Counts of writes, and probes. Costs a fraction of a microsecond for each tensor, at both ends.

    `pairs` are to be copied at the boundary.
    """

    waits_for_join = False

    def __init__(self, observed: Observed, turn: int) -> None:
        """At the boundary; the sources are kept. `turn`: of which probes; other ones in each."""
        self._observed = observed
        self._seen = _counts(observed.sources)
        self._probes = _draw_probes(observed.sources, turn)
        self.pairs = [pair for probe in self._probes for pair in probe.pairs]

    def unchanged(self) -> str:
        now = _counts(self._observed.sources)
        if now == self._seen:
            return ""
        changed = [number for number, new in enumerate(now) if new != self._seen[number]]
        return _said(self._observed.name(changed[0]), len(changed))

    def agrees(self) -> str:
        changed = [probe.number for probe in self._probes if not probe.agrees(self._observed.view(probe.number))]
        return _said(self._observed.name(changed[0]), len(changed)) if changed else ""


class _Bytes:
    """A probe of a block of the host's memory: read at once."""

    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()

    def __init__(self, number: int, source: torch.Tensor, start: int, length: int) -> None:
        self.number, self.start, self._length = number, start, length
        self._kept = read_block(source, start, length)

    def agrees(self, copied: torch.Tensor) -> bool:
        return self._kept == read_block(copied, self.start, self._length)


class _Elements:
    """A probe of anything else: copied with what is copied at the boundary."""

    def __init__(self, number: int, source: torch.Tensor, start: int, length: int) -> None:
        self.number, self.start = number, start
        elements = source.reshape(-1)[start : start + length]
        self._kept = torch.empty_like(elements, device="cpu", pin_memory=elements.is_cuda)
        self.pairs = [(self._kept, elements)]

    def agrees(self, copied: torch.Tensor) -> bool:
        there = copied.reshape(-1)[self.start : self.start + self._kept.numel()]
        return torch.equal(self._kept.view(torch.uint8), there.view(torch.uint8))


def _draw_probes(sources: Sequence[torch.Tensor], turn: int) -> list[_Bytes | _Elements]:
    """A few elements of a few sources."""
    chance = random.Random(turn)
    found: list[_Bytes | _Elements] = []
    for number in chance.sample(range(len(sources)), min(_PROBES, len(sources))):
        source = sources[number]
        if source.is_contiguous() and source.numel():
            length = min(_PROBE_ELEMENTS, source.numel())
            start = chance.randrange(source.numel() - length + 1)
            found.append((_Bytes if is_block(source) else _Elements)(number, source, start, length))
    return found


class Strict:
    """Hashes of all bytes (xxh3). On the training thread at both ends: for one save of many."""

    waits_for_join = True
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]] = ()

    def __init__(self, observed: Observed) -> None:
        """At the boundary; what is observed is kept."""
        self._observed = observed
        self._seen = [hash_tensor(source) for source in observed.sources]

    def unchanged(self) -> str:
        return self._compare(self._observed.sources)

    def agrees(self) -> str:
        return self._compare([self._observed.view(number) for number in range(len(self._seen))])

    def _compare(self, tensors: Sequence[torch.Tensor]) -> str:
        changed = [number for number, each in enumerate(tensors) if _hash_now(each) != self._seen[number]]
        return _said(self._observed.name(changed[0]), len(changed)) if changed else ""


def _hash_now(tensor: torch.Tensor) -> int | None:
    """None if it lost its memory: that is a change like another, and no error of whoever asks."""
    try:
        return hash_tensor(tensor)
    except SaveFailedError:
        return None


def _counts(sources: Sequence[torch.Tensor]) -> list[int]:
    try:
        return [source._version for source in sources]
    except RuntimeError:  # what was made in inference mode has no count, and is not trained
        return [0 if source.is_inference() else source._version for source in sources]


def _said(first: str, count: int) -> str:
    more = f" and {count - 1} more" if count > 1 else ""
    return f"{first}{more} changed between the boundary and the optimizer's next step"
