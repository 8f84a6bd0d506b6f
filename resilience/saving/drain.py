"""One save's way to shared storage, in a lane of its own: what it consists of, and how it went."""

from __future__ import annotations

from collections.abc import Callable

from resilience.assembly import Start
from resilience.config import CheckpointConfig
from resilience.errors import EvictedError
from resilience.formats.protocol import SaveMeta
from resilience.formats.saver import DrainJob, SharedSaver
from resilience.planning.book import drain_slot
from resilience.planning.control import SlotReport
from resilience.planning.inventory import AttemptLog, SaveId, Tier
from resilience.replication.protection import UNHEALTHY, Board
from resilience.runtime.clock import Clock
from resilience.runtime.worker import Lane
from resilience.saving.wish import Snapshot, Wish
from resilience.state.training_state import PARTS, TrainingState
from resilience.stores.shared_store import SharedStore

__all__ = ["Drain"]


class Drain:
    """The drains of one start. Submitted at agreed boundaries, so that all ranks' lanes run the same ones in order."""

    def __init__(
        self,
        start: Start,
        state: TrainingState,
        checkpoint: CheckpointConfig,
        saver: SharedSaver,
        board: Board,
        lane: Lane,
        clock: Clock,
        tell: Callable[..., None],
    ) -> None:
        self.lane = lane
        self.evicted = ""  # why this job must end: a newer start writes its directory now; known on all ranks
        self._start = start
        self._state = state
        self._checkpoint = checkpoint
        self._saver = saver
        self._board = board
        self._clock = clock
        self._tell = tell
        self._tiers: dict[SaveId, Tier] = {}

    def submit(
        self,
        save: SaveId,
        wish: Wish,
        snapshot: Snapshot | None,
        log: AttemptLog,
        keep_persistent: int | None,
        problem: str,
    ) -> None:
        """Hand over one agreed save. `snapshot` None: it failed here (`problem` says why), and all must learn of it."""
        self._tiers[save] = "persistent" if wish.persistent else "global"
        job = self._job(save, wish, snapshot, log, keep_persistent, problem)
        self.lane.submit(f"drain {save.iteration}", lambda: self._run(job))

    def tier_of(self, save: SaveId) -> Tier:
        return self._tiers.get(save, "persistent")

    def _job(
        self,
        save: SaveId,
        wish: Wish,
        snapshot: Snapshot | None,
        log: AttemptLog,
        keep_persistent: int | None,
        problem: str,
    ) -> DrainJob:
        config, shared, job = self._checkpoint, self._start.shared.stores, self._start.job
        targets: list[tuple[SharedStore, int | None]] = []
        if wish.to_global:
            targets.append((shared["global"], 2))
        if wish.persistent:
            targets.append((shared["save"], keep_persistent))
        leave_out: tuple[str, ...] = ()
        if not wish.to_global:
            leave_out += () if config.save_optim else ("optimizer", "scheduler")
            leave_out += () if config.save_rng else ("rng",)
        values = snapshot.collected.values if snapshot else b""
        if snapshot and leave_out:
            values = self._state.collect([part for part in PARTS if part not in leave_out]).values
        aliases = {} if snapshot is None else {
            item.key: item.alias_of for item in snapshot.collected.items if item.alias_of is not None
        }  # fmt: skip
        if snapshot and not snapshot.job.healthy:
            problem = UNHEALTHY
        members = job.data_parallel()
        meta = SaveMeta(
            save.iteration, self._start.run_id, save.attempt, save.generation, log.base, log.fork,
            job.world_size, self._state.train_state.to_dict(), self._state.run_config, config.save_optim,
            config.save_rng,
        )  # fmt: skip
        return DrainJob(
            save, snapshot.arena if snapshot else None, values, aliases, meta, tuple(targets), problem, leave_out,
            snapshot.job.split if snapshot else True, members.index(job.rank), len(members),
        )  # fmt: skip

    def _run(self, job: DrainJob) -> None:
        """In the drain lane; collective over all ranks' drain lanes."""
        began = self._clock.now()
        slot = drain_slot(job.save)
        try:
            self._saver.run(job)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others must hear that this save failed
            self.evicted = self.evicted or (str(error) if isinstance(error, EvictedError) else "")
            self._board.report(SlotReport(slot, "failed", failed=True, settled=True), str(error))
        else:
            self._board.report(SlotReport(slot, "protected", settled=True))
            seconds = self._clock.now() - began
            self._tell("committed", iteration=job.save.iteration, tier=self._tiers[job.save], seconds=seconds)
        finally:
            if job.arena is not None and self._start.keeper is not None:
                self._start.keeper.unpin(job.arena)
