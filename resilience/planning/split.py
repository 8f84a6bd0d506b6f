"""How what is replicated is divided evenly over the ranks of a data-parallel group.

The items are laid end to end and the whole is cut into equal parts at row boundaries, so that one huge item (an
embedding) is shared like everything else. Pure: every rank computes the same cut.
"""

from __future__ import annotations

from collections.abc import Sequence

Piece = tuple[int, int, int]  # item, first row, row after the last


def split_rows(items: Sequence[tuple[int, int]], parts: int) -> list[list[Piece]]:
    """Give each part the rows that begin in its share [p·T/parts, (p+1)·T/parts) of the T bytes.

    `items` are (rows, row_bytes). Every row is covered exactly once, and no part differs from T/parts by more than the
    largest row. Items without bytes go to part 0 whole, so that they are stored too.
    """
    assert parts >= 1, "a group has at least one rank"
    total = sum(rows * row_bytes for rows, row_bytes in items)
    pieces: list[list[Piece]] = [[] for _ in range(parts)]
    start = 0
    for item, (rows, row_bytes) in enumerate(items):
        size = rows * row_bytes
        if size == 0:
            pieces[0].append((item, 0, rows))
            continue
        part, row = start * parts // total, 0
        while row < rows:
            # The part ends before the first row that begins at or beyond (part + 1) · total / parts; all in integers.
            beyond = (part + 1) * total - start * parts
            stop = min(rows, -(-beyond // (row_bytes * parts)))
            if stop > row:
                pieces[part].append((item, row, stop))
                row = stop
            part += 1
        start += size
    return pieces
