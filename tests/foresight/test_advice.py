"""Advice: the job's own functions answer, the simulation agrees, and nothing is proposed that does not fit."""

from __future__ import annotations

import shlex
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.errors import ConfigError
from resilience.foresight.advice import Advice, Question, advise
from resilience.foresight.costs import ASSUMED, durations_of
from resilience.planning.cadence import best_interval, expected_goodput

ALL = ("none", "replica", "xor", "rs")
TODAY = ("none", "replica")
JOB = Question(ranks=256, ranks_per_node=8, step_s=2.0, shard_bytes=2_000_000_000, mtbf_s=6 * 3600, speed=ASSUMED)
GIB = 1 << 30


def ask(available: tuple[Any, ...] = ALL, **changes: Any) -> Advice:
    return advise(replace(JOB, **changes), available)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([8, 24, 64, 256]), st.floats(0.1, 20), st.integers(10**6, 2 * 10**10), st.floats(600, 10**6),
    st.floats(0, 0.7), st.floats(0, 0.3),
)  # fmt: skip
def test_the_proposal_is_the_best_of_what_is_compared(
    ranks: int, step_s: float, shard_bytes: int, mtbf_s: float, process_share: float, rack_share: float
) -> None:
    advice = ask(
        ranks=ranks, step_s=step_s, shard_bytes=shard_bytes, mtbf_s=mtbf_s, process_share=process_share,
        rack_share=rack_share, nodes_per_rack=2,
    )  # fmt: skip
    best = advice.best
    assert all(0 <= option.expected_goodput <= 1 for option in advice.options)
    assert best.expected_goodput >= max(option.expected_goodput for option in advice.options) - 0.001
    assert best.interval * step_s >= best.durations.protect_s * (1 - 1e-9), "the next save would find no room"
    assert best.persist_interval % best.interval == 0
    assert best.persist_interval * step_s >= best.durations.persist_s * (1 - 1e-9)
    assert dict(advice.intervals)[best.interval] == best.expected_goodput
    longer = [goodput for every, goodput in advice.intervals if every >= best.interval]
    assert all(before >= after - 0.003 for before, after in pairwise(longer))


def test_the_interval_is_the_one_that_a_job_with_auto_cadence_takes() -> None:
    best = ask().best
    assert best.interval == best_interval(save_s=best.stall_s, step_s=JOB.step_s, mtbf_s=JOB.mtbf_s)
    slow = ask(speed=replace(ASSUMED, network=5e7)).best
    if slow.redundancy != "none":
        assert slow.interval * JOB.step_s >= slow.durations.protect_s


def test_twice_the_bytes_take_twice_as_long_and_a_disk_takes_longer_than_memory() -> None:
    def seconds(shard_bytes: int, on_disk: bool) -> list[float]:
        stall_s, takes = durations_of(
            shard_bytes=shard_bytes, sent_bytes=shard_bytes, kept_bytes=shard_bytes, ranks=16, ranks_per_node=8,
            on_disk=on_disk, speed=ASSUMED, detect_s=0, restart_s=0,
        )  # fmt: skip
        return [stall_s, takes.commit_s, takes.protect_s, takes.restore_s, takes.peer_restore_s, takes.persist_s]

    memory, disk = seconds(10**9, False), seconds(10**9, True)
    assert seconds(2 * 10**9, False) == pytest.approx([2 * each for each in memory])
    assert all(one <= other for one, other in zip(memory, disk, strict=True))
    assert memory[0] == 8e9 / ASSUMED.memory


def test_racks_that_fail_whole_become_the_failure_domains() -> None:
    best = ask(rack_share=0.2, nodes_per_rack=4).best
    assert best.racks_apart
    assert best.jump == 32
    assert best.to_shared_storage < 0.01
    assert not ask(rack_share=0.2, nodes_per_rack=32).best.racks_apart, "there is one rack only"


def test_what_does_not_fit_the_node_s_memory_goes_to_its_disk_and_what_fits_nowhere_is_refused() -> None:
    needed = ask(TODAY).best.memory.total
    roomy = ask(TODAY, memory_bytes=2 * needed, disk_bytes=0)
    assert (roomy.best.save_type, roomy.best.fits) == ("in_memory", True)
    tight = ask(TODAY, memory_bytes=int(0.4 * needed), disk_bytes=10 * needed)
    assert tight.best.fits
    assert tight.best.memory.needs[0][1] <= 0.4 * needed
    with pytest.raises(ConfigError, match="Nothing fits: the least"):
        ask(TODAY, memory_bytes=GIB, disk_bytes=GIB)


def test_a_scheme_that_this_version_lacks_is_compared_but_not_proposed() -> None:
    kept = min(option.memory.total for option in ask(ALL).options if option.redundancy == "xor")
    squeezed = {"memory_bytes": int(1.05 * kept), "disk_bytes": 0}
    assert ask(ALL, **squeezed).best.redundancy == "xor"
    lacking = ask(TODAY, **squeezed)
    assert lacking.best.redundancy == "none"
    assert any("would be better, but is not in this version" in each for each in lacking.why)
    assert {option.redundancy for option in lacking.options} == set(ALL)


def test_one_node_has_nobody_to_send_copies_to() -> None:
    alone = ask(ranks=8)
    assert alone.best.redundancy == "none"
    assert "There is one node" in " ".join(alone.why)


def test_work_that_no_save_holds_yet_and_the_way_back_cost_goodput() -> None:
    def goodput(**changes: Any) -> float:
        return ask(**changes).best.expected_goodput

    assert goodput() < goodput(mtbf_s=24 * 3600)
    assert goodput() < goodput(restart_s=0.0)
    assert goodput(process_share=0.0, speed=replace(ASSUMED, network=1e9)) < goodput(process_share=0.0)
    assert expected_goodput(10, save_s=0, step_s=1, mtbf_s=1e9) == pytest.approx(1)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"mtbf_s": 3600.0},
        {"process_share": 0.0},
        {"rack_share": 0.3, "nodes_per_rack": 4},
        {"rack_share": 0.3, "nodes_per_rack": 32},
        {"shard_bytes": 10**10, "mtbf_s": 2 * 3600.0},
        {"ranks": 8, "mtbf_s": 3600.0},
    ],
)
def test_the_expected_goodput_is_what_the_simulation_finds(changes: dict[str, Any]) -> None:
    import json
    from contextlib import redirect_stdout
    from io import StringIO

    from resilience.cli import main
    from resilience.cli_advise import simulation_of

    question = replace(JOB, **changes)
    best = ask(TODAY, **changes).best
    command = shlex.split(simulation_of(question, best))
    assert command[0] == "resilience"
    told = StringIO()
    with redirect_stdout(told):
        assert main([*command[1:], "--runs", "100", "--json"]) == 0
    found = json.loads(told.getvalue())
    assert found["save_every"] == best.interval
    assert found["goodput"] == pytest.approx(best.expected_goodput, abs=0.01)
