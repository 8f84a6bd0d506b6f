"""Does the node have room for this job's saves? The sum: estimated at the start, fixed when the first save is planned.

Before the first step an optimizer may have no state yet, so that its size is estimated from its kind. The sums are
made and compared in `planning/memory.py`; here the sizes are found and exchanged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from resilience.assembly import Start, agree_all
from resilience.config import CheckpointConfig, ResiliencyConfig
from resilience.errors import ResilienceError
from resilience.planning.inventory import SaveId
from resilience.planning.memory import MemoryBudget, budget, check, optimizer_bytes
from resilience.planning.restore_plan import needed_owners
from resilience.planning.schedule import shortest_interval
from resilience.planning.typed_json import from_json
from resilience.runtime.memory import available_bytes
from resilience.state.distributed_state import DistributedOptimizerState
from resilience.state.optimizer_state import RedundancyFreeState
from resilience.state.tensors import is_dtensor, local_part
from resilience.state.training_state import TrainingState
from resilience.stores.filesystem import FileSystem

__all__ = ["BUFFER_BYTES_PER_RANK", "Budget", "Sizes"]

BUFFER_BYTES_PER_RANK = 4 << 20  # bounded buffers of one rank: hashing and sending


@dataclass(frozen=True)
class Sizes:
    """What was found out when the sum was made: shard bytes by rank, and the saves whose files lie on this node."""

    shards: tuple[int, ...]
    present: frozenset[SaveId]


class Budget:
    """The memory of this rank's node. Both methods are collective over all ranks and refuse on all alike."""

    def __init__(
        self,
        start: Start,
        checkpoint: CheckpointConfig,
        resiliency: ResiliencyConfig,
        fs: FileSystem,
        tell: Callable[..., None],
        *,
        split: bool,
        file_is_arena: bool,
        again: bool,
    ) -> None:
        """`split`: what is replicated over data-parallel ranks is stored once per group. `again`: as in `check`."""
        self._again = again
        self._start = start
        self._checkpoint = checkpoint
        self._resiliency = resiliency
        self._fs = fs
        self._tell = tell
        self._split = split
        self._file_is_arena = file_is_arena

    def estimate(self, state: TrainingState) -> None:
        """At the start, from parameters and what the optimizers have or will have. MemoryBudgetError."""
        try:
            shared, own = _state_bytes(state)
        except ResilienceError:  # it will be refused by name at the first save
            told = b""
        else:
            parts = len(self._start.job.data_parallel()) if self._split else 1
            told = json.dumps([own + -(-shared // parts), own + shared]).encode()
        self._compare(told, estimated=True)

    def fix(self, shard_bytes: int, state_bytes: int) -> Sizes | None:
        """When the first save was planned. MemoryBudgetError; None where there are no arenas."""
        return self._compare(json.dumps([shard_bytes, state_bytes]).encode(), estimated=False)

    def _compare(self, told: bytes, *, estimated: bool) -> Sizes | None:
        start, keeper = self._start, self._start.keeper
        everyone = start.setup.gather(told)
        if keeper is None or not all(everyone):
            return None
        pairs = [from_json(tuple[int, int], each, "a rank's sizes") for each in everyone]
        shards, states = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        job, scheme = start.job, start.scheme
        needed = needed_owners(job.nodes, job.coordinates, self._split)[job.node_id]
        present = keeper.store.reader.inventory().node_saves
        total = budget(
            own_bytes=[shards[rank] for rank in job.node_ranks],
            replica_bytes=[
                nbytes for rank in job.node_ranks for nbytes in scheme.files(start.topology, rank, shards).values()
            ],
            kept_for_others=scheme.files_named,
            keep_last=self._resiliency.keep_last,
            interval=shortest_interval(self._checkpoint.non_persistent_save_interval, self._resiliency.cadence),
            file_is_arena=self._file_is_arena,
            on_nodes=self._checkpoint.non_persistent_ckpt_type in ("local", "in_memory"),
            buffer_bytes=len(job.node_ranks) * (BUFFER_BYTES_PER_RANK + scheme.buffer_bytes(start.topology)),
            needed_bytes=sum(shards[owner] for owner in needed),
            staged_bytes=sum(states[rank] for rank in job.node_ranks) if start.shared.stores else 0,
            present_bytes=sum(copies.held_bytes for copies in present),
            estimated=estimated,
        )
        available = available_bytes(keeper.arena_dir, keeper.store.base, self._fs)
        if job.leads_node:
            self._tell("memory", what=str(total))
        agree_all(start.setup, lambda: self._check(total, available))
        return Sizes(tuple(shards), frozenset(copies.save for copies in present))

    def _check(self, total: MemoryBudget, available: Mapping[str, int | None]) -> None:
        lacking = check(total, available, again=self._again)
        if lacking and self._start.job.leads_node:
            self._tell("warning", what=lacking, advice="Until there is room, saves fail on this node.")


def _state_bytes(state: TrainingState) -> tuple[int, int]:
    """Bytes of this rank's tensors: those that data-parallel ranks have in common, and its own."""
    shared, own = 0, 0
    items = state.collect(("model", "optimizer")).items
    for item in items:
        if item.alias_of is None:
            shared, own = (shared + item.tensor.nbytes, own) if item.replicated else (shared, own + item.tensor.nbytes)
    for each in state.optimizers:
        optimizer = getattr(each, "optimizer", None)
        if isinstance(each, DistributedOptimizerState | RedundancyFreeState):  # each rank steps its own part
            inner = each.optimizer.inner if isinstance(each, DistributedOptimizerState) else each.inner
            own += 0 if inner.state else sum(_moments(inner, group, group["params"]) for group in inner.param_groups)
            continue
        if not isinstance(optimizer, torch.optim.Optimizer) or optimizer.state:
            continue  # what it has is among the items
        for group in optimizer.param_groups:
            trained = [parameter for parameter in group["params"] if parameter.requires_grad]
            shared += _moments(optimizer, group, [each for each in trained if not is_dtensor(each)])
            own += _moments(optimizer, group, [local_part(each) for each in trained if is_dtensor(each)])
    return shared, own


def _moments(optimizer: torch.optim.Optimizer, group: Mapping[str, object], parameters: list[torch.Tensor]) -> int:
    trained_bytes = sum(parameter.nbytes for parameter in parameters)
    momentum, amsgrad = bool(group.get("momentum")), bool(group.get("amsgrad"))
    return optimizer_bytes(type(optimizer).__name__, trained_bytes, momentum=momentum, amsgrad=amsgrad)
