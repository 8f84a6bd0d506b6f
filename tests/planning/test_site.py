"""What bites on clusters is told, each with what to do; a sound site is not nagged at."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.planning.site import Interface, JobScript, SiteFacts, judge_site, parse_job_script

SCRIPT = JobScript({"requeue": "", "open-mode": "append", "signal": "B:USR2@600", "time": "24:00:00"})
SOUND = SiteFacts(
    uid=1000,
    memory_dirs=("/dev/shm/run",),
    slurm={"JobContainerType": "(null)", "Prolog": "(null)", "Epilog": "(null)", "JobRequeue": "1"},
    remove_ipc=False,
    open_files=65536,
    gloo_interface="ib0",
    own_address="10.0.0.5",
    interfaces=(Interface("eth0", 1000, ("10.0.0.5",)), Interface("ib0", 100_000, ("10.1.0.5",))),
    script=SCRIPT,
)


def told(facts: SiteFacts, level: str = "warning") -> str:
    return " | ".join(f"{each.what} → {each.advice}" for each in judge_site(facts) if each.level == level)


def test_a_sound_site_is_not_nagged_at() -> None:
    assert judge_site(SOUND) == []


def test_what_is_not_known_is_not_judged() -> None:
    assert judge_site(SiteFacts()) == []


@pytest.mark.parametrize(
    ("changed", "what"),
    [
        ({"slurm": {"JobContainerType": "job_container/tmpfs"}}, "/dev/shm/run goes with the job"),
        ({"remove_ipc": True}, "RemoveIPC"),
        ({"open_files": 1024}, "1024 files open"),
        ({"gloo_interface": ""}, "gloo, which carries replicas, would use eth0 (1000 Mbit/s); ib0 has 100000"),
        ({"gloo_interface": "", "own_address": "127.0.1.1"}, "127.0.1.1: gloo would tell its peers an address"),
        ({"script": JobScript({**SCRIPT.options, "no-requeue": ""})}, "--requeue"),
        ({"script": JobScript({})}, "--open-mode=append"),
        ({"script": JobScript({**SCRIPT.options, "signal": ""})}, "no --signal"),
        ({"script": JobScript({**SCRIPT.options, "signal": "USR1@600"})}, "trainers take USR2 and TERM"),
        ({"script": JobScript({**SCRIPT.options, "signal": "B:USR2@30"})}, "rounds of a minute"),
        ({"slurm": {"JobRequeue": "0"}, "script": None}, "JobRequeue=0"),
    ],
)
def test_what_bites_is_told_with_what_to_do(changed: dict[str, object], what: str) -> None:
    warned = told(replace(SOUND, **changed))  # type: ignore[arg-type]
    assert what in warned
    assert all(each.advice for each in judge_site(replace(SOUND, **changed)))  # type: ignore[arg-type]


@pytest.mark.parametrize("safe", [{"uid": 0}, {"lingers": True}, {"memory_dirs": ("/local/nvme",)}])
def test_logind_is_no_danger_to_system_users_lingering_ones_and_other_places(safe: dict[str, object]) -> None:
    assert told(replace(SOUND, remove_ipc=True, **safe)) == ""  # type: ignore[arg-type]


def test_programs_around_jobs_and_limits_are_pointed_out() -> None:
    facts = replace(SOUND, slurm={"Epilog": "/etc/slurm/wipe.sh"}, memory_limit_bytes=64 << 30)
    assert "/etc/slurm/wipe.sh runs on each node" in told(facts, "info")
    assert "64.0 GiB, and files on /dev/shm count" in told(facts, "info")


def test_the_options_of_a_script_end_at_its_first_command() -> None:
    script = parse_job_script(
        "#!/bin/bash\n# words --requeue\n#SBATCH --nodes=2 --open-mode=append\n#SBATCH -t 10\n\nsrun true\n"
        "#SBATCH --requeue\n"
    )
    assert script.options == {"nodes": "2", "open-mode": "append", "time": "10"}


@given(st.text())
def test_any_text_is_a_job_script(text: str) -> None:
    judge_site(replace(SOUND, script=parse_job_script(text)))
