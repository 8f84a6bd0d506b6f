"""`cadence="auto"`: saves come as often as the cost of a save and the failure rate say, alike on all ranks."""

from __future__ import annotations

from tests.core.training import Training, World, reference
from tests.ranks import values


def slow_steps(training: Training) -> None:
    """A step that costs far more than a save: with failures this frequent, saving at every step is best."""
    import time

    step = training.step

    def slowly(batch: object) -> None:
        time.sleep(0.05)
        step(batch)  # type: ignore[arg-type]

    training.step = slowly  # type: ignore[method-assign]


def saved_at(world: World, rank: int) -> list[int]:
    return [event["iteration"] for event in world.events("snapshot", rank=rank)]


def test_where_failures_are_frequent_every_rank_saves_more_often_at_the_same_steps(world: World) -> None:
    often = {"cadence": "auto", "mtbf_hours": 1e-6}
    plan = world.plan("a", "b", every=6, steps=18, make=slow_steps, resiliency=often)
    results = values(world.run(plan))
    assert tuple(ran.digest for ran in results) == reference(2, 18)
    first, second = saved_at(world, 0), saved_at(world, 1)
    assert first == second
    assert first[0] == 6, "the configured interval, until something is measured"
    assert len(first) > 5, f"18 steps at 6 apart would be 3 saves: {first}"
    assert results[0].status["failed_saves"] == 0


def test_where_failures_are_rare_saves_grow_rarer(world: World) -> None:
    rare = {"cadence": "auto", "mtbf_hours": 1e6}
    results = values(world.run(world.plan("a", "b", every=2, steps=18, resiliency=rare)))
    assert tuple(ran.digest for ran in results) == reference(2, 18)
    first, second = saved_at(world, 0), saved_at(world, 1)
    assert first == second
    assert len(first) < 9, f"18 steps at 2 apart would be 9 saves: {first}"
