"""What the controller and the trainer tell their user: the outcome of a restore and of a save."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from resilience.planning.decision import PassedOver
from resilience.planning.inventory import Tier

__all__ = ["Resume", "SaveReport"]


@dataclass(frozen=True)
class Resume:
    """What this start goes on from.

    `seconds` of the whole restore on this rank; `passed_over`: the newer saves that were not usable, with the reasons.
    Over all ranks: `retrieved_bytes` came from other nodes; of the shards that were needed, `own_copies` lay on the
    node that needed them and `replica_copies` were fetched; `rebuilt` ones came from parity. `notes`: what of a save
    under another layout could not go on as in an undisturbed run, and other things to know, in words.
    """

    iteration: int
    generation: int
    tier: Tier
    seconds: float
    retrieved_bytes: int = 0
    passed_over: tuple[PassedOver, ...] = ()
    missing_keys: tuple[str, ...] = ()
    unexpected_keys: tuple[str, ...] = ()
    own_copies: int = 0
    replica_copies: int = 0
    rebuilt: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class SaveReport:
    """One save as far as it has come when the call returns.

    `stall_s`: what the training thread waited. `state`: "pending" (sealed; the background does the rest), "primary",
    "protected", "persistent", "skipped" or "failed" (then `error` says why). `bytes`: of this rank's shard.
    """

    kind: Literal["persistent", "non_persistent", "both"]
    iteration: int
    generation: int
    tiers: tuple[Tier, ...]
    stall_s: float
    state: str
    bytes: int
    error: str = ""
