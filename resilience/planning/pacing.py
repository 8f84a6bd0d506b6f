"""How is a shard sent under a cap of its rate: in pieces of which size, each when; and can it ever be enough?

The pieces are as small as an even flow needs and as large as the network likes: about four rounds of pieces a second.
Without a cap a piece is a whole segment of the digest.
"""

from __future__ import annotations

from typing import Final

__all__ = ["LARGEST_PIECE", "SMALLEST_PIECE", "falls_behind", "is_piece", "piece_bytes", "ready_at"]

LARGEST_PIECE: Final = 32 << 20  #: a segment of the digest
SMALLEST_PIECE: Final = 64 << 10
_MOST_PIECES: Final = 4096  # of one shard: each is a message that both sides keep
_ROUND_S: Final = 0.25


def piece_bytes(shard_bytes: int, holders: int, bytes_per_s: float | None) -> int:
    """The size of the pieces of one shard that goes to `holders`: a power of two that divides a segment."""
    piece = LARGEST_PIECE
    if bytes_per_s is None:
        return piece
    wished = max(SMALLEST_PIECE, shard_bytes / _MOST_PIECES, bytes_per_s * _ROUND_S / max(1, holders))
    while piece > SMALLEST_PIECE and piece // 2 >= wished:
        piece //= 2
    return piece


def is_piece(nbytes: int) -> bool:
    """Whether a peer's pieces may have that size."""
    return SMALLEST_PIECE <= nbytes <= LARGEST_PIECE and nbytes & (nbytes - 1) == 0


def ready_at(before: float, now: float, nbytes: int, bytes_per_s: float) -> float:
    """When the next `nbytes` may go, if the ones before were ready at `before`.

    A bucket that never holds anything: from any moment of rest on, no more has gone than the cap times the time.
    """
    return max(before, now) + nbytes / bytes_per_s


def falls_behind(shard_bytes: int, holders: int, bytes_per_s: float, every_s: float) -> str:
    """What to tell when a shard takes longer to replicate under the cap than saves are apart; "" if it does not."""
    needs_s = shard_bytes * holders / bytes_per_s
    if needs_s <= every_s:
        return ""
    return (
        f"replication_bytes_per_s of {bytes_per_s:g} lets {shard_bytes} bytes to {holders} holder(s) take "
        f"{needs_s:.3g} s, but saves are {every_s:.3g} s apart: replication cannot keep up, and saves will be skipped"
    )
