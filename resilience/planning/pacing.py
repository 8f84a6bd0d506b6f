"""How is a shard sent under a cap of its rate: in pieces of which size, each when; and can it ever be enough?

The pieces are as small as an even flow needs and as large as the network likes: about four rounds of pieces a second.
Without a cap a piece is a whole segment of the digest.
"""

from __future__ import annotations

from typing import Final

from resilience.planning.erasure import Code

__all__ = [
    "LARGEST_PIECE",
    "SMALLEST_PIECE",
    "falls_behind",
    "is_piece",
    "piece_bytes",
    "ready_at",
    "ring_buffer_bytes",
    "ring_buffers",
    "ring_piece_bytes",
]

LARGEST_PIECE: Final = 32 << 20  #: a segment of the digest
SMALLEST_PIECE: Final = 64 << 10
_MOST_PIECES: Final = 4096  # of one shard: each is a message that both sides keep
_ROUND_S: Final = 0.25
_RING_BUFFERS: Final = 64 << 20  # of one rank


def piece_bytes(shard_bytes: int, holders: int, bytes_per_s: float | None) -> int:
    """The size of the pieces of one shard that goes to `holders`: a power of two that divides a segment."""
    piece = LARGEST_PIECE
    if bytes_per_s is None:
        return piece
    wished = max(SMALLEST_PIECE, shard_bytes / _MOST_PIECES, bytes_per_s * _ROUND_S / max(1, holders))
    while piece > SMALLEST_PIECE and piece // 2 >= wished:
        piece //= 2
    return piece


def ring_piece_bytes(code: Code, stripe_bytes: int, bytes_per_s: float | None) -> int:
    """The size of the pieces in which a clique's partial sums go around; equal on all its members."""
    piece = piece_bytes(stripe_bytes, code.data * code.parities, bytes_per_s)
    while piece > SMALLEST_PIECE and 2 * ring_buffers(code) * piece > _RING_BUFFERS:
        piece //= 2
    return piece


def ring_buffers(code: Code) -> int:
    """Pieces that one round of the ring holds on a member: its own stripe, partial sums, and the parity it keeps."""
    return 1 + code.data * code.parities


def ring_buffer_bytes(code: Code) -> int:
    """What a member's buffers take: two rounds, since one is filled while the other is worked on."""
    return 2 * ring_buffers(code) * ring_piece_bytes(code, 1 << 60, None)


def is_piece(nbytes: int) -> bool:
    """Whether a peer's pieces may have that size."""
    return SMALLEST_PIECE <= nbytes <= LARGEST_PIECE and nbytes & (nbytes - 1) == 0


def ready_at(before: float, now: float, nbytes: int, bytes_per_s: float) -> float:
    """When the next `nbytes` may go, if the ones before were ready at `before`.

    A bucket that never holds anything: from any moment of rest on, no more has gone than the cap times the time.
    """
    return max(before, now) + nbytes / bytes_per_s


def falls_behind(sent_bytes: int, bytes_per_s: float, every_s: float) -> str:
    """What to tell when what is sent for a save takes longer under the cap than saves are apart; "" if it does not."""
    needs_s = sent_bytes / bytes_per_s
    if needs_s <= every_s:
        return ""
    return (
        f"replication_bytes_per_s of {bytes_per_s:g} lets the {sent_bytes} bytes that this rank sends for a save take "
        f"{needs_s:.3g} s, but saves are {every_s:.3g} s apart: replication cannot keep up, and saves will be skipped"
    )
