"""What bites on clusters: findings from the facts of a node, its Slurm and a job script. Pure; `doctor` tells them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

__all__ = ["Finding", "Interface", "JobScript", "Level", "SiteFacts", "judge_site", "parse_job_script"]

Level = Literal["error", "warning", "info"]

_FEW_FILES: Final = 4096
_FEW_SECONDS: Final = 120
_FIRST_LOGIN_UID: Final = 1000


@dataclass(frozen=True)
class Finding:
    """`level`: an error keeps the job from working, a warning from surviving."""

    level: Level
    what: str
    advice: str = ""


@dataclass(frozen=True)
class Interface:
    """A network interface that is up. `mbit_per_s`: None where the driver does not say."""

    name: str
    mbit_per_s: int | None
    addresses: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobScript:
    """What the `#SBATCH` lines of a job script ask for: options by their long names ("" for those without a value)."""

    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SiteFacts:
    """What was found out; None where it could not be. `slurm`: settings of slurm.conf, by name."""

    uid: int = 0
    memory_dirs: tuple[str, ...] = ()  # where saves and arenas lie
    slurm: Mapping[str, str] | None = None
    remove_ipc: bool | None = None  # logind's
    lingers: bool = False  # this user's session never ends, as logind sees it
    open_files: int | None = None  # the soft limit
    gloo_interface: str = ""  # GLOO_SOCKET_IFNAME
    own_address: str = ""  # what this host's name stands for
    interfaces: tuple[Interface, ...] = ()
    memory_limit_bytes: int | None = None  # of the control group
    script: JobScript | None = None


def parse_job_script(text: str) -> JobScript:
    """The options in a script's `#SBATCH` lines, which end at the first command, as for `sbatch`."""
    options: dict[str, str] = {}
    for line in text.splitlines():
        if line.strip() and not line.startswith("#"):
            break
        if not line.startswith("#SBATCH"):
            continue
        for word in re.findall(r"--([\w-]+)(?:=(\S+))?", line.removeprefix("#SBATCH")):
            options[word[0]] = word[1]
        short = re.search(r"(?:^|\s)-t\s*(\S+)", line.removeprefix("#SBATCH"))
        if short:
            options["time"] = short[1]
    return JobScript(options)


def judge_site(facts: SiteFacts) -> list[Finding]:
    """All that is worth telling, in the order of the parts of a site."""
    found: list[Finding] = []
    for part in (_slurm, _logind, _limits, _network, _script):
        found += part(facts)
    return found


def _in_memory(facts: SiteFacts) -> Sequence[str]:
    return [path for path in facts.memory_dirs if path.startswith("/dev/shm")]


def _slurm(facts: SiteFacts) -> Iterator[Finding]:
    settings = facts.slurm or {}
    if "tmpfs" in settings.get("JobContainerType", ""):
        private = [path for path in facts.memory_dirs if path.startswith(("/dev/shm", "/tmp"))]
        for path in private:
            yield Finding(
                "warning",
                f"Slurm gives each job a /tmp and /dev/shm of its own (JobContainerType=job_container/tmpfs): {path} "
                "goes with the job, so that a requeued one finds nothing there.",
                "Use a directory outside of what job_container.conf lists (its Dirs).",
            )
    kept = " or ".join(facts.memory_dirs)
    for name in ("Prolog", "Epilog"):
        program = settings.get(name, "(null)")
        if program not in ("(null)", "") and kept:
            yield Finding(
                "info",
                f"{name}={program} runs on each node around every job, a requeued one included.",
                f"Make sure that it does not wipe {kept} (slurm/epilog.sh frees finished runs).",
            )
    if settings.get("JobRequeue") == "0" and "requeue" not in (facts.script or JobScript()).options:
        yield Finding(
            "warning",
            "Slurm's JobRequeue=0: a job of whose nodes one fails is not started again.",
            "Submit with --requeue.",
        )


def _logind(facts: SiteFacts) -> Iterator[Finding]:
    at_risk = facts.uid >= _FIRST_LOGIN_UID and facts.remove_ipc and not facts.lingers
    for path in _in_memory(facts) if at_risk else ():
        yield Finding(
            "warning",
            f"logind removes this user's files below /dev/shm when their last session ends (RemoveIPC): {path} too.",
            "Set RemoveIPC=no in logind.conf on the nodes, or have `loginctl enable-linger` run for this user.",
        )


def _limits(facts: SiteFacts) -> Iterator[Finding]:
    if facts.open_files is not None and facts.open_files < _FEW_FILES:
        yield Finding(
            "warning",
            f"a process may have {facts.open_files} files open: sockets to peers, mapped checkpoint files and data "
            "loaders share them.",
            f"Raise it: ulimit -n {4 * _FEW_FILES} in the job script.",
        )
    if facts.memory_limit_bytes is not None and _in_memory(facts):
        gib = facts.memory_limit_bytes / (1 << 30)
        yield Finding(
            "info",
            f"this job's control group may use {gib:.1f} GiB, and files on /dev/shm count within it.",
            "Ask for memory for the saves too (--mem); the memory budget below is held against the limit.",
        )


def _network(facts: SiteFacts) -> Iterator[Finding]:
    known = {each.name: each for each in facts.interfaces if each.name != "lo"}
    fastest = max((each for each in known.values() if each.mbit_per_s), key=_speed, default=None)
    if facts.gloo_interface:
        used = known.get(facts.gloo_interface)
    else:
        used = next((each for each in known.values() if facts.own_address in each.addresses), None)
        if facts.own_address.startswith("127.") and known:
            yield Finding(
                "warning",
                f"this host's name stands for {facts.own_address}: gloo would tell its peers an address that only this "
                "host can reach.",
                f"Set GLOO_SOCKET_IFNAME, for example to {(fastest or next(iter(known.values()))).name}.",
            )
    if used is not None and fastest is not None and 4 * _speed(used) <= _speed(fastest):
        yield Finding(
            "warning",
            f"gloo, which carries replicas, would use {used.name} ({_speed(used)} Mbit/s); {fastest.name} has "
            f"{_speed(fastest)}.",
            f"Set GLOO_SOCKET_IFNAME={fastest.name}.",
        )


def _speed(interface: Interface) -> int:
    return interface.mbit_per_s or 0


def _script(facts: SiteFacts) -> Iterator[Finding]:
    if facts.script is None:
        return
    options = facts.script.options
    if "no-requeue" in options or ("requeue" not in options and "no-kill" not in options):
        yield Finding(
            "warning",
            "the job script does not ask for --requeue: the loss of a node ends the job for good.",
            "#SBATCH --requeue (or a chain of jobs, slurm/chain.sbatch).",
        )
    if options.get("open-mode") != "append":
        yield Finding(
            "warning",
            "the job script does not set --open-mode=append: each start overwrites what the one before it printed.",
            "#SBATCH --open-mode=append",
        )
    signal = re.fullmatch(r"(?:[BR]{1,2}:)?(\w+)(?:@(\d+))?", options.get("signal", ""))
    if signal is None:
        yield Finding(
            "warning",
            "the job script asks for no --signal: at the time limit the work since the last save is lost.",
            "#SBATCH --signal=B:USR2@600, passed on to the step (slurm/requeue.sbatch), or set stop_before_s.",
        )
    elif signal[1] not in ("USR2", "SIGUSR2", "TERM", "SIGTERM", "12", "15"):
        yield Finding("warning", f"--signal={options['signal']}: trainers take USR2 and TERM for a stop.", "Use USR2.")
    elif int(signal[2] or 60) < _FEW_SECONDS:
        yield Finding(
            "warning",
            f"--signal={options['signal']}: Slurm counts that in rounds of a minute, and the last save needs its time.",
            "Give 600 seconds, or more for a large persistent checkpoint.",
        )
