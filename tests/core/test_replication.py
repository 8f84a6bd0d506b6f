"""Replication as it goes on while training does: links that break, saves that overlap, what is kept and certified."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import resilience.saving.replicas
from resilience.replication.clique import CliqueExchange
from tests.core.training import RUN, WAIT_S, Act, Training, World, die, reference, said, wait_until
from tests.ranks import killed, values


def break_the_link(training: Training) -> None:
    """As if the connection had been lost: this rank's end is closed under the lane's feet."""
    training.trainer._controller._saving.replicas._protection._exchange.close(failed=True)


@pytest.mark.parametrize("rank", [0, 1])
def test_replication_resumes_under_a_new_epoch_after_a_link_broke(world: World, rank: int) -> None:
    plan = world.plan("a", "b", steps=24, settle=(4, 6, 7, 8, 9, 12), acts=(Act(4, break_the_link, rank),))
    results = values(world.run(plan))
    assert tuple(ran.digest for ran in results) == reference(2, 24)
    assert world.events("replication_down"), "it was noticed"
    assert {event["rank"] for event in world.events("epoch")} == {0, 1}
    assert results[0].status["failed_saves"] == 0, "a save without replicas is no failed save"
    assert not world.events("protected", iteration=6), "the first save after the break has no replicas"
    for node, own in (("a", 0), ("b", 1)):
        assert world.copies(node)[24] == {own: "primary", 1 - own: "replica"}


def test_a_peer_that_dies_in_the_middle_of_an_exchange_leaves_no_half_replica(world: World) -> None:
    plan = world.plan("a", "b", settle=(5,), make=die_before_the_closing_frame, resiliency={"exchange_timeout_s": 5.0})
    first, second = world.run(plan)
    assert killed(second)
    assert first.error in ("PeerLostError", "RuntimeError"), "whichever collective notices first"
    assert world.copies("a").get(6, {}).get(1) is None, "no replica of what was not announced"
    results = values(world.run(replace(plan, make=None, settle=(), seed=1)))
    assert [ran.resumed.iteration for ran in results] == [3, 3]
    assert tuple(ran.digest for ran in results) == reference(2)


def die_before_the_closing_frame(training: Training) -> None:
    if training.rank == 0:
        return
    run = CliqueExchange.run

    def dying(self: CliqueExchange, offer: Any, inbox: Any) -> Any:
        if offer.save.iteration == 6:
            offer = replace(offer, digest=lambda: die(training))
        return run(self, offer, inbox)

    CliqueExchange.run = dying  # type: ignore[method-assign]


def test_a_save_that_is_still_being_replicated_when_the_next_begins_is_completed_in_order(world: World) -> None:
    plan = world.plan("a", "b", every=2, steps=8, make=slow_exchange, paced=False)
    results = values(world.run(plan))
    done = [event["iteration"] for event in world.events("protected", rank=0)]
    assert done == sorted(done)
    assert world.events("complete", rank=0, iteration=8), "the last save waits for those before it"
    assert set(world.copies("a")) == set(world.copies("b"))
    assert world.copies("a")[max(world.copies("a"))] == {0: "primary", 1: "replica"}
    assert results[0].status["failed_saves"] == 0
    assert tuple(ran.digest for ran in results) == reference(2, 8)


def slow_exchange(training: Training) -> None:
    before_each_exchange(lambda: time.sleep(0.3))


def before_each_exchange(act: Callable[[], None]) -> None:
    run = CliqueExchange.run

    def late(self: CliqueExchange, offer: Any, inbox: Any) -> Any:
        act()
        return run(self, offer, inbox)

    CliqueExchange.run = late  # type: ignore[method-assign]


def test_when_no_arena_is_free_a_save_is_skipped_on_all_ranks_and_counted(world: World) -> None:
    plan = world.plan("a", "b", every=1, steps=12, make=stuck_exchange, paced=False)
    results = values(world.run(plan))
    assert results[0].status["skipped_saves"] == results[1].status["skipped_saves"] > 0
    told = [[event["iteration"] for event in world.events("save_skipped", rank=rank)] for rank in (0, 1)]
    assert told[0] == told[1]
    assert "arenas" in world.events("save_skipped")[0]["reason"]
    assert tuple(ran.digest for ran in results) == reference(2)
    assert len(list((world.memory / "a" / RUN / "a").glob("iter_*/*/rank_00000*.safetensors"))) <= 4


def stuck_exchange(training: Training) -> None:
    """On one rank only: the others must come to the same decisions from what is agreed."""
    if training.rank == 1:
        before_each_exchange(lambda: wait_until(lambda: training.trainer.status()["skipped_saves"]))


@pytest.mark.parametrize(("keep_last", "kept"), [(1, {18}), (2, {15, 18}), (4, {9, 12, 15, 18})])
def test_only_the_last_protected_saves_are_kept(world: World, keep_last: int, kept: set[int]) -> None:
    values(world.run(world.plan("a", "b", steps=18, resiliency={"keep_last": keep_last})))
    assert set(world.copies("a")) == set(world.copies("b")) == kept
    assert {event["iteration"] for event in world.events("pruned", rank=0)} == {3, 6, 9, 12, 15, 18} - kept
    left = {path.name for path in (world.memory / "a" / RUN / "a").glob("iter_*")}
    assert left == {f"iter_{iteration:07d}" for iteration in kept}, "no empty folder stays"


def test_only_protected_saves_count_towards_those_that_are_kept(world: World) -> None:
    """While replication is down the last protected save stays, whatever newer ones there are."""
    plan = world.plan("a", "b", steps=30, settle=(4,), acts=(Act(4, no_link_any_more),), make=no_new_links)
    values(world.run(plan))
    held = world.copies("a")
    assert held[3] == {0: "primary", 1: "replica"}, "the newest protected save is never deleted"
    assert held[30] == {0: "primary"}, "nor the newest complete one"


def no_link_any_more(training: Training) -> None:
    training.trainer._controller._saving.replicas._protection.broken = True


def no_new_links(training: Training) -> None:
    resilience.saving.replicas.Replicas.epoch_wanted = lambda self: 0  # type: ignore[method-assign]


def test_every_node_certifies_what_is_complete_and_logs_what_it_completed(world: World) -> None:
    values(world.run(world.plan("a", "b")))
    for node in "ab":
        root = world.memory / node / RUN / node
        certificates = sorted(root.glob("iter_*/*/complete.json"))
        assert [json.loads(path.read_text())["iteration"] for path in certificates] == [9, 12]
        assert all(json.loads(path.read_text())["protected"] for path in certificates)
        (save,) = (each for each in world.store(node).reader.inventory([node]).node_saves if each.save.iteration == 12)
        digests = {str(owner): digest for owner, digest in zip(save.owners, save.digests, strict=True)}
        assert json.loads(certificates[-1].read_text())["digests"] == digests, "of its own copies and of those it holds"
        (log,) = (root / "attempts").glob("*.json")
        read = json.loads(log.read_text())
        assert (read["completed"]["iteration"], read["end"], read["end_iteration"]) == (12, "finished", 12)


@pytest.mark.parametrize(("save", "keep", "stays"), [(True, False, False), (True, True, True), (False, False, True)])
def test_a_finished_run_frees_node_memory_if_its_last_save_is_elsewhere(
    world: World, save: bool, keep: bool, stays: bool
) -> None:
    values(world.run(world.plan("a", "b", save=save, resiliency={"keep_after_success": keep})))
    assert bool(world.copies("a")) == stays
    assert not list((world.memory / "a" / RUN / "a" / ".arenas").iterdir())
    if not save:
        assert any("stay on the nodes" in event["what"] for event in world.events("warning"))
    if save and not stays:
        assert not list((world.memory / "a" / RUN / "a").glob("iter_*"))
        (ran, _) = values(world.run(world.plan("a", "b", save=save, steps=15)))
        assert (ran.resumed.iteration, ran.resumed.tier) == (12, "persistent")


def test_the_last_persistent_save_waits_for_the_one_before(world: World) -> None:
    plan = world.plan(
        "a", "b", kind=None, save=True, make=slow_drain, paced=False,
        checkpoint={"save_interval": 11, "async_save": True},
    )  # fmt: skip
    results = values(world.run(plan))
    assert (world.disk / "save" / "iter_0000012").is_dir()
    assert tuple(ran.digest for ran in results) == reference(2)


def slow_drain(training: Training) -> None:
    before_each_drain(lambda: time.sleep(0.7))


def before_each_drain(act: Callable[[], None]) -> None:
    from resilience.formats.saver import SharedSaver

    run = SharedSaver.run

    def late(self: SharedSaver, job: Any, *rest: Any) -> None:
        act()
        run(self, job, *rest)

    SharedSaver.run = late  # type: ignore[method-assign]


def test_a_persistent_save_that_cannot_begin_slides_to_the_next_boundary(world: World) -> None:
    plan = world.plan(
        "a", "b", kind=None, save=True, steps=9, make=drains_until_one_slid, paced=False,
        checkpoint={"save_interval": 4, "async_save": True}, resiliency={"keep_persistent": 5},
    )  # fmt: skip
    values(world.run(plan))
    saved = sorted(path.name for path in (world.disk / "save").glob("iter_*"))
    assert saved == ["iter_0000004", "iter_0000009"], "that of 8 slid to 9, which is the last one anyway"


def drains_until_one_slid(training: Training) -> None:
    before_each_drain(lambda: wait_until(lambda: said(training, "save_skipped", iteration=8)))


def test_a_snapshot_on_its_way_to_shared_storage_is_not_filled_anew_when_its_copy_is_deleted(world: World) -> None:
    plan = world.plan(
        "a", "b", every=1, save=True, make=drains_until_2_is_pruned, paced=False, settle=(9,), acts=(Act(9, die),),
        checkpoint={"save_interval": 2, "async_save": True}, resiliency={"keep_last": 1},
    )  # fmt: skip
    assert all(map(killed, world.run(plan)))
    pruned = [event["t"] for event in world.events("pruned", iteration=2)]
    drained = [event["t"] for event in world.events("committed", iteration=2, tier="persistent")]
    assert max(pruned) < min(drained), "the copy on the nodes went while the drain was reading it"
    world.lose("a")
    world.lose("b")
    for folder in (world.disk / "save").glob("iter_*"):
        if folder.name != "iter_0000002":
            shutil.rmtree(folder)
    results = values(world.run(replace(plan, make=None, acts=(), settle=(), seed=1)))
    assert [ran.resumed.iteration for ran in results] == [2, 2]
    assert tuple(ran.digest for ran in results) == reference(2)


def drains_until_2_is_pruned(training: Training) -> None:
    before_each_drain(lambda: wait_until(lambda: len(said(training, "pruned", iteration=2)) == 2))


def test_a_run_killed_before_its_last_persistent_save_makes_it_at_the_restart(world: World) -> None:
    """The loop was complete, its last state lies on the nodes only: the restart has nothing to train, but to save."""
    plan = world.plan("a", "b", save=True, make=die_in_the_drain)
    assert all(map(killed, world.run(plan)))
    assert not (world.disk / "save" / "iter_0000012").exists()
    results = values(world.run(replace(plan, make=None, seed=1)))
    assert [ran.resumed.iteration for ran in results] == [12, 12]
    assert (world.disk / "save" / "iter_0000012").is_dir()
    assert world.copies("a") == {}, "and node memory is free"
    assert tuple(ran.digest for ran in results) == reference(2)


def die_in_the_drain(training: Training) -> None:
    from resilience.formats.saver import SharedSaver

    def dying(self: SharedSaver, job: Any, *rest: Any) -> None:
        training.trainer._controller._saving.lanes.protect.wait(WAIT_S)
        training.meet("the drain")
        die(training)

    SharedSaver.run = dying  # type: ignore[method-assign]


# -- what ranks have in common -----------------------------------------------------------------------------------------


def test_what_differs_from_rank_to_rank_is_stored_per_rank_and_comes_back_to_each(world: World) -> None:
    """Batch norm's statistics differ; the parameters are split over the ranks."""
    plan = world.plan("a", "b", settle=(6,), acts=(Act(8, die),))
    world.run(plan)
    first, second = (world.store(node).reader.inventory().node_saves[-1] for node in "ab")
    assert first.split
    assert second.split
    small = min(first.nbytes)
    values(world.run(replace(plan, checkpoint={"non_persistent_local_ckpt_algo": "atomic"}, acts=(), steps=9)))
    assert min(world.store("a").reader.inventory().node_saves[-1].nbytes) >= small


def test_an_item_that_becomes_unequal_later_fails_that_save_and_is_per_rank_from_then_on(world: World) -> None:
    plan = world.plan(
        "a", "b", steps=15, settle=(8,), make=with_a_shared_buffer, acts=(Act(4, change_the_buffer, rank=1),)
    )
    results = values(world.run(plan))
    (failed,) = world.events("save_failed", rank=0, iteration=6)[:1]
    assert "should be equal on all data-parallel ranks differs" in failed["error"]
    assert results[0].status["failed_saves"] == 1
    (unequal,) = (event for event in world.events("unequal_items", rank=0) if "model/0/shared" in event["keys"])
    assert unequal
    again = values(world.run(replace(plan, acts=(), settle=(), seed=1, steps=16)))
    assert [ran.resumed.iteration for ran in again] == [15, 15]
    assert [ran.notes for ran in again] == [(0.0,), (1.0,)], "each rank has its own back"


def with_a_shared_buffer(training: Training) -> None:
    training.model.register_buffer("shared", torch.zeros(()))
    report = training.report

    def with_the_buffer() -> Any:
        training.notes.append(float(training.model.shared))
        return report()

    training.report = with_the_buffer  # type: ignore[method-assign]


def change_the_buffer(training: Training) -> None:
    training.model.shared += 1


def test_a_parameter_that_differs_at_the_first_save_is_told_once(world: World) -> None:
    plan = world.plan("a", "b", make=another_start_on_rank_1)
    assert all(map(killed, world.run(replace(plan, settle=(6,), acts=(Act(8, die),)))))
    resumed = values(world.run(replace(plan, seed=1)))
    assert tuple(ran.digest for ran in resumed) == reference(2, 12, another_start_on_rank_1), "each has its own back"
    told = world.events("unequal_items", rank=0)
    assert len(told) == 2, "once in each attempt"
    assert "model/0/down.weight" in told[0]["keys"]
    assert not any("running" in key for key in told[0]["keys"]), "buffers may differ"


def another_start_on_rank_1(training: Training) -> None:
    if training.rank == 1:
        with torch.no_grad():
            training.model.down.weight += 1


# -- after a restart ---------------------------------------------------------------------------------------------------


def test_saves_of_the_attempts_before_go_once_this_one_has_its_own(world: World) -> None:
    plan = world.plan("a", "b", settle=(6,), acts=(Act(8, die),))
    assert all(map(killed, world.run(plan)))
    values(world.run(replace(plan, acts=(), settle=(), steps=9, seed=1)))
    assert {(save.iteration, save.generation) for save in world.saves("a")} == {(6, 1), (9, 2)}
    assert {(save.iteration, save.generation) for save in world.saves("b")} == {(6, 1), (9, 2)}


def test_rank_threads_and_files_are_gone_after_close(world: World) -> None:
    (left,) = {ran.notes for ran in values(world.run(world.plan("a", "b", make=count_what_is_left)))}
    assert left == ((),)


def count_what_is_left(training: Training) -> None:
    run = training.run

    def then_count() -> Any:
        ran = run()
        deadline = time.monotonic() + WAIT_S
        while (names := background_threads()) and time.monotonic() < deadline:
            time.sleep(0.01)
        return replace(ran, notes=(names,))

    training.run = then_count  # type: ignore[method-assign]


def background_threads() -> tuple[str, ...]:
    return tuple(sorted(each.name for each in threading.enumerate() if each.name.startswith("resilience")))


def test_lanes_that_break_are_reported_and_the_save_counts_as_failed(world: World) -> None:
    plan = world.plan("a", "b", make=broken_lane_on_rank_1, settle=(8,))
    results = values(world.run(plan))
    assert results[0].status["failed_saves"] == 1
    assert any("a mistake of ours" in event["what"] for event in world.events("warning", rank=1))
    assert {9, 12} <= set(world.copies("a"))


def broken_lane_on_rank_1(training: Training) -> None:
    run = CliqueExchange.run
    if training.rank == 1:

        def breaking(self: CliqueExchange, offer: Any, inbox: Any) -> Any:
            result = run(self, offer, inbox)
            if offer.save.iteration == 6:
                raise ValueError("a mistake of ours")
            return result

        CliqueExchange.run = breaking  # type: ignore[method-assign]
