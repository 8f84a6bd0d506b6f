"""`explain` decides as the restore does: on handmade stores case by case, and against real restarts."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resilience.errors import NoUsableSaveError
from resilience.explain import explain_paths
from tests.cli.stores import RUN, World, ask, ask_json, flip, save_id
from tests.core import training
from tests.core.training import Act, die
from tests.formats.worlds import RUN as SHARED_RUN
from tests.ranks import killed, values
from tests.stores.test_shared_store import fill, owned, publish


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def decided(iteration: int, generation: int = 1, tier: str = "local") -> dict[str, Any]:
    return {"iteration": iteration, "generation": generation, "tier": tier}


def test_the_newest_complete_save_is_resumed_from_and_newer_ones_are_passed_over(capsys: Any, world: World) -> None:
    world.save(10)
    world.save(20)
    world.save(30, owners=[0, 1], replicas=False, certified=False)
    document = ask_json(capsys, "explain", *world.local)
    assert document["decision"] == decided(20)
    (passed,) = document["passed_over"]
    assert (passed["iteration"], passed["tier"]) == (30, "local")
    assert "no usable copy of the shard of rank 2" in passed["reason"]
    assert set(passed) == {"iteration", "generation", "tier", "reason"}


def test_where_nothing_was_saved_the_answer_is_a_fresh_start_and_bad_news(capsys: Any, tmp_path: Path) -> None:
    document = ask_json(capsys, "explain", "--local", tmp_path, status=1)
    assert (document["decision"], document["fresh"], document["retrieval"]) == (None, True, [])
    assert "begin afresh" in ask(capsys, "explain", "--local", tmp_path).out


def test_a_save_that_was_complete_and_is_lost_stops_the_start_and_says_why(capsys: Any, world: World) -> None:
    world.save(10, replicas=False)
    world.log(1, completed=save_id(10))
    shutil.rmtree(world.base("node2"))
    document = ask_json(capsys, "explain", *world.local_but("node2"), status=1)
    assert (document["decision"], document["fresh"]) == (None, False)
    assert "once completed iteration 10" in document["reason"]
    assert "Bring back the missing nodes" in document["advice"]
    with pytest.raises(NoUsableSaveError):
        explain_paths([world.base(node) for node in world.nodes], None, None, RUN)


def test_a_new_node_fetches_what_a_lost_node_had(capsys: Any, world: World) -> None:
    world.save(10, split=False)
    shutil.rmtree(world.base("node2"))
    document = ask_json(capsys, "explain", *world.local_but("node2"))
    assert document["nodes"] == ["node0", "node1", "new-0", "node3"]
    (fetch,) = document["retrieval"]
    assert fetch == {
        "owner": 2,
        "from_node": "node3",
        "to_node": "new-0",
        "to_rank": 2,
        "bytes": world.shard(save_id(10), 2, "node3").stat().st_size,
    }


def test_what_is_split_over_a_group_travels_to_every_node_of_it(capsys: Any, world: World) -> None:
    world.save(10, replicas=False)
    document = ask_json(capsys, "explain", *world.local)
    assert {(fetch["owner"], fetch["to_node"]) for fetch in document["retrieval"]} == {
        (owner, f"node{node}") for owner in range(4) for node in range(4) if owner != node
    }
    assert document["own_copies"] == 4


def test_a_damaged_copy_is_struck_off_and_its_replica_is_taken(capsys: Any, world: World) -> None:
    save = world.save(10, split=False)
    flip(world.shard(save, 1, "node1"))
    document = ask_json(capsys, "explain", *world.local)
    assert document["decision"] == decided(10)
    (bad,) = document["bad_copies"]
    assert (bad["where"], bad["owner"], bad["iteration"]) == ("node1", 1, 10)
    (fetch,) = document["retrieval"]
    assert (fetch["owner"], fetch["from_node"], fetch["to_node"]) == (1, "node2", "node1")


def test_a_save_without_a_sound_copy_left_gives_way_to_the_older_one(capsys: Any, world: World) -> None:
    world.save(10)
    save = world.save(20)
    for node in ("node1", "node2"):
        flip(world.shard(save, 1, node))
    document = ask_json(capsys, "explain", *world.local)
    assert document["decision"] == decided(10)
    assert len(document["bad_copies"]) == 2
    assert [each["iteration"] for each in document["passed_over"]] == [20]
    assert "2 copies failed to read or verify" in document["passed_over"][0]["reason"]


def test_a_flipped_header_is_as_bad_as_a_flipped_byte(capsys: Any, world: World) -> None:
    save = world.save(10)
    flip(world.shard(save, 0, "node0"), at=30)
    document = ask_json(capsys, "explain", *world.local)
    assert document["decision"] == decided(10)
    assert [bad["owner"] for bad in document["bad_copies"]] == [0]


@pytest.mark.parametrize("world_size", [1, 3, 8])
def test_another_world_size_would_resume_from_the_same_save(capsys: Any, world: World, world_size: int) -> None:
    world.save(10)
    document = ask_json(capsys, "explain", "--world-size", world_size, *world.local)
    assert document["decision"] == decided(10)
    assert (document["world_size"], document["saved_by"]) == (world_size, 4)
    assert [each["owner"] for each in document["shown"]] == [0, 1, 2, 3]
    assert {each["rank"] for each in document["shown"]} <= set(range(world_size))


def test_a_bad_copy_is_found_before_a_start_of_another_world_size(capsys: Any, world: World) -> None:
    save = world.save(10)
    first = ask_json(capsys, "explain", "--world-size", 3, *world.local)["shown"][0]
    flip(world.shard(save, 0, first["node"]), at=-10)
    document = ask_json(capsys, "explain", "--world-size", 3, *world.local)
    assert document["decision"] == decided(10)
    assert [(bad["owner"], bad["where"]) for bad in document["bad_copies"]] == [(0, first["node"])]
    assert document["shown"][0]["node"] != first["node"]


def test_another_world_size_is_in_the_way_without_elastic(capsys: Any, world: World) -> None:
    world.save(10)
    document = ask_json(capsys, "explain", "--world-size", 8, "--no-elastic", *world.local, status=1)
    assert document["world_size"] == 8
    assert "saved by 4 ranks, and this start has 8" in str(document["passed_over"])


def test_abandoned_saves_are_passed_over(capsys: Any, world: World) -> None:
    world.abandon()
    document = ask_json(capsys, "explain", *world.local)
    assert document["decision"] == decided(11, 2)
    assert "abandoned" in document["passed_over"][0]["reason"]


def test_an_unreadable_directory_is_mentioned_where_it_does_not_matter(
    capsys: Any, world: World, monkeypatch: Any
) -> None:
    world.save(10)
    refuse_to_list(monkeypatch, world.base("node1") / RUN / "node1" / "iter_0000010")
    document = ask_json(capsys, "explain", *world.local)
    assert document["decision"] == decided(10)
    assert "node1: cannot list" in document["unknown"][0]


def test_an_unreadable_directory_that_may_hold_something_newer_is_no_answer(
    capsys: Any, world: World, monkeypatch: Any
) -> None:
    world.save(10)
    newer = world.save(20, replicas=False)
    world.log(1, completed=newer)
    refuse_to_list(monkeypatch, world.base("node1") / RUN / "node1" / "iter_0000020")
    error = ask_json(capsys, "explain", *world.local, status=3)["error"]
    assert error["type"] == "SourceUnavailableError"
    assert "iteration 20 was complete once" in error["message"]


def test_shared_storage_that_cannot_be_read_is_treated_as_the_restore_does(
    capsys: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    nodes = World(tmp_path, ranks=2, run_id=SHARED_RUN)
    nodes.save(30)
    publish(owned(tmp_path / "save"), 20)
    words = ("explain", *nodes.local, "--save", tmp_path / "save", "--run-id", SHARED_RUN)
    refuse_to_list(monkeypatch, tmp_path / "save")
    document = ask_json(capsys, *words)
    assert (document["decision"], len(document["unknown"])) == (decided(30), 1)
    nodes.log(1, completed=save_id(40))
    assert "iteration 40" in ask_json(capsys, *words, status=3)["error"]["message"]


def refuse_to_list(monkeypatch: Any, refused: Path) -> None:
    listdir = os.listdir

    def refuse(path: Any) -> list[str]:
        if Path(path) == refused:
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)


# --- shared storage --------------------------------------------------------------------------------------------------


def test_the_newest_of_nodes_and_shared_storage_is_taken(capsys: Any, world: World, tmp_path: Path) -> None:
    shared = World(tmp_path, ranks=2, run_id=SHARED_RUN)
    shared.save(15)
    publish(owned(tmp_path / "save"), 10)
    publish(owned(tmp_path / "save"), 20)
    document = ask_json(capsys, "explain", *shared.local, "--save", tmp_path / "save")
    assert document["decision"] == decided(20, tier="persistent")
    (checkpoint,) = (tmp_path / "save" / "iter_0000020").glob("__0_*.distcp")
    flip(checkpoint)
    document = ask_json(capsys, "explain", *shared.local, "--save", tmp_path / "save")
    assert document["decision"] == decided(15)
    assert "does not match its SHA-256" in document["bad_copies"][0]["reason"]


def test_ckpt_step_is_a_fork_to_that_checkpoint(capsys: Any, tmp_path: Path) -> None:
    store = owned(tmp_path / "save")
    publish(store, 10)
    publish(store, 20)
    document = ask_json(capsys, "explain", "--save", tmp_path / "save", "--ckpt-step", 10)
    assert document["decision"] == decided(10, tier="persistent")
    assert "ckpt_step=10 asks for an older one" in str(document["passed_over"])
    missing = ask_json(capsys, "explain", "--save", tmp_path / "save", "--ckpt-step", 15, status=1)
    assert "there is 10, 20" in missing["reason"]


def test_a_directory_that_belongs_to_another_run_is_refused_as_the_start_would_be(capsys: Any, tmp_path: Path) -> None:
    publish(owned(tmp_path / "save"), 10)
    error = ask_json(capsys, "explain", "--save", tmp_path / "save", "--run-id", "other", status=2)["error"]
    assert f"belongs to run {SHARED_RUN!r}" in error["message"]


class Crash(Exception):
    pass


def test_a_commit_interrupted_anywhere_is_predicted_as_the_next_start_will_heal_it(tmp_path: Path) -> None:
    generations = []
    for calls in itertools.count(1):
        generation, ended = interrupted_commit(tmp_path / str(calls), calls)
        generations.append(generation)
        if ended:
            break
    assert generations == sorted(generations)
    assert generations[0] == 1, "before the commit has begun the older checkpoint stays"
    assert generations[-1] == 2


def interrupted_commit(root: Path, calls: int) -> tuple[int, bool]:
    """The commit of 20 over an older 20 stops before the n-th change; what is told is what healing then leaves."""
    publish(owned(root, "a" * 32, 1), 10)
    publish(owned(root, "a" * 32, 1), 20, "a" * 32, 1)
    store = owned(root, "b" * 32, 2)
    fill(store.begin(20, "b" * 32), 20, "b" * 32, 2)
    ended = interrupt(store, calls)
    before = sorted(path.relative_to(root) for path in root.rglob("*"))
    predicted = explain_paths([], root, None, SHARED_RUN)
    assert sorted(path.relative_to(root) for path in root.rglob("*")) == before, "explain changed something"
    owned(root, "c" * 32, 3).heal()
    assert predicted == explain_paths([], root, None, SHARED_RUN)
    assert predicted is not None
    assert predicted["iteration"] == 20
    return int(predicted["generation"]), ended


def interrupt(store: Any, calls: int) -> bool:
    """Commit until the `calls`-th rename, write or removal, which does not happen any more; whether it never came."""
    fs, left = store._fs, [calls]

    def counted(change: Callable[..., Any]) -> Callable[..., Any]:
        def one(self: Any, *args: Any, **kwargs: Any) -> Any:
            left[0] -= 1
            if left[0] == 0:
                raise Crash
            return change(*args, **kwargs)

        return one

    class Broken(type(fs)):  # type: ignore[misc]
        pass

    for name in ("rename", "write_atomic", "unlink", "remove_tree", "fsync_dir"):
        setattr(Broken, name, counted(getattr(fs, name)))
    store._fs = Broken()
    try:
        store.commit(20, "b" * 32)
        return True
    except Crash:
        return False
    finally:
        store._fs = fs


# --- against real restarts -------------------------------------------------------------------------------------------


@pytest.fixture
def job(memory_mount: Path, tmp_path: Path) -> training.World:
    return training.World(memory_mount, tmp_path)


def told(job: training.World, *nodes: str) -> Any:
    save = job.disk / "save"
    local = [base / node for node in nodes for base in (job.memory, job.disk)]
    return explain_paths(local, save if save.exists() else None, None, RUN, len(nodes))


def lose_a_node(job: training.World) -> None:
    job.lose("a")


def damage_a_primary(job: training.World) -> None:
    job.damage("a", 6, 0)


def damage_every_copy(job: training.World) -> None:
    for node in ("a", "b"):
        job.damage(node, 6, 0)


@pytest.mark.parametrize(
    ("harm", "nodes"),
    [(lose_a_node, ("c", "b")), (damage_a_primary, ("a", "b")), (damage_every_copy, ("a", "b"))],
)
def test_a_real_restart_resumes_from_what_was_told(
    job: training.World, harm: Callable[[training.World], None], nodes: tuple[str, ...]
) -> None:
    plan = job.plan(
        "a", "b", every=3, save=True, checkpoint={"save_interval": 4}, settle=(3, 4, 6), acts=(Act(6, die),)
    )
    assert all(killed(outcome) for outcome in job.run(plan))
    harm(job)
    expected = told(job, *nodes)
    assert expected is not None
    resumed = values(job.run(job.plan(*nodes, every=3, save=True, steps=8)))[0].resumed
    assert {key: getattr(resumed, key) for key in ("iteration", "generation", "tier")} == expected
    assert expected["iteration"] == (4 if harm is damage_every_copy else 6)
