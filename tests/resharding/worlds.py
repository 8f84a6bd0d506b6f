"""Ranks of one process, a thread each, that save together; single ranks of another layout that load what they saved.

They write a checkpoint and, from the same states, a shard each, as a save on nodes does. `read_from` says which of the
two is loaded: the same has to come of both.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resilience import CheckpointConfig, ParallelLayout, Resume, TrainingState
from resilience.formats.once import once
from resilience.formats.protocol import Chunk, RankShare, StateReader, Target
from resilience.formats.registry import checkpoint_format, open_checkpoint
from resilience.formats.shard_parts import parts_together, to_be_marked
from resilience.formats.shards_reader import ShardsReader
from resilience.formats.shown_shard import mark_of, shown_bytes, shown_of, small_marks
from resilience.planning.decision import Candidate
from resilience.planning.inventory import SaveId
from resilience.restore_staging import Peers, Stager
from resilience.snapshot.arena import Arena
from resilience.snapshot.copying import Copying
from resilience.snapshot.layout import ShardIdentity
from resilience.snapshot.loader import OpenShard
from resilience.snapshot.planner import PlanGroups, SnapshotPlanner
from resilience.state.sharding import without_block
from resilience.stores.digest import SEGMENT_BYTES, segment_digests
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.shard_file import read_header
from resilience.stores.shared_records import FolderRecord
from resilience.testing.ranks import ThreadAgreements, on_all_ranks
from tests.formats.worlds import ATTEMPT, RUN, meta

__all__ = ["Holder", "load", "place", "read_from", "save"]

ITERATION = 7
_source = "checkpoint"


@contextmanager
def read_from(source: str) -> Iterator[None]:
    """While it lasts, `load` reads "checkpoint", or the shards that were written as "fully_parallel" or "atomic"."""
    global _source
    before, _source = _source, source
    try:
        yield
    finally:
        _source = before


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
        for split in (True, False):
            planner = SnapshotPlanner(members[number], part, split=split)
            planner.plan(collected[world.rank], PlanGroups(own))
            path = folder / "shards" / ("fully_parallel" if split else "atomic") / f"{world.rank}"
            path.parent.mkdir(parents=True, exist_ok=True)
            arena = Arena(PosixFileSystem().create_mapping(path, planner.fit(collected[world.rank]).nbytes))
            Copying().start([planner.part(collected[world.rank], arena)], (), lambda: None)
            bytes_of_values = len(collected[world.rank].values)
            arena.seal(ShardIdentity(RUN, ATTEMPT, 2, ITERATION, world.rank, len(states), bytes_of_values))
            arena.close()
        return differ

    outcomes = on_all_ranks(len(states), work)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes  # type: ignore[return-value]


def load(folder: Path, state: TrainingState, **options: Any) -> Resume:
    """What this rank does at a start that resumes from the folder."""
    fs = PosixFileSystem()
    reader: StateReader = open_checkpoint(folder, fs)
    bring = None
    if _source != "checkpoint":
        reader, bring = _shards(folder / "shards" / _source)
    chosen = Candidate(SaveId(ITERATION, 2, ATTEMPT), "persistent", "shared", "load", RUN, 0)
    config = CheckpointConfig(fully_parallel_load=False, **options)
    here = state.layout
    assert here is not None
    rank = (here.tp_rank or 0) + here.tp * (
        (here.cp_rank or 0) + here.cp * ((here.dp_rank or 0) + (here.dp or 1) * (here.pp_rank or 0))
    )
    stager = Stager(reader, chosen, config, lambda: None, rank, Peers(), fs, lambda *_, **__: None, bring=bring)
    return stager.stage(state)()


def _shards(folder: Path) -> tuple[ShardsReader, Any]:
    """A reader of the shards, and what brings their bytes: only what it was told that is wanted may be read."""
    opened = {}
    for path in folder.iterdir():
        mapped = PosixFileSystem().open_mapping(path)
        opened[int(path.name)] = OpenShard(read_header(mapped.view, str(path)), mapped)
    shown = {
        owner: shown_of(memoryview(shown_bytes(shard, segment_digests(shard.mapped.view))))
        for owner, shard in opened.items()
    }
    headers = {owner: shard.header for owner, shard in shown.items()}
    marks = {owner: small_marks(shard) for owner, shard in shown.items()}
    for owner, keys in to_be_marked(headers).items():
        marks[owner] |= {key: mark_of(opened[owner], headers[owner].pieces[key]) for key in keys}
    brought: dict[int, set[int]] = {}

    def content(owner: int, low: int, high: int) -> torch.Tensor:
        assert set(range(low // SEGMENT_BYTES, (high - 1) // SEGMENT_BYTES + 1)) <= brought[owner]
        return opened[owner].content()[low:high]

    record = FolderRecord(RUN, SaveId(ITERATION, 2, ATTEMPT), len(opened), "shards", {})
    reader = ShardsReader(folder, record, shown, parts_together(headers, marks), (), content)

    def bring(targets: Sequence[Target]) -> None:
        brought.update(reader.wanted(targets))
        reader.fill()

    return reader, bring
