"""Arithmetic in GF(2^8) on whole buffers: bytes packed eight to a lane of 64 bits, so that numpy does the work.

Every call works on a whole piece (megabytes): numpy lets go of the interpreter lock for its length, and taking it back
may cost a switch interval each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt

__all__ = ["Bytes", "Combiner", "add", "as_bytes", "double"]

Bytes = npt.NDArray[np.uint8]
_Lanes = npt.NDArray[np.uint64]

_LANE: Final = 8
_ONES: Final = np.uint64(0x0101010101010101)
_UPPER_SEVEN: Final = np.uint64(0xFEFEFEFEFEFEFEFE)
_TOP: Final = np.uint64(7)
_ONE: Final = np.uint64(1)
_REDUCED: Final = np.uint64(0x1D)  # what 0x100 is, modulo the polynomial


def as_bytes(content: memoryview) -> Bytes:
    """A view; no copy."""
    return np.frombuffer(content, dtype=np.uint8)


def add(target: Bytes, source: Bytes) -> None:
    """`target` += `source` (XOR), in place; `source` may be shorter: it is taken to end in zeros."""
    whole = len(source) - len(source) % _LANE
    lanes = target[:whole].view(np.uint64)
    np.bitwise_xor(lanes, source[:whole].view(np.uint64), out=lanes)
    rest = target[whole : len(source)]
    np.bitwise_xor(rest, source[whole:], out=rest)


def double(target: Bytes, scratch: Bytes) -> None:
    """`target` *= 2, in place; a length of whole lanes. `scratch`: at least as long, overwritten."""
    lanes: _Lanes = target.view(np.uint64)
    carried: _Lanes = scratch[: len(target)].view(np.uint64)
    np.right_shift(lanes, _TOP, out=carried)
    np.bitwise_and(carried, _ONES, out=carried)  # 1 in each byte that overflows
    np.multiply(carried, _REDUCED, out=carried)
    np.left_shift(lanes, _ONE, out=lanes)
    np.bitwise_and(lanes, _UPPER_SEVEN, out=lanes)
    np.bitwise_xor(lanes, carried, out=lanes)


class Combiner:
    """Sums of pieces with coefficients. Reuses its buffers: what it returns holds until the next call."""

    def __init__(self, piece_bytes: int) -> None:
        self._sum = np.empty(piece_bytes, dtype=np.uint8)
        self._scratch = np.empty(piece_bytes, dtype=np.uint8)

    def combine(self, nbytes: int, parts: Sequence[tuple[int, Bytes]]) -> Bytes:
        """The sum of `coefficient * part`, `nbytes` long (whole lanes); parts may be shorter and end in zeros.

        Bit by bit of the coefficients, from the top: seven doublings at most, however many parts there are.
        """
        total = self._sum[:nbytes]
        total.fill(0)
        highest = max((coefficient.bit_length() for coefficient, _ in parts), default=0)
        for bit in reversed(range(highest)):
            if bit < highest - 1:
                double(total, self._scratch)
            for coefficient, part in parts:
                if coefficient >> bit & 1:
                    add(total, part)
        return total
