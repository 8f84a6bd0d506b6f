"""Metrics of real ranks: other programs read of them what the events say, and no disk under them harms training."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.core.test_failing_saves import fill_up, free_up, on_a_mount_that_fills_up
from tests.core.test_replication import break_the_link
from tests.core.training import Act, Training, World, die, reference
from tests.ranks import killed, values


def samples(path: Path) -> dict[tuple[str, str], float]:
    """By the sample's name and what its labels say beside node and rank."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(path.read_text()):
        assert family.documentation, f"{family.name} has no HELP"
        assert family.type in ("gauge", "counter", "histogram"), f"{family.name} has no TYPE"
        for sample in family.samples:
            own = [text for name, text in sample.labels.items() if name not in ("node", "rank")]
            found[sample.name, ",".join(own)] = sample.value
    return found


def events_of_rank(world: World, name: str, rank: int, attempt: str) -> list[dict[str, Any]]:
    return [each for each in world.events(name, rank=rank) if each["attempt"] == attempt]


def test_prometheus_reads_of_each_rank_what_its_events_say_also_after_a_restart(world: World) -> None:
    given = world.disk / "textfiles" / "resilience.prom"
    plan = world.plan("a", "b", resiliency={"metrics": str(given)}, settle=(4, 10), acts=(Act(8, die),))
    assert all(map(killed, world.run(plan)))
    results = values(world.run(world.plan("a", "b", resiliency={"metrics": str(given)}, settle=(10,), seed=1)))
    files = sorted(path.name for path in given.parent.iterdir())
    assert files == ["resilience-rank0.prom", "resilience-rank1.prom"], "one per rank, and nothing else is left"
    for rank, ran in enumerate(results):
        path = given.parent / f"resilience-rank{rank}.prom"
        first = next(iter(text_string_to_metric_families(path.read_text()))).samples[0].labels
        assert (first["node"], first["rank"], first["run_id"]) == ("ab"[rank], str(rank), "run")
        seen, attempt = samples(path), first["attempt"]
        assert attempt.startswith("g0002-")

        def told(name: str, rank: int = rank, attempt: str = attempt) -> list[dict[str, Any]]:
            return events_of_rank(world, name, rank, attempt)

        complete = [each["iteration"] for each in told("complete") if each["generation"] == 2]
        stalls, (resume,) = [each["stall_s"] for each in told("snapshot")], told("resume")
        assert complete, "there is something to count"
        assert seen["resilience_iteration", ""] == ran.iteration == 12
        assert seen["resilience_generation", ""] == 2
        assert seen["resilience_last_complete_iteration", ""] == max(complete)
        replicated = [each["iteration"] for each in world.events("replicated") if each["attempt"] == attempt]
        assert seen["resilience_last_protected_iteration", ""] == max(replicated)
        assert seen["resilience_saves_total", "complete"] == len(complete)
        assert seen["resilience_saves_total", "failed"] == 0
        assert seen["resilience_save_stall_seconds_sum", ""] == pytest.approx(sum(stalls))
        assert seen["resilience_save_stall_seconds_count", ""] == len(stalls)
        assert seen["resilience_save_stall_seconds_bucket", "+Inf"] == len(stalls)
        assert seen["resilience_save_stall_seconds_bucket", "0.1"] == sum(stall <= 0.1 for stall in stalls)
        assert seen["resilience_protect_seconds_sum", ""] == pytest.approx(
            sum(each["seconds"] for each in told("protected"))
        )
        assert seen["resilience_commit_seconds_count", "local"] == len(told("committed"))
        assert seen["resilience_copied_bytes_total", ""] == sum(each["bytes"] for each in told("snapshot"))
        sent = sum(each["sent_bytes"] for each in told("protected"))
        assert sent > 0
        assert seen["resilience_sent_bytes_total", ""] == sent
        assert seen["resilience_spared_bytes_total", ""] == sum(each["spared_bytes"] for each in told("protected"))
        assert seen["resilience_resumes_total", resume["tier"]] == 1
        assert seen["resilience_restore_seconds", ""] == pytest.approx(resume["seconds"])
        assert seen["resilience_protected", ""] == 1
        assert 0 < seen["resilience_goodput_ratio", ""] < 1


def test_ranks_of_one_node_write_files_of_their_own(world: World) -> None:
    given = world.disk / "textfiles" / "resilience.prom"
    values(world.run(world.plan("a", "a", resiliency={"metrics": str(given)})))
    iterations = {samples(path)["resilience_iteration", ""] for path in given.parent.glob("*.prom")}
    assert len(list(given.parent.iterdir())) == 2
    assert iterations == {12}, "a rank whose steps are not written down knows its own"


def test_a_full_disk_under_the_metrics_is_told_once_and_stops_nothing(world: World) -> None:
    mount = world.disk / "tiny"
    mount.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", mount], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        (mount / "other").write_bytes(b"x" * 4096)
        results = values(world.run(world.plan("a", "b", resiliency={"metrics": str(mount / "resilience.prom")})))
        assert tuple(ran.digest for ran in results) == reference(2)
        assert [ran.status["failed_saves"] for ran in results] == [0, 0]
        for rank in range(2):
            (told,) = world.events("metrics_failed", rank=rank)
            assert "No space left" in told["error"]
        assert [path.name for path in mount.iterdir()] == ["other"], "nothing half written is left"
    finally:
        subprocess.run(["umount", mount], check=True)


def test_tensorboard_reads_what_the_events_say_and_a_restart_draws_on(world: World) -> None:
    where = world.disk / "boards"
    board = {"metrics": f"tensorboard:{where}"}
    assert all(map(killed, world.run(world.plan("a", "b", resiliency=board, settle=(4, 8), acts=(Act(8, die),)))))
    values(world.run(world.plan("a", "b", resiliency=board, seed=1)))
    assert [path.name for path in where.iterdir()] == ["resilience"]
    read = EventAccumulator(str(where / "resilience"))
    read.Reload()
    (resume,) = world.events("resume", rank=0)
    (drawn,) = read.Scalars("restore/seconds")
    assert (drawn.step, drawn.value) == (resume["iteration"], pytest.approx(resume["seconds"]))
    snapshots = events_of_rank(world, "snapshot", 0, resume["attempt"])
    assert len(snapshots) >= 2
    curve = {each.step: each.value for each in read.Scalars("save/stall_seconds")}
    for each in snapshots:
        assert curve[each["iteration"]] == pytest.approx(each["stall_s"])
    assert read.Scalars("job/last_complete_iteration")[-1].value == 12


def where_every_second_counts(training: Training) -> None:
    import resilience.planning.caution

    on_a_mount_that_fills_up(training)
    resilience.planning.caution._TRIVIAL_LOSS_S = 0.0


def test_a_job_whose_saves_fail_is_said_to_be_unprotected_until_one_succeeds(world: World) -> None:
    given = world.disk / "textfiles" / "resilience.prom"
    plan = world.plan(
        "a", "b", steps=24, settle=tuple(range(5, 24, 3)), make=where_every_second_counts,
        acts=(Act(4, fill_up, 1), Act(16, free_up, 1)), resiliency={"metrics": str(given)},
    )  # fmt: skip
    values(world.run(plan))
    (begun,) = world.events("caution")
    (over,) = world.events("caution_over")
    assert (begun["kind"], over["kind"], begun["rank"], over["rank"]) == ("not_protected", "not_protected", 0, 0)
    assert 3 + 2 * 3 < begun["iteration"] <= 12, "once more than two intervals would be lost"
    assert "is of iteration 3;" in begun["what"]
    assert 18 < over["iteration"] <= 21, "a save after the mount has room again"
    for rank in range(2):
        seen = samples(given.parent / f"resilience-rank{rank}.prom")
        assert seen["resilience_protected", ""] == 1
        assert seen["resilience_saves_total", "failed"] == 4, "6, 9, 12 and 15"


def test_a_save_that_lacks_replicas_is_said_so_until_the_next_one_has_them(world: World) -> None:
    plan = world.plan("a", "b", steps=18, settle=(4, 6, 7, 8, 9, 12), acts=(Act(4, break_the_link, 0),))
    values(world.run(plan))
    (begun,) = world.events("caution")
    (over,) = world.events("caution_over")
    assert begun["kind"] == over["kind"] == "replica_missing"
    assert "of iteration 6 is on its own nodes only" in begun["what"]
    replicated = [event["iteration"] for event in world.events("replicated")]
    assert 6 not in replicated
    assert 6 <= begun["iteration"] < over["iteration"]
    assert min(each for each in replicated if each > 6) < over["iteration"] + 3


def test_parity_protects_as_replicas_do(world: World) -> None:
    plan = world.plan(
        "a", "b", "c", settle=(4, 7, 10), checkpoint={"replication_factor": 3}, resiliency={"redundancy": "xor"}
    )
    values(world.run(plan))
    assert [event["iteration"] for event in world.events("replicated")] == [3, 6, 9, 12]
    assert not world.events("caution")
