"""Ranks of one process, a thread each, that save together; single ranks of another layout that load what they saved."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resilience import CheckpointConfig, ParallelLayout, Resume, TrainingState
from resilience.formats.once import once
from resilience.formats.protocol import Chunk, RankShare
from resilience.formats.registry import checkpoint_format, open_checkpoint
from resilience.planning.decision import Candidate
from resilience.planning.inventory import SaveId
from resilience.restore_staging import Peers, Stager
from resilience.snapshot.planner import PlanGroups, SnapshotPlanner
from resilience.state.sharding import without_block
from resilience.stores.filesystem import PosixFileSystem
from tests.formats.worlds import ATTEMPT, RUN, ThreadAgreements, meta, on_all_ranks

__all__ = ["Holder", "load", "place", "save"]

ITERATION = 7


class Holder(nn.Module):
    """A module with the given buffers."""

    def __init__(self, **buffers: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in buffers.items():
            self.register_buffer(name, tensor)


def place(state: TrainingState, rank: int, world_size: int, **sizes: int) -> TrainingState:
    """As the controller does at a start."""
    state.layout = ParallelLayout(**sizes).resolve(rank, world_size)
    return state


def save(folder: Path, states: Sequence[TrainingState]) -> list[frozenset[str]]:
    """What the ranks with these states write together; returns the keys that differ between ranks, by rank.

    Raises what rank 0 raised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    collected = [state.collect() for state in states]
    groups: dict[Any, list[int]] = {}
    for rank, state in enumerate(states):
        assert state.layout is not None
        groups.setdefault(state.layout.shard_coordinate, []).append(rank)
    members = list(groups.values())
    barriers = [(threading.Barrier(len(ranks)), [b""] * len(ranks)) for ranks in members]
    leaders_barrier = threading.Barrier(len(members)), [b""] * len(members)

    def work(world: ThreadAgreements) -> frozenset[str]:
        number = next(n for n, ranks in enumerate(members) if world.rank in ranks)
        part = members[number].index(world.rank)
        own = ThreadAgreements(part, len(members[number]), *barriers[number])
        leaders = ThreadAgreements(number, len(members), *leaders_barrier) if part == 0 else None
        planner = SnapshotPlanner(members[number], part, split=False)
        differ = planner.plan(collected[world.rank], PlanGroups(own, len(members) > 1, leaders))
        chunks = [
            Chunk(
                without_block(i.key), i.tensor.detach().clone(), i.global_shape, i.offsets, i.key not in planner.shared
            )
            for i in collected[world.rank].items
            if i.alias_of is None and not (i.key in planner.shared and (part > 0 or i.key in planner.across.elsewhere))
        ]
        aliases = {i.key: i.alias_of for i in collected[world.rank].items if i.alias_of is not None}
        share = RankShare(once(chunks, world), collected[world.rank].values, aliases)
        about = meta(ITERATION, len(states))
        checkpoint_format("torch_dist").save(folder, share, about, world, PosixFileSystem())
        return differ

    outcomes = on_all_ranks(len(states), work)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes  # type: ignore[return-value]


def load(folder: Path, state: TrainingState, **options: Any) -> Resume:
    """What this rank does at a start that resumes from the folder."""
    fs = PosixFileSystem()
    reader = open_checkpoint(folder, fs)
    chosen = Candidate(SaveId(ITERATION, 2, ATTEMPT), "persistent", "shared", "load", RUN, 0)
    config = CheckpointConfig(fully_parallel_load=False, **options)
    here = state.layout
    assert here is not None
    rank = (here.tp_rank or 0) + here.tp * (
        (here.cp_rank or 0) + here.cp * ((here.dp_rank or 0) + (here.dp or 1) * (here.pp_rank or 0))
    )
    stager = Stager(reader, chosen, config, lambda: None, rank, Peers(), fs, lambda *_, **__: None)
    return stager.stage(state)()
