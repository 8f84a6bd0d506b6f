"""One save's way to shared storage, in a lane of its own: what it consists of, and how it went."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from resilience.assembly import Start
from resilience.config import CheckpointConfig
from resilience.errors import EvictedError, ResilienceError, StoreError
from resilience.formats.extras import Extras, extras_of
from resilience.formats.in_buckets import OwnBuckets, own_buckets
from resilience.formats.megatron_objects import rng_key, writes_rng
from resilience.formats.optimizer_common import DP_RESHARDABLE, FULLY_RESHARDABLE, SHARDING_TYPE
from resilience.formats.protocol import SaveMeta
from resilience.formats.saver import DrainJob, DrainTarget, SharedSaver
from resilience.job_facts import content_metadata
from resilience.planning.book import drain_slot
from resilience.planning.control import SlotReport
from resilience.planning.history import abandoned_checkpoints
from resilience.planning.inventory import AttemptLog, SaveId, Tier
from resilience.replication.communicator import Agreements
from resilience.replication.protection import UNEQUAL, UNHEALTHY, Board
from resilience.runtime.clock import Clock
from resilience.runtime.worker import Lane
from resilience.saving.wish import Snapshot, Wish
from resilience.snapshot.copying import DONE, Copy
from resilience.snapshot.equality import Across, Sample
from resilience.state.parallel_layout import ParallelLayout
from resilience.state.tokenizer import tokenizer_files
from resilience.state.training_state import TrainingState

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
        *,
        save_frozen: bool = True,
        equality: Agreements | None = None,
    ) -> None:
        """`equality`: the data-parallel group, used by this lane alone; None where saves on nodes are compared."""
        self.lane = lane
        self.evicted = ""  # why this job must end: a newer start writes its directory now; known on all ranks
        self._start = start
        self._state = state
        self._checkpoint = checkpoint
        self._saver = saver
        self._board = board
        self._clock = clock
        self._tell = tell
        self._save_frozen = save_frozen
        self._equality = equality
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
        sample, copy = (snapshot.job.sample, snapshot.job.copy) if snapshot else (None, DONE)
        self.lane.submit(f"drain {save.iteration}", lambda: self._run(job, sample, copy))

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
        job = self._start.job
        aliases = {} if snapshot is None else {
            item.key: item.alias_of for item in snapshot.collected.items if item.alias_of is not None
        }  # fmt: skip
        if snapshot and not snapshot.job.healthy:
            problem = UNHEALTHY
        members = job.data_parallel()
        return DrainJob(
            save, snapshot.arena if snapshot else None, snapshot.collected.values if snapshot else b"", aliases,
            tuple(self._targets(save, wish, log, keep_persistent)), self._extras, problem,
            snapshot.job.split if snapshot else True, members.index(job.rank), len(members),
            self._checkpoint.fully_parallel_save, snapshot.across if snapshot else Across(), members[0],
            self._state.stored_places(),
        )  # fmt: skip

    def _targets(self, save: SaveId, wish: Wish, log: AttemptLog, keep_persistent: int | None) -> Iterator[DrainTarget]:
        """A non-persistent save is always stored whole; the save options are for persistent ones."""
        config, state, layout = self._checkpoint, self._state, self._state.layout
        meta = SaveMeta(
            save.iteration, self._start.run_id, save.attempt, save.generation, log.base, log.fork,
            self._start.job.world_size, state.train_state.to_dict(), state.run_config,
            tp=layout.tp if layout else None, pp=layout.pp if layout else None,
            fully_parallel_save=config.fully_parallel_save,
            content=self._content,
        )  # fmt: skip
        buckets = self._buckets
        if wish.to_global:
            yield DrainTarget(self._start.shared.stores["global"], 2, meta, buckets=buckets)
        if wish.persistent:
            leave_out: tuple[str, ...] = () if config.save_optim else ("optimizer", "scheduler")
            leave_out += () if config.save_rng else ("rng",)
            meta = replace(meta, save_optim=config.save_optim, save_rng=config.save_rng)
            skip = frozenset() if self._save_frozen else state.frozen_keys()
            store = self._start.shared.stores["save"]
            buckets = buckets if config.save_optim else None
            yield DrainTarget(store, keep_persistent, meta, leave_out, skip, config.save_tokenizer_assets, buckets)

    @cached_property
    def _content(self) -> Mapping[str, Any]:
        return content_metadata(self._state, self._checkpoint)

    @cached_property
    def _buckets(self) -> tuple[OwnBuckets, ...] | None:
        """This rank's, if that is where optimizer state is stored. Asked for on the training thread first."""
        return own_buckets(self._state) if self._content.get(SHARDING_TYPE) == DP_RESHARDABLE else None

    def _extras(self, values: bytes, tensor_of: Callable[[str], torch.Tensor | None], tokenizer: bool) -> Extras:
        """What this rank adds to its tensors. In the drain lane."""
        job = self._start.job
        place = (self._state.layout or ParallelLayout()).resolve(job.rank, job.world_size)
        writes_loader = (place.pp_rank, place.tp_rank, place.cp_rank) == (0, 0, 0)
        return extras_of(
            values, tensor_of, loader_rank=place.dp_rank if writes_loader else None, leads=job.rank == 0,
            rng=rng_key(place) if writes_rng(place) else None, extra_state=self._state.extra_state_keys(),
            tokenizer=self._tokenizer_files if tokenizer else dict,
            sharding_type=self._content.get(SHARDING_TYPE, FULLY_RESHARDABLE),
            experts=self._state.expert_parameters(),
        )  # fmt: skip

    def _tokenizer_files(self) -> dict[str, bytes]:
        """A tokenizer that cannot be stored is told of, and never fails the save."""
        if self._state.tokenizer is None:
            return {}
        try:
            return {file.name: file.content for file in tokenizer_files(self._state.tokenizer)}
        except Exception as error:  # noqa: BLE001 - the tokenizer's own code runs here
            self._tell("warning", what=f"the checkpoint has no tokenizer: {error}", advice="")
            return {}

    def _compare(self, job: DrainJob, sample: Sample | None) -> DrainJob:
        """The rotating share, with the data-parallel group: a save whose shared items differ fails."""
        if self._equality is None:
            return job
        seen = sample.fingerprint() if sample is not None else 0
        try:
            failed, highest, lowest = self._equality.maximum([int(sample is None), seen, -seen])
        except ResilienceError as error:
            return replace(job, error=job.error or str(error))
        if not failed and highest != -lowest:
            return replace(job, error=job.error or UNEQUAL)
        return job

    def _run(self, job: DrainJob, sample: Sample | None, copy: Copy) -> None:
        """In the drain lane; collective over all ranks' drain lanes."""
        spoiled = copy.wait()
        if spoiled:
            job, sample = replace(job, error=job.error or spoiled), None
        began = self._clock.now()
        slot = drain_slot(job.save)
        try:
            self._saver.run(self._compare(job, sample), self._abandoned)
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

    def _abandoned(self) -> set[SaveId]:
        """Checkpoints that count for nothing, as the attempt logs tell now. On the leader, in the drain lane.

        StoreError where they cannot be read: what is left behind may then not be told from what counts.
        """
        start = self._start
        written = [store for source, store in start.shared.stores.items() if source in ("save", "global")]
        inventories = [store.inventory(start.run_id) for store in written]
        inventories += [store.reader.inventory() for store in start.stores]
        for each in inventories:
            if each.unknown:
                raise StoreError(f"Nothing is deleted: {each.unknown}")
        return abandoned_checkpoints(inventories, start.run_id)
