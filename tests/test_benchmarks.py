"""The benchmarks run, small, and say what they should; no test looks at how long anything took."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import peers_rounds
from benchmarks.figures import Figure, Goal, planning_figures, restore_figures, save_figures
from benchmarks.growth_chart import chart
from benchmarks.nvrx_env import nvrx_python
from benchmarks.peers import PEERS, Peer
from benchmarks.peers_env import peer_python
from benchmarks.saves_chart import chart as saves_chart
from benchmarks.series import Series
from benchmarks.settings import FULL, QUICK, Settings
from resilience.snapshot.streaming import STREAMING

ALONE = ("--without-nvrx", "--without-peers")


def run_benchmarks(out: Path, repository: Path, *arguments: str, without: tuple[str, ...] = ALONE) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks", "--out", str(out), "--quick", *without, *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=560)
    assert done.returncode == 0, done.stderr
    assert "Figures" in done.stdout
    document: dict[str, Any] = json.loads((out / "figures.json").read_text())
    return document


def check_shape(figure: dict[str, Any]) -> None:
    assert figure.keys() == {"name", "what", "ours_s", "against", "base_s", "ratio", "goal", "met", "problem"}
    for series in (figure["ours_s"], figure["base_s"], figure["ratio"]):
        if series is not None:
            assert series.keys() == {"median", "p5", "p95", "samples"}
            assert all(sample > 0 for sample in series["samples"])
            assert 0 < series["median"] <= series["p95"]
    assert (figure["met"] is None) == (figure["goal"] is None)


@pytest.mark.timeout(600)
def test_a_quick_run_measures_saves_with_real_ranks_and_keeps_every_sample(tmp_path: Path, repository: Path) -> None:
    document = run_benchmarks(tmp_path, repository, "--only", "saves", "--only", "planning")
    figures = {figure["name"]: figure for figure in document["figures"]}
    assert {"stall", "stall_in_flight", "local_committed", "replicated_idle", "dcp_save", "planning"} <= set(figures)
    for figure in figures.values():
        check_shape(figure)
    assert figures["stall"]["goal"] == "≤ 1.05"
    assert len(figures["stall"]["ours_s"]["samples"]) == QUICK.rounds
    assert document["settings"]["shard_bytes"] == QUICK.shard_bytes
    assert {"cores", "torch", "load_before"} <= document["machine"].keys()
    assert (tmp_path / "figures.txt").read_text().strip()


def test_ways_to_copy_are_compared_in_one_run(repository: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.copies", "--mb", "2", "--processes", "2", "--rounds", "1"]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert set(told) == {"96", "5000"}
    compiled = {"through the cache", "around the cache"} if STREAMING.much is not None else set()
    for ratios in told.values():
        assert set(ratios) == {"one piece", "one piece, ms", "torch", "memcpy"} | compiled
        assert all(ratio > 0 for ratio in ratios.values())


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_quick_run_crosses_boundaries_and_imports(tmp_path: Path, repository: Path) -> None:
    document = run_benchmarks(tmp_path, repository, "--only", "boundaries", "--only", "imports")
    figures = {figure["name"]: figure for figure in document["figures"]}
    assert set(figures) == {"boundary_2", "boundary_work_2", "import", "import_names"}
    for figure in figures.values():
        check_shape(figure)


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_quick_run_restores_from_either_node_beside_every_peer_that_can_be_had(
    tmp_path: Path, repository: Path
) -> None:
    document = run_benchmarks(tmp_path, repository, "--only", "restores", without=())
    figures = {figure["name"]: figure for figure in document["figures"]}
    ours = {f"restore_{where}_{state}" for where in ("own", "peer") for state in ("in_place", "adam")}
    nvrx = {"restore_nvrx", "restore_nvrx_peer"} if nvrx_python()[0] else set()
    peers = {f"restore_{peer.module}" for peer in PEERS if peer.restores and peer_python(peer)[0]}
    best = {"restore_best"} if nvrx | peers else set()
    assert set(figures) == ours | {"restore_torch", "restore_dcp"} | nvrx | peers | best
    for figure in figures.values():
        check_shape(figure)
    fetched = document["measured_s"]["restores"]["in_place/peer"]["retrieved_bytes"]
    assert all(nbytes > 2 * QUICK.shard_bytes for nbytes in fetched)
    assert document["measured_s"]["restores"]["in_place/own"]["retrieved_bytes"] == [0.0] * QUICK.restores


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_quick_run_protects_a_shard_by_every_scheme(tmp_path: Path, repository: Path) -> None:
    document = run_benchmarks(tmp_path, repository, "--only", "redundancy")
    figures = {figure["name"]: figure for figure in document["figures"]}
    assert set(figures) == {"replica_2", "replica_3", "xor_4", "rs_4"}
    for figure in figures.values():
        check_shape(figure)
    assert document["measured_s"]["redundancy"].keys() == {*figures, "lanes", "lanes.nbytes"}


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_quick_run_shows_how_saves_grow_and_what_they_cost_at_every_step(tmp_path: Path, repository: Path) -> None:
    document = run_benchmarks(tmp_path, repository, "--only", "growth", "--only", "overlap", "--rounds", "1")
    figures = {figure["name"]: figure for figure in document["figures"]}
    assert {"overlapped_large", "eager_large", "loop_device_overlapped", "overhead_cpu_eager"} <= set(figures)
    assert {"growth_tensors_4_eager", "growth_tensors_16_overlapped", "growth_tensors_4_committed"} <= set(figures)
    drawn = chart(document["measured_s"]["growth"])
    assert drawn.count("<circle") == 2 * 3 - 1  # of one rank nothing goes over a network


def test_the_picture_of_growth_shows_the_median_of_ratios_and_leaves_out_what_was_not_measured() -> None:
    entry = {"shard_bytes": 1 << 20, "tensors": 4, "ranks": 1, "frozen": 0.0}
    entry |= {"eager.stall": [1.0, 4.0, 9.0], "eager.memcpy": [1.0, 2.0, 3.0]}  # type: ignore[dict-item]
    drawn = chart({"bytes": [entry]})
    assert drawn.count("<circle") == 1
    at_two = 62.0 + 190.0 * (1 - math.log10(2.0 / 0.01) / 3)
    assert f'cy="{at_two:.2f}"' in drawn


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_quick_run_compares_every_peer_that_can_be_had(tmp_path: Path, repository: Path) -> None:
    missing = {peer.name: reason for peer in PEERS for python, reason in [peer_python(peer)] if not python}
    if len(missing) == len(PEERS):
        pytest.skip(f"no peer can be had here: {missing}")
    document = run_benchmarks(tmp_path, repository, "--only", "saves", without=("--without-nvrx",))
    figures = {figure["name"]: figure for figure in document["figures"]}
    compared = {peer.name for peer in PEERS if f"{peer.module}_stall" in figures}
    assert compared == {peer.name for peer in PEERS} - missing.keys(), f"not to be had: {missing}"
    assert {"best_peer_stall", "best_peer_committed"} <= set(figures)
    for figure in figures.values():
        check_shape(figure)


def test_the_picture_of_saves_shows_those_that_were_measured() -> None:
    found = {
        "memcpy": [0.04],
        "gloo": [0.1],
        "torch_save": [0.2],
        "ours_replicated.stall": [0.04],
        "ours_replicated": [0.2],
    }
    drawn = saves_chart({**found, "lm_resiliency_async": [0.3]})  # whose wait is not known
    assert "ours, 2-fold" in drawn
    assert "torch.save" in drawn
    assert "lm-resiliency" not in drawn
    assert drawn.count('class="between"') == 2


def test_settings_reach_other_processes_as_they_are() -> None:
    assert Settings.from_json(FULL.to_json()) == FULL
    assert 240e6 < FULL.shard_bytes < 270e6


def test_ratios_are_formed_round_by_round() -> None:
    ratio = Series((2.0, 30.0, 4.0)) / Series((1.0, 10.0, 4.0))
    assert ratio.samples == (2.0, 3.0, 1.0)
    assert (ratio.median, ratio.p95) == (2.0, 3.0)
    twenty = Series(tuple(float(i) for i in range(1, 21)))
    assert (twenty.p5, twenty.p95) == (2.0, 19.0)
    with pytest.raises(ValueError, match=r"shorter|longer"):
        Series((1.0,)) / Series((1.0, 2.0))
    with pytest.raises(ValueError, match="at least one"):
        Series(())


def test_a_goal_is_judged_by_the_median_and_a_problem_misses_it() -> None:
    ours, base = Series((1.0, 1.1, 9.0)), Series((1.0, 1.0, 1.0))
    figure = Figure("stall", "", ours, "memcpy", base, ours / base, Goal("at most", 1.15))
    assert figure.met
    assert Figure("stall", "", ours, "memcpy", base, ours / base, Goal("at most", 1.05)).met is False
    assert Figure("import", "", ours, "", base, ours / base, Goal("at most", 2.0), problem="it warns").met is False
    assert Figure("seconds", "", ours, goal=Goal("at least", 5.0)).met is False
    assert Figure("info", "", ours).met is None


NVRX_MEASURES = (
    "nvrx_local", "nvrx_replicated", "nvrx_async.stall",
    "drop_in_local", "drop_in_replicated", "drop_in_async.stall",
)  # fmt: skip


SAVE_MEASURES = (
    "memcpy", "hash", "gloo", "torch_save", "dcp_save", "dcp_async", "dcp_async.stall", "dcp_process",
    "dcp_process.stall", "ours_local", "ours_replicated", "ours_replicated.stall", "ours_device_bound",
    "ours_in_flight.stall",
)  # fmt: skip


def test_being_faster_than_nvrx_is_told_only_if_it_was_measured() -> None:
    found = dict.fromkeys(SAVE_MEASURES, Series((1.0, 1.0)))
    assert not [figure for figure in save_figures(found) if figure.name.startswith("nvrx")]
    found |= {name: Series((26.0, 26.0)) for name in NVRX_MEASURES}
    told = {figure.name: figure for figure in save_figures(found)}
    assert told["nvrx_stall"].met
    assert told["nvrx_stall"].ratio == Series((26.0, 26.0))
    assert str(told["nvrx_committed"].goal) == "≥ 5"
    assert told["nvrx_stall"].more_is_better
    assert not told["stall"].more_is_better


def test_the_best_peer_is_the_best_of_each_round_among_those_that_do_the_same_work() -> None:
    found = dict.fromkeys(SAVE_MEASURES, Series((1.0, 1.0)))
    assert not [figure for figure in save_figures(found) if figure.name.startswith("best_peer")]
    found |= {
        "dcp_async.stall": Series((30.0, 30.0)), "dcp_async": Series((0.5, 0.5)),
        "dcp_process.stall": Series((30.0, 30.0)), "dcp_process": Series((0.9, 0.9)),
        "torchsnapshot_async.stall": Series((11.0, 20.0)), "torchsnapshot_async": Series((9.0, 1.0)),
        "torchsnapshot_save": Series((8.0, 8.0)),
    }  # fmt: skip
    told = {figure.name: figure for figure in save_figures(found)}
    assert told["torchsnapshot_save"].ratio == Series((8.0, 8.0))
    assert told["best_peer_committed"].ratio == Series((0.5, 0.5))
    assert told["best_peer_committed"].what.endswith("on one node than")
    found |= {"lm_resiliency_async.stall": Series((12.0, 10.0)), "lm_resiliency_async": Series((4.0, 4.0))}
    told = {figure.name: figure for figure in save_figures(found)}
    assert told["best_peer_stall"].ratio == Series((11.0, 10.0))
    assert told["best_peer_stall"].met
    assert told["best_peer_committed"].ratio == told["lm_resiliency_committed"].ratio == Series((4.0, 4.0))
    assert told["best_peer_committed"].what.endswith("on both nodes than")
    assert str(told["best_peer_committed"].goal) == "≥ 3"


def test_a_restore_is_held_against_the_best_of_each_round_and_an_unproved_file_is_no_package() -> None:
    limits = {name: Series((1.0, 1.0)) for name in ("seconds", "memcpy", "hash", "gloo_one_way", "whole")}
    found = {f"{state}/{where}": dict(limits) for state in ("in_place", "adam") for where in ("own", "peer")}
    found["in_place/own"] |= {"torch": Series((0.5, 0.5)), "dcp": Series((4.0, 6.0))}
    told = {figure.name: figure for figure in restore_figures(found)}
    assert told["restore_torch"].ratio == Series((0.5, 0.5))
    assert "restore_best" not in told
    assert "restore_nvrx_peer" not in told
    found["in_place/own"] |= {"nvrx": Series((5.0, 5.0)), "lm_resiliency": Series((9.0, 3.0))}
    found["in_place/peer"] |= {"nvrx_replicated": Series((1.5, 1.5))}
    told = {figure.name: figure for figure in restore_figures(found)}
    assert told["restore_best"].ratio == Series((4.0, 3.0))
    assert told["restore_best"].met
    assert told["restore_nvrx_peer"].met is False


def test_planning_is_held_against_half_the_ranks() -> None:
    found = {
        ranks: {"decode": Series((seconds,)), "plan": Series((seconds,))} for ranks, seconds in ((64, 0.1), (128, 0.3))
    }
    told = {figure.name: figure for figure in planning_figures(found)}
    assert told["planning_64"].ratio is None
    assert told["planning_128"].ratio == Series((0.6 / 0.4,))
    assert told["planning"].met


def test_an_environment_that_cannot_be_made_leaves_nvrx_out_with_a_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    python, reason = nvrx_python(tmp_path / "file" / "env")
    assert python == ""
    assert "could not be made" in reason


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_an_environment_that_cannot_be_made_leaves_a_peer_out_with_a_reason(tmp_path: Path, peer: Peer) -> None:
    (tmp_path / "file").write_text("")
    python, reason = peer_python(peer, tmp_path / "file" / "env")
    assert python == ""
    assert "could not be made" in reason


def test_a_peer_that_cannot_be_installed_leaves_out_no_other(tmp_path: Path) -> None:
    nowhere = ("--no-index", "--find-links", str(tmp_path), "--retries=0")
    python, reason = peer_python(
        Peer("no-such-peer", "1.0", "no_such_peer", (), False, pip_options=nowhere), tmp_path / "env"
    )
    assert python == ""
    assert reason.startswith("no-such-peer==1.0 could not be installed: ")
    there = Peer("torch", torch.__version__, "torch", (), False)  # which is borrowed
    assert peer_python(there, tmp_path / "env") == (str(tmp_path / "env" / "bin" / "python"), "")


def test_a_peer_that_cannot_save_is_named_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers_rounds, "peer_python", lambda _: (sys.executable, ""))
    said: list[str] = []
    with ExitStack() as crews:
        broken = [Peer("broken", "1.0", "no_such_peer", ("broken_async",), False)]
        assert peers_rounds.peer_turns(crews, broken, QUICK, tmp_path, said.append) == []
    assert len(said) == 1
    assert said[0].startswith("broken is not compared: ")
    assert "no_such_peer" in said[0]


def test_where_memory_is_short_the_peers_are_left_out_and_that_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    vast = replace(QUICK, rows=1 << 20, columns=1 << 20)
    with ExitStack() as crews:
        assert peers_rounds.peer_turns(crews, PEERS, vast, tmp_path, said.append) == []
    assert len(said) == 1
    assert all(peer.name in said[0] for peer in PEERS)
    assert "bytes are free" in said[0]
