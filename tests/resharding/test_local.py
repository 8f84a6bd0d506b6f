"""Saves on nodes of a model that is cut by hand: rows are split among true replicas only, and come back to the bit.

Also under another layout of another number of ranks, put together from the shards.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.resharding.layouts import Ran, Sizes, Start, assert_ranks_hold, run, stored


@pytest.mark.parametrize("algorithm", ["fully_parallel", pytest.param("atomic", marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "sizes", [{"tp": 2, "dp": 2}, pytest.param({"dp": 4, "ep": 2}, marks=pytest.mark.long)], ids=["tp2 dp2", "ep2 dp4"]
)
def test_saves_in_node_memory_go_on_to_the_bit(memory_mount: Path, sizes: Sizes, algorithm: str) -> None:
    options = (
        ("non_persistent_ckpt_type", "in_memory"),
        ("non_persistent_save_interval", 3),
        ("non_persistent_local_ckpt_algo", algorithm),
    )

    def start(name: str, steps: int) -> list[Ran]:
        memory = str(memory_mount / name)
        return run(Start(sizes, memory, steps, dropout=0.2, options=options, run_id="run"))

    straight = start("straight", 6)
    start("stopped", 3)
    resumed = start("stopped", 6)
    assert {ran.resumed for ran in resumed} == {3}
    for rank, ran in enumerate(resumed):
        assert ran.losses == straight[rank].losses[3:]


@pytest.mark.long
@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"tp": 2, "dp": 2}, {"pp": 2}),
        ({"tp": 2, "pp": 2}, {"tp": 2}),
        ({"tp": 2, "dp": 2}, {"tp": 2}),
        ({"tp": 2}, {"tp": 2, "pp": 2}),
        ({"dp": 2}, {"tp": 4}),
        ({"dp": 4, "ep": 2}, {"dp": 2}),
        ({"pp": 2}, {"dp": 1}),
        ({"cp": 2, "dp": 2}, {"dp": 2}),
    ],
    ids=lambda sizes: " ".join(f"{name}{size}" for name, size in sizes.items()),
)
def test_saves_in_node_memory_go_on_under_another_layout(
    memory_mount: Path, tmp_path: Path, before: Sizes, after: Sizes
) -> None:
    """Compared with a persistent checkpoint of the same boundary."""
    options = (("non_persistent_ckpt_type", "in_memory"), ("non_persistent_save_interval", 3))
    memory, root = str(memory_mount), str(tmp_path / "save")
    run(Start(before, memory, 3, save=root, every=3, options=options, run_id="run", keep=True))
    resumed = run(Start(after, memory, 5, options=options, run_id="run"))
    assert {ran.resumed for ran in resumed} == {3}
    assert_ranks_hold(resumed, stored(Path(root), 3))
    straight = run(Start(before, str(memory_mount / "straight"), 5, run_id="straight"))
    assert resumed[0].losses == pytest.approx(straight[0].losses[3:], rel=1e-3)
