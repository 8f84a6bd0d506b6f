"""Which files of a save that a node keeps one of its ranks is in charge of: the one that will delete them one day."""

from __future__ import annotations

from resilience.assembly import Start
from resilience.planning.inventory import Kept, SaveId
from resilience.stores.keeper import ShardKeeper

__all__ = ["in_charge_of"]


def in_charge_of(start: Start, keeper: ShardKeeper, save: SaveId) -> list[Kept]:
    """This rank's own, and what it holds for others.

    The node's leader takes what nobody on the node is responsible for any more, because ranks moved.
    """
    job = start.job
    there = keeper.store.reader.kept_of(save)
    claimed = {kept for rank in job.node_ranks for kept in _kept_by(start, rank)}
    mine = _kept_by(start, job.rank)
    return [kept for kept in there if kept in mine or (job.leads_node and kept not in claimed)]


def _kept_by(start: Start, rank: int) -> set[Kept]:
    """What a rank keeps of each save, by name."""
    nothing = [0] * start.job.world_size  # sizes, which do not matter here
    return {rank, *start.scheme.files(start.topology, rank, nothing)}
