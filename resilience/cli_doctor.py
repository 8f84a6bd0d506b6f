"""`resilience doctor`: would this configuration work on this machine? Checks before training, changes nothing."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resilience.cli_numbers import byte_count
from resilience.cli_sources import at_least_one
from resilience.config import CheckpointConfig, ResiliencyConfig, load_config, validate_together
from resilience.errors import CommandError, ConfigError, MemoryBudgetError, ResilienceError
from resilience.planning.memory import MemoryBudget, budget, check
from resilience.planning.schedule import shortest_interval
from resilience.planning.schemes import SCHEMES, Scheme
from resilience.planning.site import Finding, JobScript, Level, judge_site, parse_job_script
from resilience.planning.topology import Topology
from resilience.runtime.memory import available_bytes
from resilience.runtime.site import site_facts
from resilience.snapshot.streaming import STREAMING
from resilience.stores.authentication import key_of
from resilience.stores.discovery import find_sources
from resilience.stores.filesystem import FileSystem, PosixFileSystem
from resilience.stores.shared_store import SharedStore

if TYPE_CHECKING:
    from rich.console import Console

_BUFFER_BYTES_PER_RANK = 4 << 20  # bounded buffers of one rank: hashing and sending


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on a parser (of this command only)."""
    add = parser.add_argument
    add("--config", type=Path, required=True, metavar="F", help="YAML file with checkpoint: and resiliency: sections")
    add("--world-size", type=at_least_one, metavar="N", help="ranks of the job (default 1)", default=1)
    add("--ranks-per-node", type=at_least_one, metavar="N", help="default: all ranks on one node")
    add("--state-bytes", type=byte_count, metavar="B", help="bytes of one rank's shard, for the memory budget "
        "(default: as in the newest save on this node, if there is one)")  # fmt: skip
    add("--job-script", type=Path, metavar="F", help="the Slurm job script that is to be submitted")


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Examine; status 1 if something would be refused. CommandError (status 2) if the file is not there."""
    if not args.config.is_file():
        raise CommandError(f"There is no configuration {args.config}.", advice="Give a YAML file.", status=2)
    script = _job_script(args.job_script)
    findings: list[Finding] = []
    memory: dict[str, Any] | None = None
    try:
        checkpoint, resiliency = load_config(args.config, os.environ)
    except ConfigError as error:
        findings.append(_refused(error))
    else:
        doctor = _Doctor(checkpoint, resiliency, args.world_size, args.ranks_per_node, PosixFileSystem())
        memory = doctor.examine(args.state_bytes)
        findings = [*doctor.findings, *judge_site(site_facts(doctor.memory_dirs(), os.environ, script))]
    ok = not any(finding.level == "error" for finding in findings)
    return (0 if ok else 1), {"ok": ok, "findings": [vars(each) for each in findings], "memory": memory}


def _job_script(path: Path | None) -> JobScript | None:
    if path is None:
        return None
    try:
        return parse_job_script(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise CommandError(f"The job script {path} cannot be read: {error.strerror}.", status=2) from error


class _Doctor:
    """One examination; what is found is gathered in `findings`."""

    def __init__(
        self,
        checkpoint: CheckpointConfig,
        resiliency: ResiliencyConfig,
        world_size: int,
        ranks_per_node: int | None,
        fs: FileSystem,
    ) -> None:
        self.checkpoint = checkpoint
        self.resiliency = resiliency
        self.fs = fs
        self.per_node = min(ranks_per_node or world_size, world_size)
        self.nodes = tuple(f"node{rank // self.per_node}" for rank in range(world_size))
        # a domain in a configuration that all nodes read is the same one everywhere
        self.domains = tuple(resiliency.failure_domain or node for node in self.nodes)
        self.scheme: Scheme = SCHEMES[resiliency.redundancy if checkpoint.replication else "replica"]
        self.findings: list[Finding] = []

    @property
    def on_nodes(self) -> bool:
        return self.checkpoint.non_persistent_ckpt_type in ("local", "in_memory")

    def memory_dirs(self) -> list[str]:
        """Where this job keeps files on a node."""
        if not self.on_nodes:
            return []
        named = [str(self._memory_directory()), self.checkpoint.non_persistent_local_ckpt_dir]
        return list(dict.fromkeys(filter(None, named)))

    def examine(self, state_bytes: int | None) -> dict[str, Any] | None:
        """All checks; returns the memory budget, or None where there is none to make."""
        self._together()
        self._name()
        self._secret()
        self._save_directory()
        self._copies()
        if not self.on_nodes:
            return None
        topology = self._redundancy()
        memory_dir = self._memory_directory()
        local_dir = Path(self.checkpoint.non_persistent_local_ckpt_dir or memory_dir)
        own = local_dir if self.checkpoint.non_persistent_ckpt_type == "local" else memory_dir
        self._node_directory(own)
        if own != memory_dir and not self.fs.is_memory_backed(memory_dir):
            self._say("warning", f"{memory_dir} is not on a shared-memory mount: each snapshot waits for a disk.",
                      "Set resiliency.memory_dir to a directory on /dev/shm.")  # fmt: skip
        return None if topology is None else self._memory(state_bytes or self._known_bytes(own), own, topology)

    def _say(self, level: Level, what: str, advice: str = "") -> None:
        self.findings.append(Finding(level, what, advice))

    def _together(self) -> None:
        try:
            validate_together(
                self.checkpoint,
                self.resiliency,
                world_size=len(self.nodes),
                ranks_per_node=self.per_node,
                domains=self.domains,
            )
        except ConfigError as error:
            self.findings.append(_refused(error))
        if self.checkpoint.non_persistent_ckpt_type and not self.checkpoint.non_persistent_save_interval:
            self._say("warning", "Non-persistent saves have a type but no interval: none is ever due by itself.",
                      "Set checkpoint.non_persistent_save_interval.")  # fmt: skip

    def _name(self) -> None:
        """Whether a restart would find its own saves."""
        if self.resiliency.run_id or self.checkpoint.save or not self.checkpoint.non_persistent_ckpt_type:
            return
        if os.environ.get("SLURM_JOB_ID") or os.environ.get("TORCHELASTIC_RUN_ID"):
            self._say("info", "The run is named after its launcher's job: another job does not find its saves.",
                      "Set resiliency.run_id to go on over several jobs.")  # fmt: skip
        else:
            self._say("error", "The run has no name that a restart would know.",
                      "Set resiliency.run_id, or checkpoint.save.")  # fmt: skip

    def _secret(self) -> None:
        """The ranks' environment may be another one: what is wrong with this one is a warning."""
        try:
            key_of(self.resiliency.secret_env, os.environ)
        except ConfigError as error:
            self._say("warning", str(error).removesuffix(error.advice).rstrip(), error.advice)

    def _copies(self) -> None:
        if STREAMING.much is None:
            what = f"Tensors in host memory are copied with memcpy, which takes half as long again: {STREAMING.why}."
            self._say("info", what, "Install a C compiler, and then this package anew.")

    def _save_directory(self) -> None:
        if self.checkpoint.save is None:
            self._say("warning", "There is no `save`: nothing outlives the loss of all copies on the nodes.",
                      "Set checkpoint.save to a directory on shared storage.")  # fmt: skip
            return
        path = Path(self.checkpoint.save)
        self._writable(path, "checkpoint.save")
        if len(set(self.nodes)) > 1 and not self.fs.is_network(path):
            self._say("warning", f"{path} does not look like shared storage, and the job has several nodes.",
                      "Make sure that every node sees the same directory there.")  # fmt: skip
        try:
            owner = SharedStore(path, self.fs, source="save").owner()
        except (ResilienceError, OSError) as error:
            self._say("error", f"{path}: {error}")
            return
        if owner is not None and self.resiliency.run_id not in (None, owner.run_id):
            self._say("error", f"{path} belongs to run {owner.run_id!r}, and run_id is {self.resiliency.run_id!r}.",
                      "Choose another directory, or the other run_id.")  # fmt: skip

    def _redundancy(self) -> Topology | None:
        """How many copies there would be; None if that would be refused."""
        factor = self.checkpoint.replication_factor if self.checkpoint.replication else 1
        several = len(set(self.nodes)) > 1
        if several and factor == 1:
            self._say("warning", "Saves on the nodes are not replicated: the loss of one node takes them.",
                      "Set checkpoint.replication.")  # fmt: skip
        if factor < self.scheme.smallest_clique and self.checkpoint.replication:
            return None  # which was said already
        try:
            topology = self.scheme.place(
                self.nodes, jump=self.checkpoint.replication_jump, factor=factor,
                domains=dict(zip(self.nodes, self.domains, strict=True)), restart=False,
            )  # fmt: skip
        except ConfigError as error:
            finding = _refused(error)
            if not any(each.level == "error" and "failure domain" in each.what for each in self.findings):
                self.findings.append(finding)
            return None
        for note in topology.notes:
            self._say("info", note)
        if several and topology.survives:
            kept = f"{topology.factor} copies of each shard"
            if topology.parities:
                kept = f"parity over cliques of {factor}"
            self._say("info", f"{kept}: any {topology.survives} of the failure domains may be lost.")
        return topology

    def _memory_directory(self) -> Path:
        from resilience.assembly import memory_directory  # imports torch, which training needs anyway

        return memory_directory(self.checkpoint, self.resiliency, self.fs, os.environ)

    def _node_directory(self, path: Path) -> None:
        self._writable(path, "the nodes' directory")
        if self.fs.is_network(path):
            self._say("error", f"{path} is on a network file system: every node would see the others' saves.",
                      "Use a directory on a local disk or on /dev/shm.")  # fmt: skip
        elif self.fs.is_memory_backed(path):
            self._say("info", f"{path} is in memory: saves survive dead processes, not a reboot of the node.")
        else:
            self._say("info", f"{path} is on a disk: saves survive a reboot of the node.")

    def _writable(self, path: Path, what: str) -> None:
        parent = path
        while not parent.exists() and parent != parent.parent:
            parent = parent.parent
        if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
            self._say("error", f"{what}: {path} cannot be written ({parent} refuses).", "Choose another directory.")

    def _known_bytes(self, base: Path) -> int | None:
        """The size of a shard in the newest save that lies here."""
        try:
            sources = find_sources(self.fs, local=[base], run_id=self.resiliency.run_id, must_exist=False)
            saves = [copies for each in sources.readable() for copies in each.node_saves]
        except (ResilienceError, OSError) as error:
            self._say("warning", f"{base} could not be looked through: {error}")
            return None
        return max(max(saves, key=lambda copies: copies.save).nbytes) if saves else None

    def _present_bytes(self, base: Path) -> int:
        """Files of the run on this node."""
        try:
            sources = find_sources(self.fs, local=[base], run_id=self.resiliency.run_id, must_exist=False)
            return sum(copies.held_bytes for each in sources.readable() for copies in each.node_saves)
        except (ResilienceError, OSError):
            return 0  # `_known_bytes` says so, where it had to look

    def _memory(self, shard_bytes: int | None, base: Path, topology: Topology) -> dict[str, Any] | None:
        if shard_bytes is None:
            self._say("info", "The memory budget needs the size of the training state.",
                      "Give --state-bytes: about 16 bytes per parameter for Adam in float32, over the ranks that share "
                      "them.")  # fmt: skip
            return None
        shards = [shard_bytes] * len(self.nodes)
        kept = [self.scheme.files(topology, rank, shards) for rank in range(self.per_node)]
        split = self.checkpoint.non_persistent_local_ckpt_algo == "fully_parallel" and len(self.nodes) > 1
        needed = len(self.nodes) if split else self.per_node  # as if all ranks were data-parallel
        state_bytes = shard_bytes * (len(self.nodes) if split else 1)
        total = budget(
            own_bytes=[shard_bytes] * self.per_node,
            replica_bytes=[nbytes for each in kept for nbytes in each.values()],
            kept_for_others=self.scheme.files_named,
            keep_last=self.resiliency.keep_last,
            interval=shortest_interval(self.checkpoint.non_persistent_save_interval, self.resiliency.cadence),
            file_is_arena=self.fs.is_memory_backed(base),
            buffer_bytes=self.per_node * (_BUFFER_BYTES_PER_RANK + self.scheme.buffer_bytes(topology)),
            needed_bytes=needed * shard_bytes,
            staged_bytes=self.per_node * state_bytes if self.checkpoint.save or self.checkpoint.load else 0,
            present_bytes=self._present_bytes(base),
            estimated=True,
        )
        available = available_bytes(base, base, self.fs)
        try:
            check(total, available)
        except MemoryBudgetError as error:
            self.findings.append(_refused(error))
        return _budget_json(total, shard_bytes, available)


def _budget_json(total: MemoryBudget, shard_bytes: int, available: dict[str, int | None]) -> dict[str, Any]:
    return {
        "per_rank_bytes": shard_bytes,
        "total": total.total,
        "lines": list(total.lines),
        "needs": dict(total.needs),
        "available": available,
    }


def _refused(error: ResilienceError) -> Finding:
    return Finding("error", str(error).removesuffix(error.advice).rstrip(), error.advice)


def show(document: dict[str, Any], console: Console) -> None:
    from resilience.cli_tables import say, size, table

    styles = {"error": "bold red", "warning": "yellow", "info": ""}
    for finding in document["findings"]:
        say(console, f"{finding['level']:8} {finding['what']}", styles[finding["level"]])
        if finding["advice"]:
            say(console, f"{'':8} → {finding['advice']}")
    memory = document["memory"]
    if memory:
        say(console, f"\nMemory of one node, for shards of {size(memory['per_rank_bytes'])}", "bold")
        for line in memory["lines"]:
            say(console, f"  {line}")
        rows = [(place, size(need), size(memory["available"].get(place))) for place, need in memory["needs"].items()]
        table(console, ("place", "needed", "free"), rows, right="needed free")
    say(console, "\nNothing speaks against it." if document["ok"] else "\nThis would not work.", "bold")
