"""A real Slurm cluster on this host: one slurmctld, several slurmd with names of their own, munge with its own key.

Everything lies below one directory and is ended by process id. A node dies as a machine does: its slurmd, the steps
that it started and every process below them, at once.
"""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Cluster", "cluster", "missing"]

_SBIN = "/usr/sbin:/usr/bin"
_UP_S = 30.0


def missing() -> str:
    """Why there can be no cluster here; "" if there can."""
    lacking = [name for name in ("slurmctld", "slurmd", "munged", "sbatch") if shutil.which(name, path=_SBIN) is None]
    if lacking:
        return f"not installed: {', '.join(lacking)} (`make test-slurm` installs Debian's slurm-wlm and munge)"
    return "" if os.geteuid() == 0 else "slurmd and munge need root"


@dataclass
class Cluster:
    """`root` is searched by other users too: munge runs as its own."""

    root: Path
    nodes: tuple[str, ...]
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        path = f"{os.environ['PATH']}:{_SBIN}"
        return {**os.environ, "PATH": path, "SLURM_CONF": str(self.root / "slurm.conf")}

    def ask(self, *command: str, timeout_s: float = 60.0) -> str:
        """Run one of Slurm's commands; its output."""
        ran = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=timeout_s)
        if ran.returncode:
            raise RuntimeError(f"{' '.join(command)}: {ran.stdout}{ran.stderr}")
        return ran.stdout.strip()

    def submit(self, script: Path, *options: str, **variables: str) -> int:
        """Submit a job script; the job's number. `variables` go into its environment."""
        export = ",".join(["ALL", *(f"{name}={value}" for name, value in variables.items())])
        return int(self.ask("sbatch", "--parsable", f"--export={export}", *options, str(script)))

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` tells; empty once Slurm has forgotten it."""
        try:
            told = self.ask("scontrol", "show", "job", str(number), "--oneliner")
        except RuntimeError:
            return {}
        return dict(word.split("=", 1) for word in told.split() if "=" in word)

    def state(self, number: int) -> str:
        return self.job(number).get("JobState", "")

    def node_state(self, node: str) -> str:
        return self.ask("sinfo", "-h", "-N", "-n", node, "-o", "%T")

    def lose(self, node: str) -> None:
        """The machine is gone: slurmd, its steps and all below them, killed together."""
        doomed = [self.processes[node].pid, *self._steps_of(node)]
        family = [each for pid in doomed for each in (pid, *_descendants(pid))]
        for pid in family:
            _kill(pid, signal.SIGSTOP)  # none may start anything, or see another one die
        for pid in family:
            _kill(pid, signal.SIGKILL)
        self.processes[node].wait(30)

    def _steps_of(self, node: str) -> list[int]:
        """Step daemons leave slurmd's family; they hold the node's log file open."""
        log = str(self.root / f"slurmd-{node}.log")
        return [pid for pid in _pids() if "slurmstepd" in _command(pid) and log in _open_files(pid)]

    def start_node(self, node: str) -> None:
        self._start(node, "slurmd", "-D", "-N", node)

    def close(self) -> None:
        for node in self.nodes:
            if node in self.processes and self.processes[node].poll() is None:
                self.lose(node)
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)

    def _start(self, name: str, *command: str) -> None:
        log = (self.root / f"{name}.out").open("ab")
        self.processes[name] = subprocess.Popen(command, env=self.env, stdout=log, stderr=log, start_new_session=True)
        log.close()


@contextmanager
def cluster(root: Path, nodes: int = 4) -> Iterator[Cluster]:
    """Up when the context begins, gone when it ends."""
    made = Cluster(root, tuple(f"n{number}" for number in range(1, nodes + 1)))
    root.chmod(0o755)
    try:
        _munge(made)
        (root / "slurm.conf").write_text(_configuration(made), encoding="utf-8")
        for name in ("state", *(f"spool-{node}" for node in made.nodes)):
            (root / name).mkdir()
        made._start("slurmctld", "slurmctld", "-D", "-i")
        for node in made.nodes:
            made.start_node(node)
        wait_until(lambda: all(made.node_state(node) == "idle" for node in made.nodes), _UP_S, "the nodes are idle")
        yield made
    finally:
        made.close()


def wait_until(happened: Callable[[], object], bound_s: float, what: str) -> None:
    """Poll; AssertionError with `what` when it does not happen."""
    deadline = time.monotonic() + bound_s
    while True:
        try:
            if happened():
                return
        except (RuntimeError, subprocess.TimeoutExpired):
            if time.monotonic() > deadline:
                raise
        assert time.monotonic() < deadline, f"it did not happen that {what}"
        time.sleep(0.2)


def _munge(made: Cluster) -> None:
    home, user = made.root / "munge", pwd.getpwnam("munge")
    home.mkdir(mode=0o755)
    (home / "key").write_bytes(secrets.token_bytes(128))
    (home / "key").chmod(0o400)
    for path in (home, home / "key"):
        os.chown(path, user.pw_uid, user.pw_gid)
    log = (made.root / "munged.out").open("ab")
    made.processes["munged"] = subprocess.Popen(
        ["munged", "--foreground", f"--key-file={home}/key", f"--socket={home}/socket", f"--pid-file={home}/pid",
         f"--log-file={home}/log", f"--seed-file={home}/seed"],
        env=made.env, stdout=log, stderr=log, user=user.pw_uid, group=user.pw_gid, start_new_session=True,
    )  # fmt: skip
    log.close()
    wait_until((home / "socket").exists, _UP_S, "munged answers")


def _configuration(made: Cluster) -> str:
    """One host that plays all nodes: ports of their own, no cgroups."""
    host, ports = socket.gethostname().split(".")[0], _free_ports(len(made.nodes) + 1)
    lines = [
        "ClusterName=rehearsal",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={ports[0]}",
        "AuthType=auth/munge",
        f"AuthInfo=socket={made.root}/munge/socket",
        "CryptoType=crypto/munge",
        "SlurmUser=root",
        f"StateSaveLocation={made.root}/state",
        f"SlurmdSpoolDir={made.root}/spool-%n",
        f"SlurmctldPidFile={made.root}/slurmctld.pid",
        f"SlurmdPidFile={made.root}/slurmd-%n.pid",
        f"SlurmctldLogFile={made.root}/slurmctld.log",
        f"SlurmdLogFile={made.root}/slurmd-%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SlurmdParameters=config_overrides",
        "SlurmdTimeout=5",
        "SlurmctldTimeout=10",
        "InactiveLimit=0",
        "KillWait=10",
        "ReturnToService=0",
        "JobRequeue=1",
        "MpiDefault=none",
        "SchedulerParameters=bf_interval=5,sched_interval=5",
        "AccountingStorageType=accounting_storage/none",
        "JobAcctGatherType=jobacct_gather/none",
    ]
    for node, port in zip(made.nodes, ports[1:], strict=True):
        lines.append(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 RealMemory=4000 State=UNKNOWN"
        )
    lines.append("PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=NO")
    return "\n".join(lines) + "\n"


def _free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    try:
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""


def _open_files(pid: int) -> set[str]:
    found: set[str] = set()
    try:
        for name in os.listdir(f"/proc/{pid}/fd"):
            found.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    except OSError:
        pass  # it ended meanwhile
    return found


def _descendants(pid: int) -> list[int]:
    children: dict[int, list[int]] = {}
    for each in _pids():
        try:
            parent = int(Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        children.setdefault(parent, []).append(each)
    found = [pid]
    for each in found:
        found += children.get(each, [])
    return found[1:]


def _kill(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return
