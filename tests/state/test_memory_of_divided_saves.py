"""A distributed optimizer's state is saved and loaded without being gathered: no rank grows by what others keep.

python -m tests.state.test_memory_of_divided_saves      prints what docs/resharding.md tells
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.memory import growth_of
from resilience import CheckpointConfig, DistributedOptimizer, ResiliencyConfig
from resilience.controller import ResiliencyController
from resilience.state.training_state import TrainingState
from tests.ranks import run_ranks, values

ROWS, WIDTH, LAYERS = 2500, 1000, 6
#: Of all ranks together: main parameters and two moments, in float32.
STATE_BYTES = 3 * 4 * ROWS * WIDTH * LAYERS
#: One rank's half of it would be 90 MB, the whole of it 180.
BOUND_BYTES = 64_000_000

MODES: dict[str, dict[str, bool]] = {
    "by slices": {"dist_ckpt_optim_fully_reshardable": True},
    "by slices, mem_efficient": {
        "dist_ckpt_optim_fully_reshardable": True,
        "distrib_optim_fully_reshardable_mem_efficient": True,
    },
    "in buckets": {},
}


def grown(rank: int, root: str, options: dict[str, bool]) -> tuple[int, int]:
    """How much a rank grows while it saves for the second time, and while it reads that into tensors that it has."""
    model = torch.nn.ParameterDict(
        {str(n): torch.nn.Parameter(torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16)) for n in range(LAYERS)}
    )
    optimizer = DistributedOptimizer(model.parameters(), torch.optim.AdamW, lr=1e-3)
    controller = _controller(model, optimizer, root, rank, {"save": root, **options})
    assert controller.restore() is None
    for iteration in (1, 2):
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        optimizer.step()
        for parameter in model.parameters():
            parameter.grad = None
        controller.after_step(iteration)
        _, saving = growth_of(lambda iteration=iteration: _saved(controller, iteration))  # type: ignore[misc]
    controller.close()
    again = _controller(model, optimizer, root, rank, {"load": root, **options})
    resumed, loading = growth_of(again.restore)
    assert resumed is not None
    again.close()
    return saving, loading


def _saved(controller: ResiliencyController, iteration: int) -> None:
    report = controller.save(iteration, "persistent")
    assert not report.error, report
    controller.wait()


def _controller(model: Any, optimizer: Any, root: str, rank: int, options: dict[str, Any]) -> ResiliencyController:
    resiliency = ResiliencyConfig(run_id="grown", memory_dir=f"{root}-memory")
    return ResiliencyController(TrainingState(model, optimizer), CheckpointConfig(**options), resiliency)


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
def test_no_rank_grows_by_more_than_a_fixed_amount_over_what_it_keeps(tmp_path: Path, mode: str) -> None:
    for saving, loading in values(run_ranks(2, grown, str(tmp_path / "save"), MODES[mode], timeout_s=240.0)):
        assert saving < BOUND_BYTES
        assert loading < STATE_BYTES / 2 + BOUND_BYTES + 2 * ROWS * WIDTH * LAYERS  # its own slices, and the weights


if __name__ == "__main__":
    for name, chosen in MODES.items():
        with tempfile.TemporaryDirectory() as place:
            told = values(run_ranks(2, grown, f"{place}/save", chosen, timeout_s=600.0))
        grew = [[f"{nbytes / 1e6:.0f} MB" for nbytes in each] for each in told]
        print(f"{name}: while saving {[each[0] for each in grew]}, while loading {[each[1] for each in grew]}")
