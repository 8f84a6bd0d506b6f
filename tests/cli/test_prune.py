"""`prune`: what it deletes, what it never deletes, and whom it asks first."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from resilience.planning.inventory import SaveId
from tests.cli.stores import RUN, World, ask, ask_json, save_id
from tests.formats.worlds import RUN as SHARED_RUN
from tests.stores.test_shared_store import loads, owned, publish


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def here(world: World) -> set[int]:
    """Iterations of which any node still holds anything."""
    return {int(path.name[5:]) for path in world.root.glob("node*/run/node*/iter_*")}


def iterations(saves: list[dict[str, Any]]) -> list[int]:
    return sorted(save["iteration"] for save in saves)


def test_the_newest_saves_are_kept_and_the_others_deleted_everywhere(capsys: Any, world: World) -> None:
    for iteration in (10, 20, 30, 40):
        world.save(iteration)
    before = sum(path.stat().st_size for path in world.root.rglob("rank_*.safetensors"))
    document = ask_json(capsys, "prune", "--keep-last", 2, *world.local)
    assert (iterations(document["deleted"]), iterations(document["kept"])) == ([10, 20], [30, 40])
    assert here(world) == {30, 40}
    assert document["bytes_freed"] == before // 2
    assert ask_json(capsys, "verify", "--deep", *world.local)["ok"]


def test_without_a_number_no_complete_save_goes(capsys: Any, world: World) -> None:
    for iteration in (10, 20, 30):
        world.save(iteration)
    assert ask_json(capsys, "prune", *world.local)["deleted"] == []
    assert here(world) == {10, 20, 30}


def test_the_newest_complete_and_the_newest_fully_replicated_save_stay(capsys: Any, world: World) -> None:
    world.save(10)
    world.save(20)
    world.save(30, replicas=False)
    document = ask_json(capsys, "prune", "--keep-last", 1, *world.local)
    assert iterations(document["deleted"]) == [10]
    assert here(world) == {20, 30}


def test_a_dry_run_tells_and_deletes_nothing_and_needs_no_lock(capsys: Any, world: World) -> None:
    world.save(10)
    world.save(20)
    with world.live("node0"):
        document = ask_json(capsys, "prune", "--keep-last", 1, "--dry-run", *world.local)
    assert iterations(document["deleted"]) == [10]
    assert here(world) == {10, 20}
    assert "Would be deleted" in ask(capsys, "prune", "--keep-last", 1, "--dry-run", *world.local).out


def test_a_live_job_is_not_pruned_at_all(capsys: Any, world: World) -> None:
    """The lock of one node is enough to leave every node alone."""
    world.save(10)
    world.save(20)
    with world.live("node3"):
        error = ask_json(capsys, "prune", "--keep-last", 1, *world.local, status=3)["error"]
    assert error["type"] == "AnotherJobError"
    assert here(world) == {10, 20}
    ask_json(capsys, "prune", "--keep-last", 1, *world.local)
    assert here(world) == {20}


def test_abandoned_saves_go_even_if_they_are_newer(capsys: Any, world: World) -> None:
    world.abandon()
    document = ask_json(capsys, "prune", *world.local)
    assert iterations(document["deleted"]) == [20]
    assert here(world) == {10, 11}


def test_where_a_node_is_out_of_sight_only_leftovers_and_abandoned_saves_go(capsys: Any, world: World) -> None:
    base = world.save(10, replicas=False)
    world.save(20, replicas=False)
    newer = world.save(11, generation=2, replicas=False)
    world.log(1, completed=save_id(20))
    world.log(2, base=base, completed=newer)
    leftover = world.store("node0").arenas / "rank_00000-for_00000-0.arena"
    leftover.write_bytes(b"x" * 1000)
    document = ask_json(capsys, "prune", "--keep-last", 1, *world.local_but("node2"))
    assert iterations(document["deleted"]) == [20]
    assert (document["temporary_files"], leftover.exists()) == (1, False)
    assert "not all owners" in document["restraints"][0]
    left = [path.parent.name for path in world.root.glob("node*/run/node*/iter_0000020")]
    assert left == ["node2"], "node2 was not given, and keeps its copy"
    assert here(world) == {10, 11, 20}


def test_where_something_newer_was_complete_and_is_out_of_sight_nothing_complete_goes(
    capsys: Any, world: World
) -> None:
    world.save(10)
    world.save(20)
    newest = world.save(30)
    for node in world.nodes:
        folder = world.shard(newest, 0, node).parent
        for shard in folder.glob("rank_*"):
            shard.unlink()  # its certificate is all that is left of it
    document = ask_json(capsys, "prune", "--keep-last", 1, *world.local)
    assert document["deleted"] == []
    assert "iteration 30 was complete once" in document["restraints"][0]
    assert here(world) == {10, 20, 30}


def test_incomplete_saves_go_if_they_are_older_than_a_complete_one(capsys: Any, world: World) -> None:
    world.save(10, owners=[0, 1], replicas=False, certified=False)
    world.save(20)
    world.save(30, owners=[0, 1], replicas=False, certified=False)
    document = ask_json(capsys, "prune", *world.local)
    assert iterations(document["deleted"]) == [10]
    assert {save["iteration"]: save["reason"] for save in document["kept"]}[30].startswith("incomplete here")


def test_temporary_files_and_bytes_without_a_record_are_swept(capsys: Any, world: World) -> None:
    save = world.save(10)
    orphan = world.shard(save, 0, "node0")
    orphan.with_suffix(".json").unlink()
    (world.store("node1").arenas / "rank_00001-for_00001-3.arena").write_bytes(b"x" * 100)
    document = ask_json(capsys, "prune", *world.local)
    assert (document["temporary_files"], orphan.exists()) == (2, False)


def test_forgetting_a_run_frees_all_that_nodes_hold_of_it_and_of_nothing_else(capsys: Any, tmp_path: Path) -> None:
    kept, gone = World(tmp_path, run_id="kept"), World(tmp_path, run_id="gone")
    kept.save(10)
    gone.save(20)
    document = ask_json(capsys, "prune", "--forget", "gone", *kept.local)
    assert iterations(document["deleted"]) == [20]
    assert [path.name for path in kept.base("node0").iterdir()] == ["kept"]
    assert iterations(ask_json(capsys, "ls", *kept.local)["saves"]) == [10]


def test_forgetting_needs_the_lock_and_a_run_that_is_there(capsys: Any, world: World) -> None:
    world.save(10)
    assert "nothing of run 'other'" in str(ask_json(capsys, "prune", "--forget", "other", *world.local, status=2))
    with world.live("node1"):
        assert ask(capsys, "prune", "--forget", RUN, *world.local).status == 3
    assert here(world) == {10}


def test_persistent_checkpoints_are_not_forgotten(capsys: Any, world: World, tmp_path: Path) -> None:
    world.save(10)
    publish(owned(tmp_path / "save"), 10)
    words = ("prune", "--forget", RUN, *world.local, "--save", tmp_path / "save")
    assert ask_json(capsys, *words, status=2)["error"]["type"] == "ConfigError"
    assert here(world) == {10}


def test_persistent_checkpoints_beyond_a_number_go_and_the_owner_stays(capsys: Any, tmp_path: Path) -> None:
    root = tmp_path / "save"
    store = owned(root)
    for iteration in (10, 20, 30):
        publish(store, iteration)
    planned = ask_json(capsys, "prune", "--keep-persistent", 1, "--dry-run", "--save", root)
    assert (root / "iter_0000010").exists()
    done = ask_json(capsys, "prune", "--keep-persistent", 1, "--save", root)
    assert iterations(planned["deleted"]) == iterations(done["deleted"]) == [10, 20]
    assert iterations(done["kept"]) == [30]
    assert sorted(path.name for path in root.glob("iter_*")) == ["iter_0000030"]
    loads(root, SaveId(30, 1, "a" * 32))
    publish(store, 40)  # the job that owns the directory was not thrown out


def test_a_persistent_checkpoint_that_the_tracker_names_stays(capsys: Any, tmp_path: Path) -> None:
    root = tmp_path / "save"
    store = owned(root)
    for iteration in (10, 20, 30):
        publish(store, iteration)
    shutil.copy(root / "iter_0000010" / "train_state.pt", root / "latest_train_state.pt")
    (root / "latest_checkpointed_iteration.txt").write_text("10")
    document = ask_json(capsys, "prune", "--keep-persistent", 1, "--save", root, "--run-id", SHARED_RUN)
    assert document["deleted"] == []
    assert len(list(root.glob("iter_*"))) == 3
