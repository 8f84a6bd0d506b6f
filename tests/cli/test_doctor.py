"""`doctor`: what it refuses, what it warns of, and the memory that it counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from resilience import cli_doctor
from resilience.snapshot.streaming import Streaming
from tests.cli.stores import World, ask, ask_json
from tests.stores.test_shared_store import owned


@pytest.fixture
def config(tmp_path: Path, memory_mount: Path) -> Any:
    """Writes a configuration that works, with changes; returns the words of the command."""

    def write(checkpoint: dict[str, Any] | None = None, resiliency: dict[str, Any] | None = None) -> tuple[object, ...]:
        document = {
            "checkpoint": {
                "save": str(tmp_path / "save"),
                "save_interval": 100,
                "non_persistent_ckpt_type": "local",
                "non_persistent_save_interval": 10,
                "non_persistent_local_ckpt_dir": str(memory_mount),
                "replication": True,
                **(checkpoint or {}),
            },
            "resiliency": {"run_id": "run", **(resiliency or {})},
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(document))
        return ("doctor", "--config", path)

    return write


def told(document: dict[str, Any], level: str) -> str:
    return " | ".join(finding["what"] for finding in document["findings"] if finding["level"] == level)


def test_a_sound_configuration_is_well_and_its_memory_is_counted(capsys: Any, config: Any) -> None:
    words = (*config(), "--world-size", 4, "--ranks-per-node", 2, "--state-bytes", 1 << 20)
    document = ask_json(capsys, *words)
    assert (document["ok"], told(document, "error")) == (True, "")
    # 2 ranks, each its own shard and one replica, 3 saves at once
    assert document["memory"]["needs"]["shared_memory"] == 2 * 2 * 3 * (1 << 20)
    assert document["memory"]["available"]["shared_memory"] > 0
    assert "Nothing speaks against it" in ask(capsys, *words).out


def test_more_than_the_node_has_is_refused_with_the_sum(capsys: Any, config: Any) -> None:
    words = (*config(), "--world-size", 2, "--ranks-per-node", 1, "--state-bytes", 1 << 50)
    document = ask_json(capsys, *words, status=1)
    assert "cannot hold its checkpoints" in told(document, "error")
    assert document["memory"]["total"] > 6 << 50


def test_the_size_of_the_state_is_taken_from_a_save_that_lies_here(
    capsys: Any, config: Any, memory_mount: Path
) -> None:
    world = World(memory_mount, ranks=1, node_of=lambda rank: "n")
    save = world.save(10, replicas=False)
    words = config({"non_persistent_local_ckpt_dir": str(world.base("n"))})
    document = ask_json(capsys, *words)
    assert document["memory"]["per_rank_bytes"] == world.shard(save, 0, "n").stat().st_size


def test_without_a_size_there_is_no_budget_and_that_is_said(capsys: Any, config: Any) -> None:
    document = ask_json(capsys, *config())
    assert document["memory"] is None
    assert "--state-bytes" in str(document["findings"])


@pytest.mark.parametrize(
    ("checkpoint", "resiliency", "says"),
    [
        ({"save_interval": 0}, {}, "save_interval"),
        ({}, {"redundancy": "rs"}, "the size of a clique: from 3"),
        ({}, {"cadence": "auto"}, "not in this version"),
        ({"no_such_field": 1}, {}, "is no setting"),
        ({"save": None, "save_interval": None}, {"run_id": None}, "no name that a restart would know"),
        ({"replication_factor": 3}, {}, "failure domains"),
        ({}, {"failure_domain": "rack"}, "failure domain"),
        ({"save": "/etc/passwd/save"}, {}, "cannot be written"),
    ],
)
def test_what_training_would_refuse_is_an_error(
    capsys: Any, config: Any, checkpoint: dict[str, Any], resiliency: dict[str, Any], says: str
) -> None:
    words = (*config(checkpoint, resiliency), "--world-size", 4, "--ranks-per-node", 2)
    document = ask_json(capsys, *words, status=1)
    assert not document["ok"]
    assert says in told(document, "error")
    assert told(document, "error").count("failure domains") < 2, "the same is not said twice"
    assert "This would not work" in ask(capsys, *words).out


def test_parity_is_told_with_what_it_survives_and_what_it_takes(capsys: Any, config: Any) -> None:
    words = ("--world-size", 8, "--ranks-per-node", 2, "--state-bytes", 1 << 26)
    copies = ask_json(capsys, *config({"replication_factor": 3}), *words)
    parity = ask_json(capsys, *config({"replication_factor": 4}, {"redundancy": "rs"}), *words)
    assert "parity over cliques of 4: any 2 of the failure domains may be lost" in told(parity, "info")
    assert any("slots for 2 parity files" in line for line in parity["memory"]["lines"])
    assert parity["memory"]["total"] < copies["memory"]["total"], "rs over four keeps one shard's worth, not two"


def test_a_directory_of_another_run_is_an_error(capsys: Any, config: Any, tmp_path: Path) -> None:
    owned(tmp_path / "save", run_id="somebody")
    assert "belongs to run 'somebody'" in told(ask_json(capsys, *config(), status=1), "error")


def test_saves_on_one_node_without_shared_storage_are_warned_of(capsys: Any, config: Any) -> None:
    words = config({"save": None, "save_interval": None, "replication": False})
    document = ask_json(capsys, *words, "--world-size", 2, "--ranks-per-node", 1)
    assert "There is no `save`" in told(document, "warning")
    assert "not replicated" in told(document, "warning")


def test_a_configuration_that_is_not_there_is_wrong_usage(capsys: Any, tmp_path: Path) -> None:
    error = ask_json(capsys, "doctor", "--config", tmp_path / "none.yaml", status=2)["error"]
    assert "none.yaml" in error["message"]


def test_a_job_script_is_looked_at_too(capsys: Any, config: Any, tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    script.write_text("#!/bin/bash\n#SBATCH --nodes=2\nsrun train\n")
    document = ask_json(capsys, *config(), "--job-script", script)
    assert document["ok"]
    for option in ("--requeue", "--open-mode=append", "--signal"):
        assert option in told(document, "warning")
    ask_json(capsys, *config(), "--job-script", tmp_path / "nowhere", status=2)


@pytest.mark.parametrize(
    ("secret", "words"), [(None, "not set"), ("short", "5 bytes"), ("long enough, one may hope", "")]
)
def test_a_secret_that_is_not_in_this_environment_is_a_warning(
    capsys: Any, config: Any, monkeypatch: pytest.MonkeyPatch, secret: str | None, words: str
) -> None:
    monkeypatch.delenv("JOB_SECRET", raising=False)
    if secret is not None:
        monkeypatch.setenv("JOB_SECRET", secret)
    document = ask_json(capsys, *config(resiliency={"secret_env": "JOB_SECRET"}), "--world-size", 1)
    assert document["ok"]
    assert ("JOB_SECRET" in told(document, "warning")) == bool(words)
    assert words in told(document, "warning")


def test_copies_that_are_slower_than_they_could_be_are_told(
    capsys: Any, config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_doctor, "STREAMING", Streaming(None, why="no compiler was found"))
    document = ask_json(capsys, *config())
    assert document["ok"]
    assert "takes half as long again: no compiler was found" in told(document, "info")
    monkeypatch.setattr(cli_doctor, "STREAMING", Streaming(lambda *_: None))
    assert "memcpy" not in told(ask_json(capsys, *config()), "info")
