"""Whether an overlapped copy has what the live tensors were at the boundary: two witnesses, a quick and a strict one.

torch counts the writes to a tensor that it knows of (`Tensor._version`). It does not know of all: fused optimizers,
`tensor.data.add_` and NumPy views write without being counted. So now and then the bytes themselves are hashed: at the
boundary, again before the optimizer may change them, and once more in the arena.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from resilience.snapshot.equality import hash_tensor

__all__ = ["Contents", "Versions"]

#: The key of a source, by its number.
Name = Callable[[int], str]


class Versions:
    """Counts of writes. Costs a fraction of a microsecond for each tensor, at both ends."""

    waits_for_join = False

    def __init__(self, name: Name, sources: Sequence[torch.Tensor]) -> None:
        """At the boundary; the sources are kept."""
        self._name = name
        self._sources = sources
        self._seen = _counts(sources)

    def unchanged(self) -> str:
        now = _counts(self._sources)
        if now == self._seen:
            return ""
        changed = [number for number, new in enumerate(now) if new != self._seen[number]]
        return _said(self._name(changed[0]), len(changed))

    def agrees(self) -> str:
        return ""


class Contents:
    """Hashes of all bytes (xxh3). On the training thread at both ends: for one save of many."""

    waits_for_join = True

    def __init__(self, name: Name, sources: Sequence[torch.Tensor], views: Sequence[torch.Tensor]) -> None:
        """At the boundary; sources and `views`, where the copies of them are to be, are kept."""
        self._name = name
        self._sources = sources
        self._views = views
        self._seen = [hash_tensor(source) for source in sources]

    def unchanged(self) -> str:
        return self._compare(self._sources)

    def agrees(self) -> str:
        return self._compare(self._views)

    def _compare(self, tensors: Sequence[torch.Tensor]) -> str:
        changed = [number for number, each in enumerate(tensors) if hash_tensor(each) != self._seen[number]]
        return _said(self._name(changed[0]), len(changed)) if changed else ""


def _counts(sources: Sequence[torch.Tensor]) -> list[int]:
    try:
        return [source._version for source in sources]
    except RuntimeError:  # what was made in inference mode has no count, and is not trained
        return [0 if source.is_inference() else source._version for source in sources]


def _said(first: str, count: int) -> str:
    more = f" and {count - 1} more" if count > 1 else ""
    return f"{first}{more} changed between the boundary and the optimizer's next step"
