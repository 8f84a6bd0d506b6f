"""Which digest would a shard have that is rebuilt from files at hand? How `explain` foretells it. Free of torch."""

from __future__ import annotations

from collections.abc import Callable

from resilience.planning.pacing import ring_piece_bytes
from resilience.planning.rebuilding import Rebuild
from resilience.replication.lanes import Combiner, as_bytes
from resilience.stores.digest import SEGMENT_BYTES, SegmentedDigest, algorithm_of

__all__ = ["rebuilt_digest"]


def rebuilt_digest(rebuild: Rebuild, contents: Callable[[int, int, int], memoryview]) -> str:
    """Add up what `contents(source, start, stop)` gives, a segment of the digest at a time."""
    piece_bytes = ring_piece_bytes(rebuild.code, rebuild.stripe_bytes, None)
    combiner, digest = Combiner(piece_bytes), SegmentedDigest(algorithm_of(rebuild.digest))
    segment, filled = memoryview(bytearray(min(SEGMENT_BYTES, rebuild.nbytes))), 0
    for piece in rebuild.pieces(piece_bytes):
        parts = [(part.coefficient, as_bytes(contents(part.source, part.start, part.stop))) for part in piece.parts]
        left = combiner.combine(piece.sum_bytes, parts)[: piece.stop - piece.start].data
        while left:
            taken = min(len(left), len(segment) - filled)
            segment[filled : filled + taken] = left[:taken]
            left, filled = left[taken:], filled + taken
            if filled == len(segment):
                digest.add(segment)
                filled = 0
    if filled:
        digest.add(segment[:filled])
    return digest.value()
