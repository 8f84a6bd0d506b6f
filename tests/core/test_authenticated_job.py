"""A job with a key, on real ranks: it survives as any job does, and takes nothing that was planted meanwhile."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resilience.replication.authenticated import KeyedSession
from resilience.replication.gloo import TorchCommunicator
from resilience.stores.authentication import Key
from resilience.stores.records import seal_json
from tests.core.test_survive import KILL_ALL_AT_8, ends_as_undisturbed, interrupted
from tests.core.training import RUN, World
from tests.ranks import run_ranks, values

SECRET = "a secret of this job's ranks alone"
KEYED = {"secret_env": "JOB_SECRET"}


def _plant(node: Path, iteration: int) -> None:
    """A save of `iteration` beside the real one of 6: the same shards, records whose checksums fit."""
    for folder in list(node.glob("iter_0000006/g*")):
        target = node / f"iter_{iteration:07d}" / folder.name
        target.mkdir(parents=True, mode=0o700)
        for path in folder.iterdir():
            content = path.read_bytes()
            if path.suffix == ".json":
                fields = json.loads(content) | {"iteration": iteration}
                content = seal_json({k: v for k, v in fields.items() if k not in ("schema_version", "checksum", "mac")})
            (target / path.name).write_bytes(content)
            (target / path.name).chmod(0o600)


@pytest.mark.parametrize("kind", ["local", "disk"])
def test_a_job_with_a_key_recovers_a_lost_node_and_passes_over_a_planted_save(world: World, kind: str) -> None:
    plan = world.plan("a", "b", kind=kind, resiliency=KEYED)
    secret: Any = {"env": {"JOB_SECRET": SECRET}}
    outcomes = world.run(replace(plan, settle=(6,), acts=KILL_ALL_AT_8), **secret)
    assert all(outcome.status == -9 for outcome in outcomes), outcomes
    node = (world.disk if kind == "disk" else world.memory) / "a" / RUN / "a"
    records = [json.loads(path.read_bytes()) for path in node.glob("iter_0000006/*/rank_*.json")]
    assert len(records) == 2, "its own shard and its peer's"
    assert all(len(record["mac"]) == 64 and record["digest"].startswith("blake2b-256-32m:") for record in records)
    _plant(node, 9)
    world.lose("b")
    results = values(world.run(replace(plan, seed=1), **secret))
    assert [ran.resumed.iteration for ran in results] == [6, 6], "9 is there, whole, and has no MAC"
    assert results[1].resumed.retrieved_bytes > 0
    assert ends_as_undisturbed(results)
    assert any("not authentic" in str(event.get("what")) for event in world.events("warning"))
    key = Key(SECRET.encode())._key
    for path in (*world.memory.rglob("*"), *world.disk.rglob("*")):
        content = path.read_bytes() if path.is_file() else b""
        assert SECRET.encode() not in content
        assert key not in content
        assert key.hex().encode() not in content


@pytest.mark.parametrize(
    ("of_rank_1", "words"),
    [
        ({"JOB_SECRET": "another secret, long enough"}, "rank 1 holds another key than rank 0"),
        ({}, "rank 1: resiliency.secret_env: the environment variable JOB_SECRET is not set"),
        ({"JOB_SECRET": "short"}, "rank 1: resiliency.secret_env: the secret in JOB_SECRET has 5 bytes"),
    ],
)
def test_ranks_whose_keys_differ_all_end_at_the_start(world: World, of_rank_1: dict[str, str], words: str) -> None:
    plan = world.plan("a", "b", resiliency=KEYED)
    outcomes = world.run(plan, env=lambda rank: of_rank_1 if rank else {"JOB_SECRET": SECRET})
    assert [outcome.error for outcome in outcomes] == ["ConfigError", "ConfigError"]
    assert all(words.removeprefix("rank 1: ") in outcome.message for outcome in outcomes)
    assert words in outcomes[0].message
    assert not any(secret in outcome.message for outcome in outcomes for secret in of_rank_1.values())


def test_a_job_that_is_given_a_key_does_not_quietly_forget_the_saves_it_had(world: World) -> None:
    again = interrupted(world, world.plan("a"))
    (outcome,) = world.run(replace(again, resiliency=KEYED), env={"JOB_SECRET": SECRET})
    assert outcome.error == "NoUsableSaveError"
    assert "without a MAC of this job's key" in outcome.message
    (ran,) = values(world.run(again))
    assert ran.resumed.iteration == 6, "nothing was removed meanwhile"


def _talk(rank: int, widest: int) -> Any:
    communicator = TorchCommunicator(20.0, widest)
    communicator.authenticate(KeyedSession(Key(SECRET.encode()), b"session"))
    group = communicator.agreements("all")
    control = communicator.control("control", ["node"] * communicator.world_size)
    assert type(control._group).__name__ in ("_AuthenticatedAgreements", "Tree"), "strangers could have a word in it"  # type: ignore[attr-defined]
    control.start(lambda: [rank, -rank])
    said = group.gather(b"%d" % rank), group.broadcast(b"0" if rank == 0 else None), group.maximum([rank, -rank])
    agreed = control.result()
    group.barrier()
    control.close()
    group.close()
    communicator.close()
    return said, agreed


@pytest.mark.parametrize("widest", [64, 2])
def test_agreements_and_the_control_exchange_are_authenticated_in_one_group_and_in_a_tree(widest: int) -> None:
    for said, agreed in values(run_ranks(5, _talk, widest)):
        assert said == ([b"0", b"1", b"2", b"3", b"4"], b"0", [4, 0])
        assert agreed == [4, 0]
