"""Which saves may be deleted now: a decision of the whole job that names saves, made from agreed states only.

Two saves are never deleted: the newest complete one and the newest protected one, newest in the order of election.
Abandoned saves count for nothing. A save that is still being made is left alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from resilience.planning.inventory import SaveId

Progress = Literal["pending", "primary", "protected", "failed"]


@dataclass(frozen=True)
class SaveState:
    """One non-persistent save as all ranks agree on it; `nbytes` over the whole job, for what is told to people."""

    save: SaveId
    progress: Progress
    nbytes: int = 0


def deletable(
    saves: Sequence[SaveState],
    *,
    keep_last: int,
    need_one: bool = False,
    abandoned: Collection[SaveId] = (),
) -> tuple[SaveId, ...]:
    """Non-persistent saves to delete now, oldest first.

    Failed and abandoned saves go, and everything older than the `keep_last`-th newest protected save. With `need_one`
    (no arena is free) and nothing else to delete, the oldest save that is not one of the two untouchable ones goes
    even below `keep_last`; an empty answer then means that this save must be skipped.
    """
    counted = sorted((s for s in saves if s.save not in abandoned), key=lambda state: state.save, reverse=True)
    complete = [state.save for state in counted if state.progress in ("primary", "protected")]
    protected = [state.save for state in counted if state.progress == "protected"]
    untouchable = {*complete[:1], *protected[:1]}
    gone = {s.save for s in saves if s.progress == "failed" or (s.save in abandoned and s.progress != "pending")}
    if len(protected) >= keep_last:
        oldest_kept = protected[max(keep_last, 1) - 1]
        gone |= {save for save in complete if save < oldest_kept}
    if need_one and not gone:
        gone = set([save for save in complete if save not in untouchable][-1:])
    return tuple(sorted(gone))
