"""From shards back into live tensors: whole, or not at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from resilience.errors import CorruptCopyError, LayoutMismatchError
from resilience.snapshot.layout import plan_layout
from resilience.snapshot.loader import OpenShard, open_shard, plan_shard_load
from resilience.snapshot.pieces import pieces_of
from resilience.state.digest import state_digest
from resilience.state.training_state import TrainingState
from tests.core.shards import FS, record_of, sealed


class Tied(nn.Module):
    """Parameters of several dtypes, an empty one, a scalar, tied weights, and a buffer that differs per rank."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(3, 7)
        self.narrow = nn.Parameter(torch.randn(5, 2).bfloat16())
        self.scale = nn.Parameter(torch.randn(()))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.tied = nn.Linear(3, 7, bias=False)
        self.tied.weight = self.up.weight
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))


def state_of(seed: int) -> TrainingState:
    torch.manual_seed(seed)
    model = Tied()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    loss = (
        model.up(torch.randn(4, 3)).sum() + model.narrow.float().sum() + model.scale + model.tied(torch.ones(3)).sum()
    )
    (loss + model.empty.sum()).backward()
    optimizer.step()
    return TrainingState(model, optimizer)


def shards_of(states: list[TrainingState], directory: Path, *, split: bool) -> dict[int, OpenShard]:
    """One shard per state, as the ranks of one data-parallel group write them; `seen` is each rank's own."""
    shards = {}
    for rank, state in enumerate(states):
        collected = state.collect()
        shared = {i.key for i in collected.items if i.replicated and i.alias_of is None and "seen" not in i.key}
        aliases = {i.key: i.alias_of for i in collected.items if i.alias_of is not None}
        pieces = pieces_of(collected.items, shared, part=rank, parts=len(states), split=split)
        layout = plan_layout(pieces, aliases, len(collected.values), range(len(states)))
        path = directory / f"shard{rank}"
        arena = sealed(path, collected.items, layout, collected.values, owner=rank, world_size=len(states))
        record = record_of(arena.mapped.view, rank, len(states))
        shards[rank] = open_shard(path, FS, record)
        assert shards[rank].digest() == record.digest
    return shards


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_state_comes_back_from_its_groups_shards(tmp_path: Path, size: int, split: bool) -> None:
    states = [state_of(0) for _ in range(size)]
    for rank, state in enumerate(states):
        state.models[0].module.seen += rank
    saved = [state_digest(state.collect()) for state in states]
    shards = shards_of(states, tmp_path, split=split and size > 1)
    for rank in range(size):
        fresh = state_of(1)
        given = shards if split else {rank: shards[rank]}
        plan_shard_load(fresh, given, rank)()
        assert state_digest(fresh.collect()) == saved[rank]


def test_planning_a_load_changes_nothing(tmp_path: Path) -> None:
    shards = shards_of([state_of(0)], tmp_path, split=False)
    fresh = state_of(1)
    before = state_digest(fresh.collect())
    plan_shard_load(fresh, shards, 0)
    assert state_digest(fresh.collect()) == before


def test_rows_that_are_missing_are_no_whole(tmp_path: Path) -> None:
    shards = shards_of([state_of(0) for _ in range(3)], tmp_path, split=True)
    del shards[2]
    with pytest.raises((CorruptCopyError, LayoutMismatchError)):
        plan_shard_load(state_of(1), shards, 0)


def test_rows_that_are_there_twice_are_no_whole(tmp_path: Path) -> None:
    shards = shards_of([state_of(0) for _ in range(2)], tmp_path, split=True)
    again = shards[1].header
    twice = {key: replace(piece, offsets=(0, *piece.offsets[1:])) for key, piece in again.pieces.items() if piece.shape}
    shards[1].header = replace(again, pieces={**again.pieces, **twice})
    with pytest.raises(CorruptCopyError, match="do not make up"):
        plan_shard_load(state_of(1), shards, 0)


def test_another_model_is_a_mismatch_that_names_what_differs(tmp_path: Path) -> None:
    shards = shards_of([state_of(0)], tmp_path, split=False)
    other = state_of(1)
    other.models[0].module.up = nn.Linear(3, 8)
    with pytest.raises(LayoutMismatchError, match="up"):
        plan_shard_load(other, shards, 0)
