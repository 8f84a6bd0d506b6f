"""What tensor-parallel ranks all hold whole is written by one of them: only as long as they hold the same."""

from __future__ import annotations

from pathlib import Path

import torch
from hypothesis import given
from hypothesis import strategies as st

from examples.parallel_gpt import Pipeline, Training
from resilience import CheckpointConfig, ParallelLayout, ResiliencyConfig
from resilience.formats.in_common import place_sum
from resilience.observe.events import read_events
from resilience.planning.split import split_rows
from resilience.snapshot.pieces import pieces_of
from resilience.state import Item
from tests.ranks import run_ranks, values
from tests.resharding.layouts import TIMEOUT_S


@given(
    st.integers(1, 9), st.integers(1, 5), st.integers(1, 5), st.sampled_from([torch.float32, torch.int8, torch.int64])
)
def test_the_sums_of_rows_add_up_to_that_of_the_item_however_they_are_cut(
    rows: int, columns: int, parts: int, dtype: torch.dtype
) -> None:
    tensor = torch.randint(-100, 100, (rows, columns)).to(dtype)
    item = Item("model/0/w", tensor, (rows + 2, columns), (2, 0), True)
    (whole,) = pieces_of([item], {item.key}, part=0, parts=1, split=False)
    total = 0
    for part in range(parts):
        for piece in pieces_of([item], {item.key}, part=part, parts=parts, split=True):
            start = piece.offsets[0] - 2
            total += place_sum(piece, tensor[start : start + piece.shape[0]])
    assert total % (1 << 64) == place_sum(whole, tensor)
    other = tensor.clone()
    other[rows - 1, 0] += 1
    assert place_sum(whole, other) != place_sum(whole, tensor)
    assert sum(stop - start for cut in split_rows([(rows, columns)], parts) for _, start, stop in cut) == rows


def diverge(rank: int, save: str, memory: str, steps: int) -> tuple[int, int, torch.Tensor, torch.Tensor]:
    """Saves at every second step; after the third one a norm is changed on one of the tensor-parallel ranks."""
    training = Training(ParallelLayout(tp=2))
    pipeline, norm = Pipeline(training.model, training.groups), training.model.norm.weight
    config = CheckpointConfig(save=save, load=save, save_interval=2)
    resiliency = ResiliencyConfig(memory_dir=memory, events=f"{save}-events")
    with training.trainer(checkpoint=config, resiliency=resiliency) as trainer:
        resumed, began = trainer.iteration, norm.detach().clone()
        for batch in trainer.iterations(steps):
            if trainer.iteration == 3 and rank == 1:
                norm.data.add_(1.0)
            training.optimizers[0].zero_grad()
            pipeline.step(batch)
            training.optimizers[0].step()
        return resumed, trainer.status()["failed_saves"], began, norm.detach().clone()


def test_a_norm_that_diverges_between_two_saves_fails_the_next_and_is_kept_per_rank_from_then_on(
    tmp_path: Path,
) -> None:
    save, memory = str(tmp_path / "save"), str(tmp_path / "memory")
    first = values(run_ranks(2, diverge, save, memory, 6, timeout_s=TIMEOUT_S))
    assert [failed for _, failed, _, _ in first] == [1, 1]
    events = list(read_events(sorted((tmp_path / "save-events").glob("*"))))
    (told, *_) = [event for event in events if event["event"] == "save_failed"]
    assert told["iteration"] == 4
    assert "differ between them now" in told["error"]
    assert any("model/0/norm.weight" in event["keys"] for event in events if event["event"] == "unequal_items")
    again = values(run_ranks(2, diverge, save, memory, 6, timeout_s=TIMEOUT_S))
    assert [resumed for resumed, _, _, _ in again] == [6, 6]
    for before, after in zip(first, again, strict=True):
        assert torch.equal(before[3], after[2])
    assert not torch.equal(again[0][2], again[1][2])
