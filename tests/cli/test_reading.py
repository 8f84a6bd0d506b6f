"""`ls`, `verify` and `inspect` on stores of several nodes, sound and damaged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from resilience.stores.node_reader import NodeReader
from tests.cli.stores import FS, RUN, World, ask, ask_json, attempt_id, flip, save_id


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def iterations(document: dict[str, Any]) -> list[int]:
    return [save["iteration"] for save in document["saves"]]


class TestLs:
    def test_copies_of_all_nodes_are_one_save_newest_first(self, capsys: Any, world: World) -> None:
        world.save(10)
        world.save(20)
        saves = ask_json(capsys, "ls", *world.local)["saves"]
        assert iterations({"saves": saves}) == [20, 10]
        newest = saves[0]
        assert newest | {"bytes": 0, "held_bytes": 0} == {
            "iteration": 20,
            "generation": 1,
            "attempt": attempt_id(1),
            "tier": "local",
            "run_id": RUN,
            "world_size": 4,
            "owners_present": 4,
            "copies": 2,
            "bytes": 0,
            "held_bytes": 0,
            "rebuildable": 0,
            "parity": 0,
            "complete": True,
            "abandoned": False,
            "where": ["node0", "node1", "node2", "node3"],
            "reason": "",
        }
        assert newest["held_bytes"] == 2 * newest["bytes"]

    def test_copies_is_the_minimum_over_owners(self, capsys: Any, world: World) -> None:
        world.save(10)
        shutil.rmtree(world.base("node2"))
        (save,) = ask_json(capsys, "ls", *world.local_but("node2"))["saves"]
        assert (save["owners_present"], save["copies"], save["complete"]) == (4, 1, True)

    def test_a_save_that_lacks_an_owner_is_incomplete(self, capsys: Any, world: World) -> None:
        world.save(10, owners=[0, 1, 2], replicas=False)
        (save,) = ask_json(capsys, "ls", *world.local)["saves"]
        assert (save["owners_present"], save["copies"], save["complete"]) == (3, 0, False)

    def test_saves_that_a_later_attempt_left_behind_are_abandoned(self, capsys: Any, world: World) -> None:
        base = world.save(10)
        world.save(20)
        newer = world.save(11, generation=2)
        world.log(1, completed=save_id(20))
        world.log(2, base=base, completed=newer)
        told = {s["iteration"]: s["abandoned"] for s in ask_json(capsys, "ls", *world.local)["saves"]}
        assert told == {20: True, 11: False, 10: False}
        assert "abandoned: attempt g0002-02020202" in ask(capsys, "ls", *world.local).out

    @pytest.mark.parametrize("given", [(), (RUN,), (RUN, "node1")])
    def test_a_local_directory_may_be_given_at_each_of_its_levels(
        self, capsys: Any, world: World, given: tuple[str, ...]
    ) -> None:
        world.save(10)
        (save,) = ask_json(capsys, "ls", "--local", world.base("node1").joinpath(*given))["saves"]
        assert (save["where"], save["owners_present"]) == (["node1"], 2)

    def test_a_node_directory_shows_that_node_only_though_others_lie_beside_it(
        self, capsys: Any, tmp_path: Path
    ) -> None:
        world = World(tmp_path)
        world.save(10)
        one = tmp_path / "all" / RUN
        one.mkdir(parents=True)
        for node in world.nodes:
            shutil.copytree(world.base(node) / RUN / node, one / node)
        (alone,) = ask_json(capsys, "ls", "--local", one / "node1")["saves"]
        (together,) = ask_json(capsys, "ls", "--local", tmp_path / "all")["saves"]
        assert (alone["where"], together["owners_present"], together["copies"]) == (["node1"], 4, 2)

    def test_a_directory_given_twice_counts_once(self, capsys: Any, world: World, tmp_path: Path) -> None:
        world.save(10, replicas=False)
        link = tmp_path / "link"
        link.symlink_to(world.base("node0"))
        (save,) = ask_json(capsys, "ls", *world.local, "--local", link, "--local", world.base("node0") / RUN)["saves"]
        assert save["copies"] == 1

    def test_run_id_chooses_among_runs(self, capsys: Any, tmp_path: Path) -> None:
        for name in ("one", "two"):
            World(tmp_path, run_id=name).save(10)
        local = World(tmp_path).local
        assert {save["run_id"] for save in ask_json(capsys, "ls", *local)["saves"]} == {"one", "two"}
        assert {save["run_id"] for save in ask_json(capsys, "ls", *local, "--run-id", "two")["saves"]} == {"two"}

    def test_an_empty_directory_holds_no_saves(self, capsys: Any, tmp_path: Path) -> None:
        assert ask_json(capsys, "ls", "--local", tmp_path) == {"saves": [], "authenticated": False, "notes": []}
        assert "no saves" in ask(capsys, "ls", "--local", tmp_path).out

    def test_the_table_has_one_line_per_save(self, capsys: Any, world: World) -> None:
        world.save(10)
        lines = ask(capsys, "ls", *world.local).out.splitlines()
        assert lines[0].split() == ["iteration", "attempt", "tier", "run", "owners", "copies", "size", "state"]
        assert lines[1].split()[:6] == ["10", "g0001-01010101", "local", "run", "4/4", "2"]


class TestVerify:
    def test_sound_stores_are_well(self, capsys: Any, world: World) -> None:
        world.save(10)
        world.log(1)
        for deep in ((), ("--deep",)):
            document = ask_json(capsys, "verify", *deep, *world.local)
            assert (document["ok"], document["damaged"]) == (True, [])
            assert document["checked"] == 8 + 4 + 4  # copies, certificates, logs

    def test_a_flipped_byte_is_found_by_reading_all(self, capsys: Any, world: World) -> None:
        save = world.save(10)
        shard = world.shard(save, 2, "node3")
        flip(shard)
        assert ask_json(capsys, "verify", *world.local)["ok"]
        document = ask_json(capsys, "verify", "--deep", *world.local, status=1)
        (damage,) = document["damaged"]
        assert {key: damage[key] for key in ("path", "iteration", "owner", "node")} == {
            "path": str(shard),
            "iteration": 10,
            "owner": 2,
            "node": "node3",
        }
        assert "digest" in damage["reason"]

    def test_a_shard_of_another_length_its_header_and_its_record_are_found_without_reading_all(
        self, capsys: Any, world: World
    ) -> None:
        save = world.save(10, replicas=False)
        torn, header, record, gone = (world.shard(save, owner, f"node{owner}") for owner in range(4))
        torn.write_bytes(torn.read_bytes()[:-1])
        flip(header, at=20)
        flip(record.with_suffix(".json"), at=20)
        gone.unlink()
        document = ask_json(capsys, "verify", *world.local, status=1)
        assert {damage["path"]: (damage["iteration"], damage["owner"]) for damage in document["damaged"]} == {
            str(torn): (10, 0),
            str(header): (10, 1),
            str(record.with_suffix(".json")): (10, 2),
            str(gone): (10, 3),
        }

    def test_a_damaged_certificate_or_log_is_found(self, capsys: Any, world: World) -> None:
        save = world.save(10)
        world.log(1)
        certificate = world.shard(save, 0, "node0").with_name("complete.json")
        (log,) = (world.store("node1").root / "attempts").iterdir()
        flip(certificate, at=10)
        flip(log, at=10)
        damaged = ask_json(capsys, "verify", *world.local, status=1)["damaged"]
        assert {damage["path"] for damage in damaged} == {str(certificate), str(log)}

    def test_what_its_owner_deletes_meanwhile_is_no_damage(self, capsys: Any, world: World, monkeypatch: Any) -> None:
        """A live job unlinks the record first, then recycles the bytes: seen here between the two looks."""
        save = world.save(10)
        store, shard = world.store("node0"), world.shard(save, 0, "node0")
        survey = NodeReader.survey

        def delete_while_reading(self: NodeReader) -> Any:
            for path, content in survey(self):
                if path == shard.with_suffix(".json"):
                    store.uncommit(save, 0, 4)
                    flip(shard)
                yield path, content

        monkeypatch.setattr(NodeReader, "survey", delete_while_reading)
        document = ask_json(capsys, "verify", "--deep", *world.local)
        assert document["checked"] == 8 - 1 + 4

    def test_a_record_that_goes_between_listing_and_reading_is_no_damage(
        self, capsys: Any, world: World, monkeypatch: Any
    ) -> None:
        save = world.save(10)
        shard = world.shard(save, 0, "node0")
        stat = type(FS).stat

        def pruned_just_now(self: Any, path: Path) -> Any:
            if path == shard:  # the record was read; now its owner takes record and bytes away
                shard.unlink(missing_ok=True)
                shard.with_suffix(".json").unlink(missing_ok=True)
            return stat(self, path)

        monkeypatch.setattr(type(FS), "stat", pruned_just_now)
        assert ask_json(capsys, "verify", *world.local)["damaged"] == []


class TestInspect:
    def test_all_shards_of_an_iteration_make_up_its_items(self, capsys: Any, world: World) -> None:
        world.save(10)
        document = ask_json(capsys, "inspect", 10, *world.local)
        items = {item["key"]: item for item in document["items"]}
        assert set(items) == {"model/0/w", "rng/torch", "train_state/step"}
        weight = items["model/0/w"]
        assert (weight["kind"], weight["dtype"], weight["global_shape"]) == ("tensor", "float32", [4, 3])
        assert [(c["offsets"], c["shape"], c["owners"]) for c in weight["chunks"]] == [
            ([owner, 0], [1, 3], [owner]) for owner in range(4)
        ]
        assert items["rng/torch"]["chunks"] == [{"offsets": [0], "shape": [16], "owners": [0, 1, 2, 3]}]
        assert (items["train_state/step"]["kind"], items["train_state/step"]["value"]) == ("value", "7")
        assert len(document["records"]) == 8
        assert {record["role"] for record in document["records"]} == {"primary", "replica"}

    def test_a_shard_file_its_record_and_its_folders_can_be_given(self, capsys: Any, world: World) -> None:
        save = world.save(10, replicas=False)
        shard = world.shard(save, 1, "node1")
        for path in (shard, shard.with_suffix(".json"), shard.parent, shard.parent.parent):
            document = ask_json(capsys, "inspect", path)
            (record,) = document["records"]
            assert (record["path"], record["owner"], record["iteration"]) == (str(shard), 1, 10)
            assert document["bytes"] == shard.stat().st_size
        assert "model/0/w" in ask(capsys, "inspect", shard).out

    def test_an_iteration_that_is_not_there_is_told_with_those_that_are(self, capsys: Any, world: World) -> None:
        world.save(10)
        error = ask_json(capsys, "inspect", 11, *world.local, status=2)["error"]
        assert "there: 10" in error["message"]

    def test_a_broken_shard_cannot_be_inspected(self, capsys: Any, world: World) -> None:
        shard = world.shard(world.save(10), 0, "node0")
        flip(shard, at=9)
        assert ask_json(capsys, "inspect", shard, status=3)["error"]["type"] == "CorruptCopyError"
