"""What one snapshot is to become, and the snapshot itself on its way to the lanes."""

from __future__ import annotations

from dataclasses import dataclass, field

from resilience.replication.protection import SaveJob
from resilience.snapshot.arena import Arena
from resilience.snapshot.equality import Across
from resilience.state.items import Collected

__all__ = ["Snapshot", "Wish"]


@dataclass(frozen=True)
class Wish:
    """What one snapshot is to become."""

    on_nodes: bool = False
    to_global: bool = False
    persistent: bool = False

    @property
    def drain(self) -> bool:
        return self.to_global or self.persistent

    @property
    def any(self) -> bool:
        return self.on_nodes or self.drain


@dataclass(frozen=True)
class Snapshot:
    """An arena that is filled and sealed once `job.copy` is over, pinned once for each lane that reads it.

    `across`: what other data-parallel groups have too.
    """

    arena: Arena
    collected: Collected
    job: SaveJob
    across: Across = field(default_factory=Across)
