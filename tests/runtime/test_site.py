"""The facts of this very machine can be found out, and the shipped job scripts give no cause for warnings."""

from __future__ import annotations

from pathlib import Path

import pytest

from resilience.planning.site import SiteFacts, judge_site, parse_job_script
from resilience.runtime.site import site_facts, slurm_settings


def test_this_machine_is_looked_at_in_full(tmp_path: Path) -> None:
    facts = site_facts([str(tmp_path)], {"GLOO_SOCKET_IFNAME": "lo"}, None)
    assert facts.open_files is not None
    assert facts.open_files > 0
    assert any(each.name == "lo" and "127.0.0.1" in each.addresses for each in facts.interfaces)
    assert (facts.memory_dirs, facts.gloo_interface) == ((str(tmp_path),), "lo")
    judge_site(facts)


def test_without_slurm_its_settings_are_not_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm_settings() is None


def test_what_scontrol_prints_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "scontrol"
    program.write_text("#!/bin/sh\necho 'Configuration data as of now'\necho 'JobRequeue              = 1'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    assert slurm_settings() == {"JobRequeue": "1"}


@pytest.mark.parametrize("name", ["requeue.sbatch", "spares.sbatch", "container.sbatch"])
def test_the_shipped_scripts_give_no_cause_for_warnings(repository: Path, name: str) -> None:
    script = parse_job_script((repository / "slurm" / name).read_text())
    assert judge_site(SiteFacts(script=script)) == []
