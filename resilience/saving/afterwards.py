"""What a rank does once all ranks know of a save: certificates, the attempt log, deletions, what earlier attempts left.

In the tidy lane, but for the log on shared storage, which may hang.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from resilience.assembly import Start
from resilience.errors import StoreError, UnsafePathError
from resilience.planning.book import Change
from resilience.planning.inventory import AttemptLog, SaveId, Tier
from resilience.saving.lanes import CLOSE_BOUND_S, Lanes
from resilience.stores.filesystem import FileSystem

__all__ = ["Afterwards"]


class Afterwards:
    """The attempt log and the kept saves of one start on one rank. Methods are local unless they say otherwise."""

    def __init__(self, start: Start, log: AttemptLog, lanes: Lanes, fs: FileSystem, tell: Callable[..., None]) -> None:
        self.log = log
        self.kept: tuple[SaveId, ...] = ()  # of earlier attempts
        self.base: SaveId | None = None  # resumed from on nodes, of another world size: stays until there is another
        self._start = start
        self._lanes = lanes
        self._fs = fs
        self._tell = tell
        self._dropped: tuple[SaveId, ...] | None = None  # what was kept when earlier attempts' leftovers went
        self._log_waits = False
        self.noted = False  # this start, in some place that this rank writes to

    @property
    def tier(self) -> Tier:
        """Where saves on nodes lie."""
        return self._start.keeper.store.tier if self._start.keeper is not None else "persistent"

    def make_room(self, shard_bytes: int) -> None:
        """A save failed: if it was for want of room, what earlier attempts left goes before this one has a save."""
        keeper = self._start.keeper

        def look() -> None:
            if keeper is not None and self._fs.free_bytes(keeper.arena_dir) < 2 * shard_bytes:
                self._drop_earlier()

        if self._start.job.leads_node:
            self._lanes.tidy.submit("make room", look)

    def _drop_earlier(self) -> None:
        """Delete what earlier attempts left beside the saves that are kept. By the node's leader, whoever wrote it.

        A base of another world size is nobody's to recycle: it goes as a whole, once this attempt has a save instead.
        """
        keep = self.kept if self.base is None else (*self.kept, self.base)
        if self._dropped is not None and set(self._dropped) <= set(keep):
            return
        self._dropped = keep
        for store in self._start.stores:
            store.remover.drop_earlier_attempts(self._start.attempt, keep)

    def certify(self, change: Change) -> None:
        """Every rank has committed: certificate, attempt log; then what earlier attempts left may go."""
        self.log = replace(self.log, completed=max(self.log.completed or change.save, change.save))
        self._lanes.tidy.submit(f"certify {change.save.iteration}", lambda: self._certify(change))

    def _certify(self, change: Change) -> None:
        start, keeper = self._start, self._start.keeper
        if not start.job.leads_node:
            return
        if keeper is not None and change.what in ("complete", "protected"):
            keeper.store.write_certificate(change.save, start.job.world_size, protected=change.what == "protected")
        for store in start.stores:
            store.write_attempt_log(self.log)
        if start.job.rank == 0 and not self._log_waits:
            self._log_waits = True  # not in this lane: shared storage may hang, and deletions must go on
            self._lanes.drain.submit("attempt log", self._write_shared_log)
        if change.what in ("protected", "unprotected"):
            if change.what == "protected" or start.topology.factor == 1:
                self.base = None
            self._drop_earlier()

    def delete(self, save: SaveId) -> None:
        """The job decided to delete `save`."""
        self.kept = tuple(kept for kept in self.kept if kept != save)

        def remove() -> None:
            if self._start.keeper is not None:
                self._start.keeper.delete(save)
            if self._start.job.leads_node:
                for store in self._start.stores[1:]:
                    store.remover.drop(save)
                for store in self._start.stores:
                    store.remover.drop_beside(save)
                self._tell("pruned", iteration=save.iteration, generation=save.generation, tier=self.tier)

        self._lanes.tidy.submit(f"delete {save.iteration}", remove)

    def end(self, outcome: Literal["finished", "stopped", "failed"], iteration: int) -> None:
        """Note how this attempt ended."""
        self._lanes.tidy.wait(CLOSE_BOUND_S)
        self.log = replace(self.log, end=outcome, end_iteration=iteration)
        try:
            self._write_logs_here()
        except OSError as error:
            self._tell("warning", what=f"the attempt log could not be written: {error}", advice="")
        if self._start.job.rank == 0 and "save" in self._start.shared.stores:
            self._lanes.drain.submit("attempt log", self._note_end)
            if not self._lanes.drain.wait(CLOSE_BOUND_S):
                what = f"shared storage does not answer ({self._lanes.drain.running!r}): it has no note of this end"
                self._tell("warning", what=what, advice="")

    def _note_end(self) -> None:
        try:
            self._write_shared_log()
        except OSError as error:
            self._tell("warning", what=f"the attempt log could not be written: {error}", advice="")

    def free_node_memory(self) -> None:
        """The run finished and its last persistent save is committed: its copies on this node go. Collective."""
        self._lanes.give_up()
        self._lanes.reserve.wait(CLOSE_BOUND_S)
        if self._start.keeper is not None:
            self._start.keeper.close()
        self._start.setup.barrier()
        if self._start.job.leads_node:
            for store in self._start.stores:
                try:
                    store.remover.forget()
                except OSError as error:  # all is saved: no reason to say that the run failed
                    self._tell("warning", what=f"{store.root} is not freed: {error}", advice="Remove it.")

    def begin_log(self) -> None:
        """In every node's directory and in `save`. A node that cannot take it now has it before its next copy."""
        for store in self._start.stores:
            store.owe_log(self.log)
        try:
            self._write_logs_here()
            self.noted = self._start.job.leads_node
        except UnsafePathError:
            raise
        except StoreError as error:
            self._tell("warning", what=f"{self._start.job.node_id} has no note of this start: {error}",
                       advice="Saves fail there until it is mended.")  # fmt: skip
        self._write_shared_log()
        self.noted |= "save" in self._start.shared.stores

    def _write_logs_here(self) -> None:
        if self._start.job.leads_node:
            for store in self._start.stores:
                store.write_attempt_log(self.log)

    def _write_shared_log(self) -> None:
        self._log_waits = False
        if self._start.job.rank == 0 and "save" in self._start.shared.stores:
            self._start.shared.stores["save"].write_attempt_log(self.log)
