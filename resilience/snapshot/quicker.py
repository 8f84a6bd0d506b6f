"""Which of two ways to copy blocks is the quicker one here, found out on what has to be copied anyway."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import sqrt
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["Addresses", "CopyBlocks", "Quicker"]

#: Addresses, or numbers of bytes, one for each block.
Addresses = npt.NDArray[np.uint64]
#: Given targets, origins and numbers of bytes: arrays of one length.
CopyBlocks = Callable[[Addresses, Addresses, Addresses], None]

_TRIALS: Final = 6  # two make a pair, in which the ways change places
_PART: Final = 8  # of each trial's bytes an eighth is copied in either way, and timed
_LEAST_BYTES: Final = 8 << 20  # of a trial: with less, it is told little by its parts
_CLEARLY: Final = 1.05


class Quicker:
    """Copies in the way `usual`, unless `other` turns out to be clearly quicker.

    Processors differ: one with few buffers for its stores may be slower around its cache than through it. The first
    copies of a process, which wait for new pages, make no difference: both ways meet as many.
    """

    def __init__(self, usual: CopyBlocks, other: CopyBlocks, now_ns: Callable[[], int] = time.perf_counter_ns) -> None:
        self._usual = self._way = usual
        self._other = other
        self._now_ns = now_ns
        self._ratios: list[float] = []  # of the usual way's time for a byte to the other's
        self.decided = False

    def copy(self, targets: Addresses, origins: Addresses, sizes: Addresses) -> None:
        """Any thread, and two at a time: then one trial more is made than is looked at."""
        parts = [] if self.decided else _parts(sizes)
        if not parts:
            self._way(targets, origins, sizes)
            return
        rest = parts.pop()
        if len(self._ratios) % 2:  # blocks at one end may be other ones than at the next: small, or in new pages
            parts.reverse()
        paces = []
        for way, part in zip((self._usual, self._other), parts, strict=True):
            began = self._now_ns()
            way(targets[part], origins[part], sizes[part])
            paces.append((self._now_ns() - began) / int(sizes[part].sum()))
        self._usual(targets[rest], origins[rest], sizes[rest])
        self._learn(paces[0] / max(paces[1], 1e-9))

    def _learn(self, ratio: float) -> None:
        self._ratios.append(ratio)
        if len(self._ratios) >= _TRIALS and not self.decided:
            one_way, other_way = self._ratios[:_TRIALS:2], self._ratios[1:_TRIALS:2]
            pairs = [sqrt(one * other) for one, other in zip(one_way, other_way, strict=True)]
            _, middle, _ = sorted(pairs)
            self._way = self._other if middle > _CLEARLY else self._usual
            self.decided = True


def _parts(sizes: Addresses) -> list[slice]:
    """An eighth of the bytes, another one, and the rest; none where there are too few blocks or bytes for that."""
    ends = np.cumsum(sizes)
    total = int(ends[-1]) if len(ends) else 0
    bounds = np.array([total // _PART, 2 * total // _PART], np.uint64)
    first, second = np.searchsorted(ends, bounds, "right").tolist()
    if total < _LEAST_BYTES or not 0 < first < second:
        return []
    return [slice(0, first), slice(first, second), slice(second, None)]
