"""`keep_persistent` counts the checkpoints that somebody would go on from, and no others."""

from __future__ import annotations

from dataclasses import replace

from tests.core.training import World
from tests.ranks import values


def checkpoints(world: World) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in (world.disk / "save").glob("iter_*"))


def test_after_a_fork_what_it_left_behind_goes_and_does_not_count(world: World) -> None:
    first = world.plan("a", "b", kind=None, save=True, steps=11, checkpoint={"save_interval": 5})
    values(world.run(first))
    assert checkpoints(world) == [5, 10, 11]
    load = {"load": f"{world.disk}/save", "ckpt_step": 5, "save_interval": 4}
    fork = replace(first, steps=12, seed=1, checkpoint=load, resiliency={"keep_persistent": 2})
    results = values(world.run(fork))
    assert [ran.resumed.iteration for ran in results] == [5, 5]
    assert results[0].status["failed_saves"] == 0
    assert checkpoints(world) == [8, 12], "the fork's own two; 10 and 11 were left behind"


def test_without_a_fork_the_newest_stay(world: World) -> None:
    plan = world.plan(
        "a", "b", kind=None, save=True, checkpoint={"save_interval": 2}, resiliency={"keep_persistent": 3}
    )
    values(world.run(plan))
    assert checkpoints(world) == [8, 10, 12]
