"""How saves stand on this rank, in the words of a report."""

from __future__ import annotations

from typing import Literal

from resilience.planning.book import drain_slot
from resilience.planning.inventory import SaveId, Tier
from resilience.replication.protection import Board
from resilience.reports import SaveReport
from resilience.saving.wish import Wish

__all__ = ["error_of", "report_of", "state_of"]


def state_of(board: Board, save: SaveId, wish: Wish, problem: str) -> str:
    """Where a save stands. `problem`: why there is no snapshot, "" if there is one."""
    if problem:
        return "failed"
    reports = board.reports([drain_slot(save)] if wish.drain and not wish.on_nodes else [save])
    if not reports or not reports[0].settled:
        return "pending"
    if reports[0].failed:
        return "failed"
    return "persistent" if wish.persistent and not wish.on_nodes else reports[0].progress


def error_of(board: Board, save: SaveId) -> str:
    """Why it failed here, on nodes or on its way to shared storage; "" if it did not."""
    return board.error(save) or board.error(drain_slot(save))


def report_of(save: SaveId, wish: Wish, node_tier: Tier, stall_s: float, state: str) -> SaveReport:
    """`node_tier`: where saves on nodes lie."""
    tiers: list[Tier] = [node_tier] if wish.on_nodes else []
    tiers += ["global"] if wish.to_global else []
    tiers += ["persistent"] if wish.persistent else []
    non_persistent = wish.on_nodes or wish.to_global
    kind: Literal["persistent", "non_persistent", "both"] = "non_persistent" if non_persistent else "persistent"
    if wish.persistent and non_persistent:
        kind = "both"
    return SaveReport(kind, save.iteration, save.generation, tuple(tiers), stall_s, state, 0)
