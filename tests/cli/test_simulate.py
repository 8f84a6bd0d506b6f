"""`resilience simulate`: its keys, its answers for people, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from resilience.cli import main

JOB = ["simulate", "--ranks", "64", "--steps", "5000"]


def answer(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, Any]:
    status = main([*JOB, *options, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_the_answer_has_the_keys_of_the_interface_and_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    status, document = answer(capsys, "--mtbf-hours", "0.5")
    assert status == 0
    assert {"goodput", "failures", "lost_steps", "saves", "unrecoverable"} <= document.keys()
    assert 0 < document["goodput"] < 1
    assert document["goodput_95"][0] <= document["goodput"] <= document["goodput_95"][1]
    assert sum(document["shares"].values()) == pytest.approx(1)
    assert document["failures"] > 1
    assert document["theory"]["goodput"] == pytest.approx(document["goodput"], rel=0.02)


def test_equal_seeds_give_equal_answers(capsys: pytest.CaptureFixture[str]) -> None:
    first, again, other = (
        answer(capsys, "--mtbf-hours", "0.5", "--runs", "3", "--seed", seed)[1] for seed in ("1", "1", "2")
    )
    assert first == again
    assert first["goodput"] != other["goodput"]


def test_a_node_s_rate_is_the_job_s_over_the_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    job = answer(capsys, "--mtbf-hours", "0.5")[1]
    node = answer(capsys, "--node-mtbf-hours", "4")[1]
    assert job == node


def test_a_trace_is_replayed_as_it_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("hours,nodes\n0.2,3\n0.5,\n0.9,0 1\n", encoding="utf-8")
    status, document = answer(capsys, "--trace", str(trace), "--save-every", "50", "--persist-every", "500")
    assert status == 0
    assert document["failures"] == 3
    assert document["resumed_from"] == {"own_nodes": 1, "peers": 1, "persistent": 1, "beginning": 0}
    assert document["unrecoverable"] == 1
    assert document["lost_steps"] == pytest.approx(720 % 50 + (1733 - 1700) + 500, abs=500)


def test_a_run_that_cannot_finish_is_bad_news(capsys: pytest.CaptureFixture[str]) -> None:
    status, document = answer(
        capsys, "--mtbf-hours", "0.001", "--runs", "1", "--save-every", "0", "--persist-every", "0",
    )  # fmt: skip
    assert status == 1
    assert document["unfinished"] == 1
    assert document["theory"] is None


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "What fails is not said"),
        (["--mtbf-hours", "1", "--node-mtbf-hours", "1"], "said twice"),
        (["--mtbf-hours", "0"], "not above 0"),
        (["--mtbf-hours", "1", "--process-share", "0.7", "--rack-share", "0.7"], "must not exceed 1"),
        (["--mtbf-hours", "1", "--shape", "99"], "between 0.1 and 10"),
        (["--mtbf-hours", "1", "--replication-factor", "9"], "8 failure domains"),
        (["--mtbf-hours", "1", "--commit-s", "9", "--protect-s", "1"], "committed by then"),
        (["--mtbf-hours", "1", "--step-s", "0"], "not above 0"),
        (["--trace", "/nonexistent/trace"], "cannot be read"),
    ],
)
def test_what_does_not_go_together_is_refused_with_status_2(
    options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, document = answer(capsys, *options)
    assert status == 2
    assert says in document["error"]["message"]


def test_people_are_told_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*JOB, "--mtbf-hours", "0.5", "--persist-s", "9000"]) == 0
    told = capsys.readouterr().out
    assert "goodput" in told
    assert "by theory" in told
    assert "note: a persistent save takes 9e+03 s" in told
