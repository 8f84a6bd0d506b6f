"""What the processes of a drill find in their environment: their node, their configuration, their part in the faults.

In a drill the environment wins over what the script gives in code (`resilience.config.override_from_env`), so that a
user's own script can be drilled as it is, without touching its real checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from resilience.config import CheckpointConfig, ResiliencyConfig, unsupported
from resilience.drill.nodes import VirtualNode
from resilience.drill.rehearsal import DRILL, FIRED, HANG, HOLD, TRAIN_ITERS, at
from resilience.drill.scenario import Scenario, Strike

HANG_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Plan:
    """Everything that fixes a drill: its scenario, where it lies, what it trains, and settings of the user's file."""

    scenario: Scenario
    workdir: Path
    script: tuple[str, ...]
    run_id: str = "drill"
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    resiliency: ResiliencyConfig = field(default_factory=ResiliencyConfig)
    timeout_s: float = 1500.0
    stalled_after_s: float = 180.0
    shared_reference: Path | None = None  # where several drills keep one reference run; default: in the work directory

    @property
    def save_dir(self) -> Path:
        return self.workdir / "save"

    @property
    def global_dir(self) -> Path | None:
        return self.workdir / "global" if self.scenario.save_type == "global" else None

    @property
    def events_dir(self) -> Path:
        return self.workdir / "events"

    @property
    def reference_dir(self) -> Path:
        return self.shared_reference or self.workdir / "reference"

    @property
    def fired(self) -> Path:
        return self.workdir / "fired"


def drill_settings(plan: Plan, node: VirtualNode) -> dict[str, object]:
    """Settings by environment variable for a process on this node: the user's file, then what the drill decides."""
    scenario = plan.scenario
    on_nodes = scenario.save_type in ("local", "in_memory")
    decided = _of_file(plan) | {
        "RESILIENCE_CHECKPOINT__SAVE": plan.save_dir,
        "RESILIENCE_CHECKPOINT__LOAD": None,
        "RESILIENCE_CHECKPOINT__CKPT_STEP": None,
        "RESILIENCE_CHECKPOINT__NON_PERSISTENT_CKPT_TYPE": scenario.save_type,
        "RESILIENCE_CHECKPOINT__NON_PERSISTENT_SAVE_INTERVAL": scenario.save_every,
        "RESILIENCE_CHECKPOINT__NON_PERSISTENT_LOCAL_CKPT_DIR": node.disk,
        "RESILIENCE_CHECKPOINT__NON_PERSISTENT_GLOBAL_CKPT_DIR": plan.global_dir,
        "RESILIENCE_CHECKPOINT__SAVE_INTERVAL": scenario.persist_every or None,
        "RESILIENCE_CHECKPOINT__REPLICATION": on_nodes and scenario.nodes > 1,
        "RESILIENCE_CHECKPOINT__REPLICATION_JUMP": scenario.replication_jump,
        "RESILIENCE_CHECKPOINT__REPLICATION_FACTOR": scenario.replication_factor,
        "RESILIENCE_RESILIENCY__RUN_ID": plan.run_id,
        "RESILIENCE_RESILIENCY__NODE_ID": node.node_id,
        "RESILIENCE_RESILIENCY__FAILURE_DOMAIN": None,
        "RESILIENCE_RESILIENCY__MEMORY_DIR": node.memory,
        "RESILIENCE_RESILIENCY__EVENTS": plan.events_dir,
        "RESILIENCE_RESILIENCY__METRICS": None,  # a rehearsal's figures do not belong into the cluster's monitoring
        "RESILIENCE_RESILIENCY__TERM_GRACE_S": 5,
        # What the nodes hold at the end can be looked at: `resilience ls --local <workdir>/nodes/node0/disk`.
        "RESILIENCE_RESILIENCY__KEEP_AFTER_SUCCESS": True,
    }
    if scenario.redundancy is not None:
        decided["RESILIENCE_RESILIENCY__REDUNDANCY"] = scenario.redundancy
    if any(fault.kind == "hang" for fault in scenario.faults):
        decided["RESILIENCE_RESILIENCY__HANG_TIMEOUT_S"] = HANG_TIMEOUT_S
    return decided


def reference_settings(plan: Plan, events: Path) -> dict[str, object]:
    """Settings of the undisturbed run: the same training, nothing saved, nothing loaded."""
    return _of_file(plan) | {
        "RESILIENCE_CHECKPOINT__SAVE": None,
        "RESILIENCE_CHECKPOINT__LOAD": None,
        "RESILIENCE_CHECKPOINT__CKPT_STEP": None,
        "RESILIENCE_CHECKPOINT__SAVE_INTERVAL": None,
        "RESILIENCE_CHECKPOINT__ASYNC_SAVE": False,
        "RESILIENCE_CHECKPOINT__NON_PERSISTENT_CKPT_TYPE": None,
        "RESILIENCE_CHECKPOINT__NON_PERSISTENT_SAVE_INTERVAL": None,
        "RESILIENCE_CHECKPOINT__REPLICATION": False,
        "RESILIENCE_RESILIENCY__EVENTS": events,
        "RESILIENCE_RESILIENCY__METRICS": None,
        "RESILIENCE_RESILIENCY__HANG_TIMEOUT_S": None,
    }


def _of_file(plan: Plan) -> dict[str, object]:
    """What the user's configuration sets: the fields that are not at their default."""
    settings: dict[str, object] = {}
    for config in (plan.checkpoint, plan.resiliency):
        for entry in fields(config):
            if (value := getattr(config, entry.name)) != entry.default:
                settings[f"RESILIENCE_{config.SECTION.upper()}__{entry.name.upper()}"] = value
    return settings


def check_settings(plan: Plan) -> None:
    """Raises `ConfigError` for settings that every process would refuse, before any is started."""
    for problem in unsupported(plan.checkpoint, _with_redundancy(plan)):
        raise problem


def _with_redundancy(plan: Plan) -> ResiliencyConfig:
    values = {entry.name: getattr(plan.resiliency, entry.name) for entry in fields(plan.resiliency)}
    return ResiliencyConfig(**values | {"redundancy": plan.scenario.redundancy or plan.resiliency.redundancy})


def environment(
    base: Mapping[str, str], plan: Plan, node_id: str, memory: Path | None, settings: Mapping[str, object]
) -> dict[str, str]:
    """A process's environment: `base` without settings of its own, plus these; one thread, loopback, quiet torch."""
    kept = {name: value for name, value in base.items() if not name.startswith("RESILIENCE_")}
    quiet = {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PYTHONUNBUFFERED": "1",
    }
    # torchrun keeps one store for all restarts of its workers, in which a restarted rank finds the addresses of dead
    # peers, so that a restart on several nodes fails by chance (tried, torch 2.13); with this each restart has its own.
    quiet["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    of_node = {DRILL: "1", TRAIN_ITERS: str(plan.scenario.train_iters), "RESILIENCE_NODE_ID": node_id}
    if memory is not None:
        of_node["RESILIENCE_MEMORY_DIR"] = str(memory)
    return quiet | kept | of_node | {name: _text(value) for name, value in settings.items()}


def _text(value: object) -> str:
    if value is None:
        return "null"
    return str(value).lower() if isinstance(value, bool) else str(value)


def fault_variables(plan: Plan, node_index: int, strikes: tuple[Strike, ...]) -> dict[str, str]:
    """Who on this node has to wait for its end, and who has to hang, in the strikes still to come.

    A fault of a node holds whichever ranks run there: ranks are known only after the rendezvous, so all are named. For
    a node that is to join all of them wait.
    """
    holds: list[str] = []
    hangs: list[str] = []
    for strike in strikes:
        for fault in strike.faults:
            if fault.kind == "hang":
                hangs.append(at(fault.index, fault.iteration))
            elif fault.kind == "kill":
                holds.append(at(fault.index, fault.iteration))
            elif fault.index == node_index or fault.kind == "join":
                holds += [at(rank, fault.iteration) for rank in range(max(plan.scenario.world_sizes))]
    return {HOLD: ",".join(holds), HANG: ",".join(hangs), FIRED: str(plan.fired)}
