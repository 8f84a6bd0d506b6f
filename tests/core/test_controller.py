"""The controller, for people who own their loop: what its calls return."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from resilience import ResiliencyController
from resilience.replication.clique import CliqueExchange
from resilience.state.training_state import TrainingState
from tests.core.training import WAIT_S, Plan, Training, World
from tests.ranks import run_ranks, values

REPORTED = threading.Event()  # of this process: the first report of a save is there


def exchanges_once_reported(training: Training) -> None:
    run = CliqueExchange.run

    def late(self: CliqueExchange, offer: Any, inbox: Any) -> Any:
        REPORTED.wait(WAIT_S)
        return run(self, offer, inbox)

    CliqueExchange.run = late  # type: ignore[method-assign]


def own_loop(rank: int, plan: Plan) -> dict[str, Any]:
    training = Training(rank, plan)
    state = TrainingState(training.model, training.optimizer, scheduler=training.scheduler, dataloader=training.loader)
    controller = ResiliencyController(state, training.checkpoint, training.resiliency)
    resumed = controller.restore()
    reports: dict[int, Any] = {}
    first = 0 if resumed is None else resumed.iteration
    for iteration in range(first + 1, first + 8):
        training.step(state.loader.next_batch())
        reports[iteration] = controller.after_step(iteration)
        if reports[iteration] is not None:
            REPORTED.set()
        if iteration == first + 5:
            reports["asked"] = controller.save(iteration, "non_persistent")
            reports["again"] = controller.save(iteration, "non_persistent")
    controller.wait()
    status = controller.status()
    controller.close()
    controller.close()
    return {"reports": reports, "status": status, "resumed": resumed, "iteration": controller.iteration}


def test_a_synchronous_save_is_protected_when_the_call_returns(world: World) -> None:
    plan = world.plan("a", "b", resiliency={"non_persistent_sync": True})
    for rank, told in enumerate(values(run_ranks(2, own_loop, plan))):
        reports = told["reports"]
        assert [reports[i] for i in (1, 2, 4, 5, 7)] == [None] * 5
        report = reports[3]
        assert (report.kind, report.iteration, report.generation) == ("non_persistent", 3, 1)
        assert (report.tiers, report.state, report.error) == (("local",), "protected", "")
        assert report.bytes == world.shard("ab"[rank], 5, rank).stat().st_size
        assert reports["asked"].state == "protected"
        assert reports["again"].state == "skipped", "an iteration is saved once in an attempt"
        assert [each["iteration"] for each in told["status"]["saves"]] == [5, 6]
        assert len(told["status"]["stall_s"]) == 3
        assert all(stall > 0 for stall in told["status"]["stall_s"])


def test_a_background_save_is_pending_when_the_call_returns_and_resumed_from_later(world: World) -> None:
    first = values(run_ranks(2, own_loop, world.plan("a", "b", make=exchanges_once_reported)))
    assert all(told["reports"][3].state == "pending" for told in first)
    assert all(told["resumed"] is None for told in first)
    second = values(run_ranks(2, own_loop, world.plan("a", "b", seed=1)))
    assert [told["resumed"].iteration for told in second] == [6, 6]
    assert [told["iteration"] for told in second] == [13, 13]


def test_a_persistent_save_is_synchronous_unless_asked_otherwise(world: World) -> None:
    interval = {"save_interval": 3}
    (told, _) = values(
        run_ranks(2, own_loop_persistent, world.plan("a", "b", kind=None, save=True, checkpoint=interval))
    )
    assert (told.kind, told.state, told.tiers) == ("persistent", "persistent", ("persistent",))
    assert (world.disk / "save" / "iter_0000003").is_dir()


def own_loop_persistent(rank: int, plan: Plan) -> Any:
    training = Training(rank, plan)
    controller = ResiliencyController(
        TrainingState(training.model, training.optimizer), training.checkpoint, training.resiliency
    )
    controller.restore()
    reports = [controller.after_step(iteration) for iteration in (1, 2, 3)]
    controller.close()
    return reports[-1]


@pytest.mark.parametrize("wrong", [1, 2, 4, "3"])
def test_an_iteration_that_is_not_the_next_one_is_refused_before_others_are_asked(world: World, wrong: Any) -> None:
    """Rank 1 is not even there: the call comes back all the same."""
    first, second = run_ranks(2, own_loop_with_a_gap, world.plan("a", "b"), wrong)
    assert first.error == "ConfigError"
    assert "2 are finished, so that 3 is expected" in first.message
    assert second.value == 2


def own_loop_with_a_gap(rank: int, plan: Plan, wrong: Any) -> int:
    training = Training(rank, plan)
    controller = ResiliencyController(
        TrainingState(training.model, training.optimizer), training.checkpoint, training.resiliency
    )
    controller.restore()
    for iteration in (1, 2):
        controller.after_step(iteration)
    try:
        if rank == 0:
            controller.after_step(wrong)
        return controller.iteration
    finally:
        controller.close()


def test_a_save_at_another_iteration_than_the_finished_one_is_refused(world: World) -> None:
    (outcome,) = run_ranks(1, own_loop_that_saves_ahead, world.plan("a"))
    assert outcome.error == "ConfigError"
    assert "1 are finished" in outcome.message


def own_loop_that_saves_ahead(rank: int, plan: Plan) -> None:
    training = Training(rank, plan)
    controller = ResiliencyController(
        TrainingState(training.model, training.optimizer), training.checkpoint, training.resiliency
    )
    controller.restore()
    controller.after_step(1)
    controller.save(2, "non_persistent")
