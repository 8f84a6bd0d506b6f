"""Local saves of a model that is cut by hand: rows are split among true replicas only, and come back to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.resharding.layouts import Ran, Sizes, Start, run


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
