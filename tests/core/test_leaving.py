"""How a rank leaves: by request, by signal, by exception, because its data ended; nobody hangs, the log tells which."""

from __future__ import annotations

import functools
import json
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from resilience import ResiliencyController
from resilience.errors import ConfigError
from resilience.requests import leave_request
from resilience.state.training_state import TrainingState
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.shared_store import SharedStore
from tests.core.training import RUN, Act, Plan, Training, World, fail, reference, said, stop, wait_until
from tests.ranks import TIMEOUT_S, Outcome, run_ranks, values

GRACE = {"term_grace_s": 1.0}


def attempt_log(directory: Path) -> dict[str, Any]:
    (path,) = (directory / "attempts").glob("*.json")
    return json.loads(path.read_text())


def stopped_with(outcomes: list[Outcome], code: int) -> bool:
    return all((outcome.error, outcome.message) == ("StoppedExit", str(code)) for outcome in outcomes)


@pytest.mark.parametrize(("elastic", "code"), [(False, 75), (True, 0)])
def test_a_stop_on_request_saves_drains_and_ends_with_its_own_status(world: World, elastic: bool, code: int) -> None:
    env = {"TORCHELASTIC_RUN_ID": "job"} if elastic else {}
    plan = world.plan("a", "b", every=100, acts=(Act(5, stop, rank=1),))
    outcomes = world.run(plan, env=env)
    assert stopped_with(outcomes, code)
    (told,) = world.events("stopped", rank=0)
    assert (told["iteration"], told["code"]) == (7, code), "a request takes effect one boundary later"
    assert set(world.copies("a")) == set(world.copies("b")) == {7}
    for node in "ab":
        log = attempt_log(world.memory / node / RUN / node)
        assert (log["end"], log["end_iteration"]) == ("stopped", 7)
    results = values(world.run(replace(plan, acts=(), seed=1)))
    assert results[0].resumed.iteration == 7
    assert tuple(ran.digest for ran in results) == reference(2)


def test_a_stop_makes_a_persistent_save_where_there_is_a_place_for_one(world: World) -> None:
    outcomes = world.run(world.plan("a", "b", save=True, every=100, acts=(Act(5, stop, rank=0),)))
    assert stopped_with(outcomes, 75)
    assert (world.disk / "save" / "iter_0000007").is_dir()
    assert world.copies("a") == {}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_to_one_rank_stops_the_job_in_order(world: World, number: signal.Signals) -> None:
    plan = world.plan("a", "b", every=100, acts=(Act(5, functools.partial(signalled, number=int(number)), rank=1),))
    assert stopped_with(world.run(plan), 75)
    assert world.events("stop_requested", rank=1)[0]["by"] == number.name
    assert len(world.copies("a")) == 1


def signalled(training: Training, number: int) -> None:
    os.kill(os.getpid(), number)
    # the thread that hears it is not this one
    wait_until(lambda: "stop" in training.trainer._controller._requests)


def test_a_request_left_in_a_nodes_directory_is_heard_once(world: World) -> None:
    save = Act(3, functools.partial(leave, what="save"), rank=0)
    outcomes = world.run(world.plan("a", "b", every=100, acts=(save, Act(8, functools.partial(leave, what="stop"), 1))))
    assert stopped_with(outcomes, 75)
    saved, stopped = sorted(world.copies("a"))
    assert (saved, stopped) == (5, 10)
    assert not list((world.memory / "a" / RUN / "a").glob("request-*"))


def leave(training: Training, what: str) -> None:
    root = Path(training.plan.memory) / training.node / RUN / training.node
    leave_request(root, what, PosixFileSystem())
    wait_until(lambda: what in training.trainer._controller._requests)  # it is looked for four times a second


def test_term_without_a_boundary_within_the_grace_ends_the_process_without_a_save(world: World) -> None:
    plan = world.plan("a", every=100, acts=(Act(5, term_and_stall),), resiliency=GRACE)
    (outcome,) = world.run(plan)
    assert outcome.status == 143
    assert world.copies("a") == {}
    assert attempt_log(world.memory / "a" / RUN / "a")["end"] == ""


def term_and_stall(training: Training) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    stall(training)


@pytest.mark.parametrize("before_the_loop", [True, False])
def test_term_outside_of_the_loop_ends_the_process_within_the_grace_too(world: World, before_the_loop: bool) -> None:
    """After a `break`, or before the first batch, no boundary will come, and nothing else would end it."""
    plan = world.plan("a", every=100, resiliency=GRACE)
    (outcome,) = run_ranks(1, linger, plan, before_the_loop, timeout_s=30)
    assert outcome.status == 143
    assert world.copies("a") == {}


def linger(rank: int, plan: Plan, before_the_loop: bool) -> None:
    training = Training(rank, plan)
    with training.start() as trainer:
        if not before_the_loop:
            for batch in trainer.iterations(plan.steps):
                training.step(batch)
                if trainer.iteration == 5:
                    break
        term_and_stall(training)


def test_term_in_the_middle_of_a_collective_ends_the_process_as_well(world: World) -> None:
    """A Python handler would wait for the main thread, which waits for the peer, which does not come."""
    plan = world.plan(
        "a", "b", acts=(Act(5, wait_for_a_peer_that_does_not_come, 0), Act(5, stall, 1)), resiliency=GRACE
    )
    first, second = world.run(plan, until=(0,))
    assert first.status == 143
    assert second.error == "TimeoutError", "the other one was never asked to end"


def test_term_ends_a_process_whose_peer_is_gone_one_boundary_later_too(world: World) -> None:
    plan = world.plan("a", "b", acts=(Act(5, term, 0), Act(6, stall, 1)), resiliency=GRACE)
    first, _ = world.run(plan, until=(0,))
    assert first.status == 143


def wait_for_a_peer_that_does_not_come(training: Training) -> None:
    threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
    dist.barrier()


def stall(training: Training) -> None:
    time.sleep(TIMEOUT_S)


def test_a_term_that_is_followed_by_a_lost_peer_is_no_orderly_end(world: World) -> None:
    plan = world.plan("a", "b", acts=(Act(5, term, 0), Act(6, fail, 1)), resiliency=GRACE)
    first, second = world.run(plan)
    assert first.status == 143
    assert second.error == "RuntimeError"


def term(training: Training) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_loop_that_hangs_is_ended_and_says_where_it_hung(world: World) -> None:
    plan = world.plan("a", acts=(Act(5, stall),), resiliency={"hang_timeout_s": 1.0})
    (outcome,) = world.run(plan)
    assert outcome.status == 1, "it ended by itself"
    assert world.events("hang")[0]["seconds"] > 1.0


def test_the_loops_own_exception_goes_through_unchanged(world: World) -> None:
    (outcome,) = world.run(world.plan("a", acts=(Act(5, fail),)))
    assert (outcome.error, outcome.message) == ("RuntimeError", "the user's own loop failed")
    assert "the user's own loop failed" in world.events("exception")[0]["error"]


def test_a_rank_that_leaves_by_exception_does_not_hang_the_others(world: World) -> None:
    plan = world.plan("a", "b", acts=(Act(5, fail, rank=1),), resiliency={"exchange_timeout_s": 4.0})
    plan = replace(plan, make=train_apart)
    first, second = world.run(plan)
    assert second.error == "RuntimeError"
    assert first.error == "PeerLostError"
    assert not [event for event in world.events("snapshot") if event["iteration"] > 6], "and saves nothing on its way"


def train_apart(training: Training) -> None:
    """No collective of the training's own: only this package's exchanges are between the ranks."""
    training.plan = replace(training.plan, nodes=(training.node,))


def test_a_stuck_peer_is_waited_for_as_long_as_its_heart_beats(world: World) -> None:
    """A long evaluation on one rank kills nobody."""
    plan = world.plan(
        "a", "b", make=train_apart, acts=(Act(5, evaluate, rank=1),), resiliency={"exchange_timeout_s": 2.0}
    )
    results = values(world.run(plan))
    assert [ran.iteration for ran in results] == [12, 12]


def evaluate(training: Training) -> None:
    time.sleep(6)  # three bounds


def test_a_loader_that_ends_early_on_one_rank_frees_the_others_from_a_save(world: World) -> None:
    plan = world.plan("a", "b", every=3, make=short_loader_on_rank_1)
    values(world.run(plan))
    assert not world.events("complete", iteration=6)
    assert set(world.copies("a")) >= {3}


def test_a_loader_that_ends_early_on_one_rank_frees_the_others(world: World) -> None:
    plan = world.plan("a", "b", every=4, make=short_loader_on_rank_1)
    first, second = values(world.run(plan))
    assert (first.iteration, second.iteration) == (12, 5)
    assert {event["iteration"] for event in world.events("snapshot")} == {4}, "no rank enters a save alone"
    assert not world.events("finished", rank=1)


def short_loader_on_rank_1(training: Training) -> None:
    train_apart(training)
    if training.rank == 1:
        training.loader = iter(list(training.loader)[:5])


def test_a_loader_that_ends_on_all_ranks_ends_the_loop_with_its_last_save(world: World) -> None:
    results = values(world.run(world.plan("a", "b", save=True, every=100, make=short_loader)))
    assert [ran.iteration for ran in results] == [5, 5]
    assert (world.disk / "save" / "iter_0000005").is_dir()
    assert len(world.events("finished")) == 2


def short_loader(training: Training) -> None:
    training.loader = iter(list(training.loader)[:5])


def test_ranks_that_disagree_on_the_end_raise_the_same_error_everywhere(world: World) -> None:
    outcomes = run_ranks(2, count_differently, world.plan("a", "b", every=100))
    assert [outcome.error for outcome in outcomes] == ["DivergedRanksError", "DivergedRanksError"]
    assert outcomes[0].message == outcomes[1].message
    assert "Iteration 3 is the last one on some ranks only" in outcomes[0].message


def count_differently(rank: int, plan: Plan) -> None:
    """People who own their loop say themselves which iteration is the last one."""
    training = Training(rank, plan)
    state = TrainingState(training.model, training.optimizer)
    controller = ResiliencyController(state, training.checkpoint, training.resiliency)
    controller.restore()
    for iteration in (1, 2, 3, 4):
        controller.after_step(iteration, last=rank == 1 and iteration == 3)


def test_a_boundary_without_an_optimizer_step_is_neither_counted_nor_saved(world: World) -> None:
    plan = world.plan("a", steps=6, every=2, make=accumulate_over_two_batches)
    (ran,) = values(world.run(plan))
    assert ran.iteration == 6
    assert ran.notes == (12,), "twelve batches were drawn"
    assert [event["iteration"] for event in world.events("snapshot")] == [2, 4, 6]


def accumulate_over_two_batches(training: Training) -> None:
    step, turns = training.optimizer.step, iter(range(1000))
    training.optimizer.step = lambda: step() if next(turns) % 2 else None
    report = training.report

    def with_the_number_of_batches() -> Any:
        training.notes.append(training.trainer._state.loader.position())
        return report()

    training.report = with_the_number_of_batches  # type: ignore[method-assign]


def test_requests_of_one_rank_are_carried_out_by_all_one_boundary_later(world: World) -> None:
    plan = world.plan("a", "b", every=100, save=True, acts=(Act(4, ask_for_a_save, 1), Act(8, ask_for_persistent, 0)))
    results = values(world.run(plan))
    assert set(world.copies("a")) == set()  # the run finished: its node memory is free again
    snapshots = [(event["iteration"], event["kind"]) for event in world.events("snapshot", rank=0)]
    assert snapshots == [(6, "non_persistent"), (10, "persistent"), (12, "persistent")]
    assert tuple(ran.digest for ran in results) == reference(2)


def ask_for_a_save(training: Training) -> None:
    training.trainer.request_save()


def ask_for_persistent(training: Training) -> None:
    training.trainer.save("persistent")


def test_an_unknown_kind_of_save_is_refused(world: World) -> None:
    (outcome,) = world.run(world.plan("a", acts=(Act(2, ask_for_nonsense),)))
    assert outcome.error == ConfigError.__name__
    assert "'persistent' or 'non_persistent'" in outcome.message


def ask_for_nonsense(training: Training) -> None:
    training.trainer.save("both")


def test_a_job_whose_directory_a_newer_start_took_over_ends_with_an_error_that_says_so(world: World) -> None:
    plan = world.plan("a", "b", kind=None, save=True, checkpoint={"save_interval": 3}, acts=(Act(4, take_over, 0),))
    outcomes = world.run(plan)
    assert [outcome.error for outcome in outcomes] == ["EvictedError", "EvictedError"]
    assert "a newer start of run" in outcomes[0].message
    saved = sorted(path.name for path in (world.disk / "save").glob("iter_*"))
    assert saved == ["iter_0000003"], "it wrote nothing any more"


def take_over(training: Training) -> None:
    """What another start of the run does, on other nodes."""
    store = SharedStore(Path(training.checkpoint.save or ""), PosixFileSystem(), source="save")
    store.take_ownership(RUN, "e" * 32, 2)


def test_a_job_stops_in_time_before_its_limit(world: World) -> None:
    env = {"SLURM_JOB_END_TIME": str(int(time.time()) + 1000)}
    plan = world.plan("a", "b", every=100, steps=400, acts=(Act(5, pause),), resiliency={"stop_before_s": 999.0})
    outcomes = world.run(plan, env=env)
    assert stopped_with(outcomes, 75)
    assert world.events("stop_requested")[0]["by"] == "the job's time limit"
    assert len(world.copies("a")) == 1


def pause(training: Training) -> None:
    wait_until(lambda: said(training, "stop_requested"))  # the limit passes meanwhile


def test_restarts_without_progress_go_to_the_next_older_save_and_then_stop(world: World) -> None:
    plan = world.plan("a", steps=30, settle=(9,), acts=(Act(9, fail),))
    world.run(plan)
    in_vain = replace(
        plan, acts=(Act(7, fail), Act(10, fail)), settle=(), every=50, resiliency={"max_restarts_without_progress": 2}
    )
    for _ in range(4):
        (outcome,) = world.run(in_vain)
        assert outcome.error == "RuntimeError", outcome
    resumed = world.events("resume")
    assert [event["iteration"] for event in resumed] == [9, 9, 6, 6]
    assert "2 restarts from it completed no newer save" in str(resumed[2]["passed_over"])
    (outcome,) = world.run(in_vain)
    assert outcome.error == "NoProgressError"
    assert "2 from iteration 6" in outcome.message
