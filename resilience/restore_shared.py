"""Shared storage at a start: who owns `save`, what lies in each directory, and how a checkpoint there is opened.

The leader looks and claims; the files of the elected checkpoint are held against their digests, shared out over the
ranks, before any of them reads what it needs (`restore_staging`).
"""

from __future__ import annotations

import heapq
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from resilience.config import CheckpointConfig
from resilience.errors import ResilienceError, StoreError
from resilience.formats.directory import read_digests
from resilience.formats.load import find_checkpoint
from resilience.formats.protocol import CheckpointReader
from resilience.formats.registry import foreign_problem, open_checkpoint
from resilience.planning.decision import Candidate, Strike
from resilience.planning.inventory import Inventory
from resilience.planning.patience import STALL_BOUNDS
from resilience.reports import Resume
from resilience.restore_staging import Peers, Stager
from resilience.runtime.bounded_calls import BoundedCalls
from resilience.state.training_state import TrainingState
from resilience.stores.filesystem import FileSystem
from resilience.stores.healed import healed
from resilience.stores.shared_store import SharedStore

__all__ = ["SharedLoader"]


@dataclass
class SharedLoader:
    """The directories on shared storage that the configuration names."""

    checkpoint: CheckpointConfig
    fs: FileSystem
    rank: int
    world_size: int
    verify: bool
    tell: Callable[..., None]
    calls: BoundedCalls
    peers: Peers = field(default_factory=Peers)
    stores: dict[str, SharedStore] = field(default_factory=dict)
    _claimed: bool = False

    def __post_init__(self) -> None:
        config = self.checkpoint
        for source, path in (
            ("save", config.save),
            ("load", config.load),
            ("pretrained", config.pretrained_checkpoint),
        ):
            same = source == "load" and config.save and path and self._same(path, config.save)
            if path is not None and not (same and config.ckpt_step is None):
                self._add(source, Path(path))
        if config.non_persistent_ckpt_type == "global":
            default = Path(config.save or ".") / "non_persistent"
            self._add("global", Path(config.non_persistent_global_ckpt_dir or default))

    def _same(self, one: str, other: str) -> bool:
        if os.path.abspath(one) == os.path.abspath(other):
            return True
        return self.calls.call(f"{one} or {other}", lambda: Path(one).resolve() == Path(other).resolve())

    def _add(self, source: str, root: Path) -> None:
        self.stores[source] = SharedStore(root, self.fs, source=source, foreign_problem=foreign_problem)  # type: ignore[arg-type]

    def inventories(self, run_id: str) -> list[Inventory]:
        """The leader's look at every directory; one that does not answer is unknown."""
        return [self._look(store, run_id) for store in self.stores.values()]

    def _look(self, store: SharedStore, run_id: str) -> Inventory:
        try:
            return self.calls.call(str(store.root), lambda: store.inventory(run_id))
        except StoreError as error:
            return Inventory(store.source, unknown=str(error).rstrip("."))

    def inventories_after_heal(self, run_id: str) -> list[Inventory]:
        """The directories as `claim` would leave them, if that changed anything; else none. Only looks."""
        if self._claimed:
            return []
        views = dict(self.stores)
        for source in ("save", "global"):
            try:
                if source in views:
                    views[source] = self.calls.call(str(views[source].root), partial(_as_healed, views[source]))
            except OSError as error:  # its inventory says that it cannot be read
                self.tell("warning", what=f"{source}: {error}", advice="")
        return [self._look(store, run_id) for store in views.values()] if views != self.stores else []

    def claim(self, run_id: str, attempt: str, generation: int) -> bool:
        """Take the directories that we write over from older attempts and heal them. Leader only; once per start.

        True if something may have changed, so that the inventories must be taken again.
        """
        if self._claimed:
            return False
        self._claimed = True
        for source in ("save", "global"):
            if source in self.stores:
                taken = partial(_take, self.stores[source], run_id, attempt, generation)
                # half-written folders are removed on the way, which may take a while
                for done in self.calls.call(str(self.stores[source].root), taken, bounds=STALL_BOUNDS):
                    self.tell("warning", what=f"{source}: {done}", advice="")
        return bool(self.stores)

    def obtain(
        self, chosen: Candidate, state: TrainingState
    ) -> tuple[list[Strike], Callable[[TrainingState], Callable[[], Resume]]]:
        """Open and verify this rank's share of the checkpoint's files; the function plans and stages the load."""
        strike = [Strike(chosen.source, chosen.tier, chosen.save)]
        try:
            folder = self.stores[chosen.source].folder_of(chosen.save)
            reader = open_checkpoint(folder, self.fs)
            if self.verify:
                reader.verify(self._share(reader))
        except (ResilienceError, OSError) as error:
            self.tell("warning", what=f"checkpoint of iteration {chosen.save.iteration}: {error}", advice="")
            return strike, lambda _: lambda: _resume(chosen)
        stager = Stager(
            reader, chosen, self.checkpoint, self._open_base, self.rank, self.peers, self.fs, self.tell,
            verify=self.verify,
        )  # fmt: skip
        return [], stager.stage

    def _share(self, reader: CheckpointReader) -> list[str]:
        """Each file that has a digest is read in full by one rank, and every rank reads about as many bytes."""
        lengths = reader.record.files if reader.record is not None else {}
        names = read_digests(reader.folder, self.fs) or {}
        loads, mine = [(0, rank) for rank in range(self.world_size)], list[str]()
        for name in sorted(names, key=lambda name: (-lengths.get(name, 0), name)):
            load, rank = loads[0]
            heapq.heapreplace(loads, (load + lengths.get(name, 0) + 1, rank))
            if rank == self.rank:
                mine.append(name)
        return mine

    def _open_base(self) -> CheckpointReader | None:
        """The newest checkpoint of `pretrained_checkpoint`; `ckpt_step` never applies to it."""
        root = self.stores["pretrained"].root if "pretrained" in self.stores else None
        return None if root is None else open_checkpoint(find_checkpoint(root, self.fs), self.fs)


def _resume(chosen: Candidate) -> Resume:
    return Resume(chosen.save.iteration, chosen.save.generation, chosen.tier, 0.0)


def _as_healed(store: SharedStore) -> SharedStore:
    return healed(store, foreign_problem)[0] if store.after_heal() else store


def _take(store: SharedStore, run_id: str, attempt: str, generation: int) -> list[str]:
    """What was healed, in words."""
    store.take_ownership(run_id, attempt, generation)
    return list(store.heal())
