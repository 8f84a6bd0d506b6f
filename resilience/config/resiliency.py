"""How a run survives: the settings that are this project's own, beside Megatron Bridge's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from resilience.config.setting import (
    ABOVE_ZERO,
    SAFE_NAME,
    VARIABLE_NAME,
    at_least,
    check_all,
    setting,
)

__all__ = ["ResiliencyConfig"]


@dataclass
class ResiliencyConfig:
    """Validates on construction: a `ConfigError` names the field, what was given and what is allowed."""

    SECTION: ClassVar[str] = "resiliency"

    # names
    run_id: str | None = setting(
        None,
        "Names the run over all its restarts. Default: with `save`, drawn at the first start and kept there; else "
        "`SLURM_JOB_ID`; else a launcher's id that is neither `none` nor random; else, with a non-persistent type, an "
        "error.",
        limit=SAFE_NAME,
    )
    fork_id: str | None = setting(
        None,
        "Which start with `ckpt_step` this is: an automatic restart with the same id goes on from the newest save. "
        "Default: the launcher's job id, else random per start.",
        limit=SAFE_NAME,
    )
    node_id: str | None = setting(
        None,
        "Names this node. Default: `RESILIENCE_NODE_ID`, `SLURMD_NODENAME`, the host name.",
        limit=SAFE_NAME,
    )
    failure_domain: str | None = setting(
        None,
        "What fails together with this node (a rack, a switch). Default: `RESILIENCE_FAILURE_DOMAIN`, else the node.",
    )

    # node memory and retention
    memory_dir: str | None = setting(
        None,
        "Where `in_memory` saves and arenas live. Default: `RESILIENCE_MEMORY_DIR`, else "
        "`non_persistent_local_ckpt_dir` if that is memory-backed, else `/dev/shm/resilience-<uid>`.",
        path=True,
    )
    keep_last: int = setting(2, "Protected non-persistent saves to keep.", unit="saves", limit=at_least(1))
    keep_persistent: int | None = setting(
        None, "Complete persistent saves to keep; default: all.", unit="saves", limit=at_least(1)
    )
    save_frozen: bool = setting(
        True,
        "Persistent checkpoints hold parameters that are not trained, too. `False` leaves them out (an adapter on a "
        "frozen base): a restart takes them from `pretrained_checkpoint` again, which must stay.",
    )
    keep_after_success: bool = setting(
        False, "Leave node memory in place when the run completes (without `save` it always stays)."
    )

    # saving
    snapshot_mode: Literal["eager", "overlapped"] = setting(
        "eager",
        "`eager` copies at the boundary; `overlapped` copies parameters and optimizer state during the next forward "
        "and backward, and makes the optimizer's step wait for it.",
    )
    non_persistent_sync: bool = setting(False, "A `local` or `in_memory` save returns when it is committed.")
    redundancy: Literal["replica", "xor", "rs"] = setting(
        "replica",
        "What other nodes hold: whole copies, or parity for 1 (`xor`) or 2 (`rs`) losses per clique. For the last two "
        "`replication_factor` is the clique's size.",
    )
    replicas_from: Literal["network", "live"] = setting(
        "network",
        "Where the bytes of a replica come from that data parallelism keeps equal anyway: from their owner, or, with "
        "`live`, from the holder's own live state at the boundary, so that only the rest travels. The stall grows by "
        "that copy.",
    )
    on_save_failure: Literal["warn", "raise"] = setting(
        "warn", "A failed save is reported and counted, or ends training."
    )

    # restart
    on_no_usable_save: Literal["stop", "fresh"] = setting(
        "stop", "What to do when this run once had a complete save and none is usable: stop, or start afresh."
    )
    verify_load: Literal["digest", "off"] = setting(
        "digest",
        "Persistent checkpoints are verified by digest before they are loaded, or not (they may be huge). "
        "Non-persistent saves always are.",
    )
    max_restarts_without_progress: int = setting(
        3,
        "After so many starts that completed no newer save, the next older save is elected, then the job stops with "
        "the reason.",
        unit="starts",
        limit=at_least(1),
    )
    elastic: bool = setting(
        True,
        "Resume from a save of another world size, on shared storage or put together from the shards on nodes. Without "
        "it such saves are passed over, with that reason.",
    )

    # cadence
    cadence: Literal["fixed", "auto"] = setting(
        "fixed",
        "`auto` computes the interval from the measured cost of a save and the failure rate (Young/Daly), from 1 "
        "step to 10 times `non_persistent_save_interval`; needs `mtbf_hours`.",
    )
    mtbf_hours: float | None = setting(
        None,
        "Mean time between failures of the whole job, for `auto`.",
        unit="hours",
        limit=ABOVE_ZERO,
    )

    # traffic and bounds of waits
    replication_bytes_per_s: float | None = setting(
        None, "Cap for background traffic of each rank; default: none.", unit="bytes/s", limit=ABOVE_ZERO
    )
    exchange_timeout_s: float = setting(
        120, "Bound of any wait for a peer, counted without progress.", unit="s", limit=ABOVE_ZERO
    )
    hang_timeout_s: float | None = setting(
        None,
        "Without a boundary for so long, stacks are dumped, an event is written and the process ends.",
        unit="s",
        limit=ABOVE_ZERO,
    )
    ft_launcher: bool = setting(
        False,
        "Tell `ft_launcher` of NVIDIA's Resiliency Extension that this rank lives and what it does; see "
        "[trainers and launchers](trainers.md#nvrxs-launcher).",
    )
    term_grace_s: float = setting(
        20, "After TERM, the process exits if no boundary is reached within this time.", unit="s", limit=at_least(0)
    )
    stop_before_s: float | None = setting(
        None, "Save and stop this long before the job's time limit.", unit="s", limit=ABOVE_ZERO
    )

    # what is told
    events: str | None = setting(None, "Directory for events, one JSON Lines file per node.", path=True)
    metrics: str | None = setting(
        None,
        "A Prometheus text file, `DIR/NAME.prom`: every rank writes `DIR/NAME-rankR.prom`; or `tensorboard:DIR`, for "
        "rank 0.",
        path=True,
    )
    secret_env: str | None = setting(
        None,
        "Name of an environment variable with a secret, the same on all ranks: what peers send and what lies on nodes "
        "is authenticated (keyed BLAKE2b).",
        limit=VARIABLE_NAME,
    )

    def __post_init__(self) -> None:
        check_all(self, ())
