"""`resilience advise`: its keys, settings that a job takes, and what it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from resilience.cli import main
from resilience.config import CheckpointConfig, ResiliencyConfig, unsupported

JOB = ["advise", "--step-s", "2", "--state-bytes", "2000000000", "--ranks", "64"]


def answer(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, Any]:
    status = main([*JOB, *options, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_the_answer_has_the_keys_of_the_interface_and_settings_that_a_job_takes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    status, document = answer(capsys, "--mtbf-hours", "6")
    assert status == 0
    assert {"interval", "expected_goodput", "why"} <= document.keys()
    assert document["interval"] in [each["interval"] for each in document["intervals"]]
    assert {each["redundancy"] for each in document["schemes"]} == {"none", "replica", "xor", "rs"}
    checkpoint = CheckpointConfig(save="ckpt", **document["settings"]["checkpoint"])
    resiliency = ResiliencyConfig(**document["settings"]["resiliency"])
    assert unsupported(checkpoint, resiliency) == []
    assert checkpoint.non_persistent_save_interval == document["interval"]


def test_what_this_version_would_refuse_is_marked_and_not_proposed(capsys: pytest.CaptureFixture[str]) -> None:
    document = answer(capsys, "--mtbf-hours", "6")[1]
    for each in document["schemes"]:
        refused = each["redundancy"] != "none" and unsupported(
            CheckpointConfig(), ResiliencyConfig(redundancy=each["redundancy"])
        )
        assert each["available"] is not bool(refused)
    (proposed,) = {each["available"] for each in document["schemes"] if each["redundancy"] == document["redundancy"]}
    assert proposed


def test_figures_that_are_told_go_before_measured_ones(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, memory_mount: Path
) -> None:
    told = ["--network-bytes-per-s", "12e9", "--node-memory-bytes", str(10**12)]
    where = ["--memory-dir", str(memory_mount), "--disk-dir", str(tmp_path)]
    document = answer(capsys, "--mtbf-hours", "6", "--measure", "--measure-s", "0.1", *where, *told)[1]
    assert document["bytes_per_s"]["network"] == 12e9
    assert document["bytes_per_s"]["memory"] == document["measured"]["memory"]
    assert document["measured"]["loopback"] > 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "not said, or said twice"),
        (["--mtbf-hours", "1", "--node-mtbf-hours", "1"], "said twice"),
        (["--mtbf-hours", "1", "--process-share", "0.9", "--rack-share", "0.9"], "at most 1 together"),
        (["--mtbf-hours", "1", "--node-memory-bytes", "1000", "--node-disk-bytes", "1000"], "Nothing fits"),
        (["--mtbf-hours", "1", "--measure", "--disk-dir", "/nonexistent"], "cannot be measured"),
    ],
)
def test_what_cannot_be_answered_is_told_with_status_2(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, document = answer(capsys, *options)
    assert status == 2
    assert says in document["error"]["message"]


def test_people_are_told_why_and_how_to_simulate_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*JOB, "--node-mtbf-hours", "5000"]) == 0
    told = capsys.readouterr().out
    assert "lose least between waiting and doing work again" in told
    assert "xor over 4" in told
    assert "to simulate it: resilience simulate --ranks 64" in told
    assert re.search(r"with snapshot_mode: overlapped, \S+ of the \S+ s that training waits", told)


def test_an_overlapped_copy_hides_what_a_step_is_long_enough_for(capsys: pytest.CaptureFixture[str]) -> None:
    for step_s in ("0.001", "1000"):
        _, document = answer(capsys, "--mtbf-hours", "6", "--step-s", step_s)
        assert document["overlapped_s"] == min(document["durations"]["stall_s"], float(step_s))
