"""Which saves there are, one line each over all nodes and tiers: what `ls` shows and `prune` decides on. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from resilience.planning.copies import Holding, copy_table, holdings_of
from resilience.planning.history import History, abandonments, read_history
from resilience.planning.inventory import TIERS, AttemptLog, Inventory, SaveId, SharedSave, Tier
from resilience.planning.reasons import left_behind

__all__ = ["CatalogEntry", "catalog"]


@dataclass(frozen=True)
class CatalogEntry:
    """One save: all its copies on nodes together, or one folder on shared storage.

    `copies` is the minimum over owners; of an owner without a copy the shard can be rebuilt from parity if the save is
    complete: `rebuildable` counts those, `parity` the files that parity lies in. `nbytes` counts each owner's shard
    once, `held_bytes` every file. `where` names
    the node directories, or the shared source. `problem` says why a folder on shared storage is not resumed from;
    `abandoned` why nobody will go on from this save ("" if it counts). `world_size`, and with it the owners, is unknown
    (None) for a folder that another program wrote.
    """

    save: SaveId
    tier: Tier
    run_id: str | None
    world_size: int | None
    owners_present: int | None
    copies: int
    nbytes: int
    held_bytes: int
    complete: bool
    where: tuple[str, ...]
    problem: str = ""
    abandoned: str = ""
    rebuildable: int = 0
    parity: int = 0

    @property
    def on_nodes(self) -> bool:
        return self.tier in ("in_memory", "local")


def catalog(inventories: Sequence[Inventory]) -> list[CatalogEntry]:
    """All saves of all runs, newest first (in the order of election), each in every tier it lies in."""
    runs = {copies.run_id for each in inventories for copies in each.node_saves}
    runs |= {save.run_id for each in inventories for save in each.shared_saves if save.run_id}
    entries: list[CatalogEntry] = []
    for run_id in sorted(runs):
        history = read_history(inventories, run_id)
        entries += _of_run(inventories, run_id, history)
    entries += [_shared(save, {}) for each in inventories for save in each.shared_saves if save.run_id is None]
    return sorted(dict.fromkeys(entries), key=_newest_first)


def _newest_first(entry: CatalogEntry) -> tuple[int, int, str, int, str]:
    # the attempt by falling order too: its digits complemented
    attempt = entry.save.attempt.translate(_FALLING)
    return -entry.save.iteration, -entry.save.generation, attempt, TIERS.index(entry.tier), entry.run_id or ""


_FALLING = str.maketrans("0123456789abcdef", "fedcba9876543210")


def _of_run(inventories: Sequence[Inventory], run_id: str, history: History) -> Iterable[CatalogEntry]:
    of_run = [copies for each in inventories for copies in each.node_saves if copies.run_id == run_id]
    shared = [save for each in inventories for save in each.shared_saves if save.run_id == run_id]
    saves = {copies.save for copies in of_run} | {save.save for save in shared} | history.completed
    abandoned = abandonments(saves, history.attempts)
    for world_size in sorted({copies.world_size for copies in of_run}):
        for save, held in holdings_of(inventories, run_id, world_size).items():
            yield _on_nodes(save, run_id, world_size, held, abandoned)
    for found in shared:
        yield _shared(found, abandoned)


def _on_nodes(
    save: SaveId, run_id: str, world_size: int, held: tuple[Holding, ...], abandoned: Mapping[SaveId, AttemptLog]
) -> CatalogEntry:
    table = copy_table(save, held, world_size)
    complete = not table.missing
    cheapest = min((holding.copies.tier for holding in held), key=TIERS.index)
    return CatalogEntry(
        save=save,
        tier=table.tier() if complete else cheapest,
        run_id=run_id,
        world_size=world_size,
        owners_present=sum(1 for where in table.held_in if where),
        copies=min(len({(held[i].source, held[i].copies.node_id) for i in where}) for where in table.held_in),
        nbytes=sum(table.nbytes),
        held_bytes=sum(holding.copies.held_bytes for holding in held),
        complete=complete,
        where=tuple(dict.fromkeys(holding.copies.node_id for holding in held)),
        abandoned=left_behind(abandoned[save]) if save in abandoned else "",
        rebuildable=len(table.rebuilt_from),
        parity=sum(len(holding.copies.parity) for holding in held),
    )


def _shared(found: SharedSave, abandoned: Mapping[SaveId, AttemptLog]) -> CatalogEntry:
    complete = not found.problem
    newer = found.tracker is not None and found.save.iteration > found.tracker
    return CatalogEntry(
        save=found.save,
        tier=found.tier,
        run_id=found.run_id,
        world_size=found.world_size,
        owners_present=found.world_size if complete else None,
        copies=int(complete),
        nbytes=found.nbytes,
        held_bytes=found.nbytes,
        complete=complete,
        where=(found.source,),
        problem=found.problem or (f"the tracker names {found.tracker}" if newer else ""),
        abandoned=left_behind(abandoned[found.save]) if found.save in abandoned else "",
    )
