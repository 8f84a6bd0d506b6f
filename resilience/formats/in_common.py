"""Whether what several data-parallel groups hold in common is still equal, at each save: one group writes it for all.

Each rank has some rows of it, cut otherwise in each group. So the bytes are summed up, each word times a number that
its place in the item gives: the sums of a group's rows add up to that of the item, however they are cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch
import xxhash

from resilience.errors import SaveFailedError
from resilience.replication.communicator import Agreements
from resilience.snapshot.layout import Piece
from resilience.state.tensors import memory_of
from resilience.stores.shard_file import SavedPiece

__all__ = ["check_in_common", "place_sum", "sum_of"]

_BLOCK_WORDS = 1 << 20
_MASK = (1 << 64) - 1
_ODD = np.uint64(0x9E3779B97F4A7C15)


def check_in_common(pieces: Iterable[tuple[Piece, torch.Tensor]], group_number: int, everyone: Agreements) -> None:
    """SaveFailedError on all ranks unless all groups have the same. Collective over all ranks of the save.

    `pieces`: this rank's rows of what its group has in common with others, each row on one rank of the group.
    """
    mine: dict[int, int] = {}
    keys: dict[int, str] = {}
    for piece, tensor in pieces:
        place = _place(piece)
        keys[place] = piece.key
        mine[place] = (mine.get(place, 0) + place_sum(piece, tensor)) & _MASK
    totals: dict[int, dict[int, int]] = {}
    for payload in everyone.gather(_packed(group_number, mine)):
        numbers = [int.from_bytes(payload[at : at + 8], "little") for at in range(0, len(payload), 8)]
        for place, total in zip(numbers[1::2], numbers[2::2], strict=True):
            groups = totals.setdefault(place, {})
            groups[numbers[0]] = (groups.get(numbers[0], 0) + total) & _MASK
    differ = [place for place, groups in totals.items() if len(set(groups.values())) > 1]
    if differ:
        named = [keys[place] for place in differ if place in keys]
        raise SaveFailedError(
            f"{len(differ)} items that several groups of ranks had alike differ between them now"
            + (f": {', '.join(sorted(named)[:10])}." if named else ".")
        )


def place_sum(piece: Piece | SavedPiece, tensor: torch.Tensor) -> int:
    """The piece's share of the sum over its item, modulo 2^64."""
    content = np.frombuffer(memory_of(tensor), np.uint8)
    row_bytes = content.nbytes // max(1, piece.shape[0]) if piece.shape else content.nbytes
    before = row_bytes * (piece.offsets[0] - piece.rows[0]) if piece.rows else 0
    words = content.view(np.uint64) if row_bytes % 8 == 0 else content
    first, total = before // words.itemsize, 0
    for start in range(0, len(words), _BLOCK_WORDS):
        block = words[start : start + _BLOCK_WORDS].astype(np.uint64)
        at = np.arange(first + start, first + start + len(block), dtype=np.uint64)
        total += int(((at * _ODD | np.uint64(1)) * (block + np.uint64(1))).sum(dtype=np.uint64))
    return total & _MASK


def sum_of(shares: Iterable[int]) -> int:
    """That of an item, given those of pieces that make it up."""
    return sum(shares) & _MASK


def _place(piece: Piece) -> int:
    """Which part of which tensor the item is that the piece is of."""
    if piece.rows:
        box = ((piece.rows[0], *piece.offsets[1:]), (piece.rows[1], *piece.shape[1:]))
    else:
        box = (piece.offsets, piece.shape)
    described = f"{piece.key} {piece.dtype} {piece.global_shape} {box}".encode()
    return int.from_bytes(xxhash.xxh3_128_digest(described)[:8], "little")


def _packed(group_number: int, sums: Mapping[int, int]) -> bytes:
    numbers = [group_number, *(number for pair in sums.items() for number in pair)]
    return b"".join(number.to_bytes(8, "little") for number in numbers)
