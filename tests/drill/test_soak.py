"""A soak: its faults can always be recovered from, growth is seen where there is some, and a real one passes."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience import cli_drill
from resilience.cli import main
from resilience.cli_drill import predict
from resilience.cli_tables import console_for
from resilience.drill.drill import Soak, run_soak
from resilience.drill.environment import Plan
from resilience.drill.flatness import DirectorySample, Flatness, ProcessSample, judge
from resilience.drill.nodes import BALLAST
from resilience.drill.progress import RankProgress
from resilience.drill.result import FaultResult
from resilience.drill.samples import Sampler
from resilience.drill.scenario import KINDS, Scenario, parse_fault, rosters
from resilience.drill.soak import SoakResult, cut_short, problems_of_soak, soak_scenario
from resilience.drill.story import Story

STAND_IN = str(Path(__file__).with_name("stand_in.py"))


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 10**9), st.integers(1, 5), st.integers(0, 3), st.sampled_from(["local", "global", "in_memory"]),
    st.integers(1, 3), st.floats(0.05, 10),
)  # fmt: skip
def test_faults_of_a_soak_are_recoverable_and_outlast_the_time(
    seed: int, nodes: int, spares: int, kind: str, ranks_per_node: int, minutes: float
) -> None:
    shape = Scenario(nodes=nodes, spares=spares, ranks_per_node=ranks_per_node, save_type=kind)  # type: ignore[arg-type]
    drawn = soak_scenario(shape, seed, minutes)
    assert drawn == soak_scenario(shape, seed, minutes)
    assert len(drawn.faults) * 3 >= minutes * 60
    at = [fault.iteration for fault in drawn.faults]
    assert at[0] > shape.save_every
    assert all(after - before > shape.save_every for before, after in pairwise(at))
    if nodes == 1 and kind != "global":
        assert {fault.kind for fault in drawn.faults} <= {"kill", "hang", "stop"}
    for active in rosters(drawn):  # who is lost comes back: the job never shrinks, and no node trains twice
        assert len(set(active)) == nodes


def test_a_lost_node_comes_back_as_the_last_spare() -> None:
    faults = tuple(map(parse_fault, ("lose:node=0@10", "lose:node=1@20", "lose:node=2@30")))
    plan = Scenario(nodes=2, spares=1, faults=faults, repaired=True)
    assert rosters(plan) == ((0, 1), (2, 1), (2, 0), (1, 0))


def test_over_a_long_soak_every_kind_of_fault_comes_up() -> None:
    assert {fault.kind for fault in soak_scenario(Scenario(), 3, 30, mounts=True).faults} == KINDS.keys() - {"join"}
    assert {fault.kind for fault in soak_scenario(Scenario(), 3, 30).faults} == KINDS.keys() - {"join", "full"}


def test_cut_short_a_soak_is_the_faults_that_happened_and_an_end_beyond_them() -> None:
    endless = soak_scenario(Scenario(), 3, 1)
    ended = cut_short(endless, 4, 200)
    assert ended.faults == endless.faults[:4]
    assert ended.train_iters == 206
    assert cut_short(endless, 0, 0).faults == ()


# Growth


def life(pid: int, start: float, memory: int, per_sample: int = 0, samples: int = 20, descriptors: int = 40) -> list[ProcessSample]:  # noqa: E501  # fmt: skip
    return [
        ProcessSample(start + i, pid % 4, pid, i + 1, memory + i * per_sample, descriptors, 20) for i in range(samples)
    ]


def verdicts(
    processes: list[ProcessSample], directories: list[DirectorySample] | None = None
) -> dict[str, bool | None]:
    return {each.what: each.flat for each in judge(processes, directories or [])}


MB = 1 << 20


def test_a_job_that_takes_the_same_again_and_again_is_flat() -> None:
    processes = [sample for pid in range(12) for sample in life(pid, 30.0 * pid, 200 * MB + pid % 3 * MB)]
    directories = [DirectorySample(t, t, 100 * MB + t % 5 * MB, 40 + t % 3) for t in range(60)]
    assert set(verdicts(processes, directories).values()) == {True}


def test_each_attempt_needing_more_than_the_one_before_is_growth() -> None:
    processes = [sample for pid in range(12) for sample in life(pid, 30.0 * pid, (200 + 5 * pid) * MB)]
    found = verdicts(processes)
    assert found["bytes of memory of a process, over attempts"] is False
    assert found["bytes of memory within a process's life"] is True


def test_a_process_that_grows_with_every_step_is_growth() -> None:
    processes = [sample for pid in range(12) for sample in life(pid, 30.0 * pid, 200 * MB, per_sample=4 * MB)]
    assert verdicts(processes)["bytes of memory within a process's life"] is False


def test_descriptors_that_are_not_given_back_are_growth() -> None:
    processes = [sample for pid in range(12) for sample in life(pid, 30.0 * pid, 200 * MB, descriptors=40 + 2 * pid)]
    assert verdicts(processes)["descriptors of a process, over attempts"] is False


def test_ranks_that_differ_from_each_other_are_no_growth_in_whatever_order_they_are_seen() -> None:
    first = [sample for pid in range(6) for sample in life(pid, 30.0 * pid, 200 * MB, descriptors=48)]
    other = [replace(sample, pid=sample.pid + 100, rank=7, descriptors=67) for sample in first]
    swapped = [*(s for s in first if s.pid < 3), *other, *(s for s in first if s.pid >= 3)]
    assert verdicts(first + other)["descriptors of a process, over attempts"] is True
    assert verdicts(swapped)["descriptors of a process, over attempts"] is True
    grown = [replace(sample, descriptors=sample.descriptors + 6 * (sample.pid % 100)) for sample in first + other]
    ordered = sorted(grown, key=lambda sample: sample.t)
    assert verdicts(ordered)["descriptors of a process, over attempts"] is False


def test_files_that_pile_up_are_growth() -> None:
    directories = [DirectorySample(t, t, 100 * MB, 40 + t) for t in range(60)]
    found = verdicts([], directories)
    assert found["files kept by the job"] is False
    assert found["bytes kept by the job"] is True


def test_what_is_kept_grows_until_there_are_as_many_saves_as_wished_and_that_is_no_growth() -> None:
    directories = [DirectorySample(t, t, min(t, 20) * 10 * MB, 40) for t in range(80)]
    judged = {each.what: each for each in judge([], directories, settled_at=20)}
    assert judged["bytes kept by the job"].flat is True
    assert judged["bytes kept by the job"].samples == 60
    assert verdicts([], directories)["bytes kept by the job"] is False


def test_of_too_few_samples_nothing_is_said() -> None:
    assert set(verdicts(life(1, 0.0, MB, samples=2), [DirectorySample(0, 0, 1, 1)]).values()) == {None}


def test_a_fault_that_cost_more_than_one_interval_fails_the_soak() -> None:
    def fault(lost: int) -> FaultResult:
        return FaultResult("kill:rank=0@20", 20, None, lost, 0.1, 0.1, 1.0, 0, 0, 0, 0, True)

    grows = Flatness("memory", 9, 1.0, 9.0, 1.0, False)

    def problems(lost: list[int], *flatness: Flatness, among: str = "kill:rank=0@20") -> list[str]:
        faults = [fault(each) for each in lost]
        scenario = Scenario(faults=tuple(map(parse_fault, dict.fromkeys((among, "kill:rank=0@20")))))
        result = SoakResult.of(scenario, faults, flatness, minutes=1, seed=0, attempts=2)
        return problems_of_soak(result, scenario, faults)

    assert problems([3, 6]) == []
    assert "7 iterations were lost; 6 are allowed" in problems([3, 7])[0]
    assert "It grows: memory: 1 at first, 9 at last, 2 allowed" in problems([3], grows)[0]
    assert problems([]) == ["The time was too short for a single fault."]
    assert problems([18], among="full:node=0@8") == [], "while the mount was full no save was possible"
    assert problems([19], among="full:node=0@8") != []
    assert problems([3], replace(grows, flat=None)) == []


class Clock:
    def __init__(self) -> None:
        self.at = 100.0

    def now(self) -> float:
        return self.at

    wall = now

    def sleep(self, seconds: float) -> None:
        self.at += seconds


def test_a_process_and_its_directories_are_looked_at_in_measure(tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()
    (tmp_path / "attempts" / "g0001.json").write_bytes(b"x")
    (tmp_path / "shard").write_bytes(b"x" * 8192)
    (tmp_path / BALLAST).write_bytes(b"x" * MB)
    clock = Clock()
    sampler = Sampler(clock, 60, lambda: [tmp_path])
    ranks = {0: RankProgress("node0", os.getpid(), iteration=7), 1: RankProgress("node1", 2**22 + 1, iteration=7)}
    for _ in range(100):
        sampler.look(ranks)
        clock.sleep(0.1)
    assert not sampler.over()
    assert len(sampler.processes) == 34  # about every quarter of a second; the process that is not there gives none
    assert len(sampler.directories) == 5
    first = sampler.processes[0]
    assert (first.rank, first.iteration) == (0, 7)
    assert first.memory_bytes > MB
    assert 0 < first.descriptors < 1000
    assert first.threads > 0
    assert sampler.directories[0].files == 1
    assert 8192 <= sampler.directories[0].bytes < MB
    sampler.write(tmp_path / "samples.jsonl")
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 39
    clock.sleep(60)
    assert sampler.over()


def test_the_time_of_a_soak_begins_with_training(tmp_path: Path) -> None:
    clock = Clock()
    sampler = Sampler(clock, 60, lambda: [tmp_path])
    rank = RankProgress("node0", os.getpid())
    for _ in range(200):
        sampler.look({0: rank})
        clock.sleep(1)
    assert not sampler.over()
    rank.iteration = 1
    sampler.look({0: rank})
    assert not sampler.over()
    clock.sleep(60)
    assert sampler.over()


def test_minutes_without_random_faults_are_refused(capsys: Any) -> None:
    for options in (["--minutes", "1"], ["--minutes", "0", "--random-faults"]):
        assert main(["drill", *options, "--json"]) == 2
        assert "belongs to --random-faults" in json.loads(capsys.readouterr().out)["error"]["message"]


# Real processes


@pytest.mark.drill
@pytest.mark.long
@pytest.mark.timeout(600)
def test_two_minutes_of_random_faults_leave_training_as_it_would_have_been(tmp_path: Path, repository: Path) -> None:
    script = (str(repository / "examples" / "gpt.py"), "--batch", "2")
    told = io.StringIO()
    # an interval is 0.4 s of these steps: on a busy machine a save to a disk takes longer than five of them do
    scenario = Scenario(nodes=2, spares=1, save_every=20, persist_every=40)
    plan = Plan(scenario, tmp_path / "out", script, timeout_s=400)
    result, soak = run_soak(plan, Soak(2.0, seed=11), Story(told), explain=predict)
    assert result.problems == [], told.getvalue()
    assert result.passed
    assert result.bit_identical
    assert len(result.faults) >= 2
    assert soak.most_lost_of_allowed <= 1
    assert all(fault.predicted for fault in result.faults if fault.resumed_from)


@pytest.mark.drill
@pytest.mark.long
def test_a_soak_ends_when_the_time_is_up_and_is_compared_with_as_many_iterations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    cli_drill.arguments(parser)
    shape = ["--nodes", "1", "--spares", "0", "--timeout-s", "250", "--workdir", str(tmp_path / "out")]
    soak = ["--random-faults", "--minutes", "0.25", "--seed", "5"]
    _, document = cli_drill.run(parser.parse_args([*shape, *soak, "--", STAND_IN]), explain=None)
    assert document["bit_identical"], document["problems"]
    told = document["soak"]
    assert document["train_iters"] == told["iterations"] > 6
    assert f"a last attempt trains to iteration {told['iterations']}" in capsys.readouterr().err
    assert told["attempts"] >= 2
    assert document["faults"]
    assert {"flat", "most_lost_of_allowed", "faults_by_kind"} <= told.keys()
    assert {"what", "samples", "first", "last", "growth", "allowed", "flat"} == told["samples"][0].keys()
    assert json.loads((tmp_path / "out" / "result.json").read_text()) == document
    assert (tmp_path / "out" / "samples.jsonl").stat().st_size > 0
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
    cli_drill.show(document, console_for(sys.stdout))
    assert "does it grow?" in capsys.readouterr().out
