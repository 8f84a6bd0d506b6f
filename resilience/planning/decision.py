"""What an election is given besides inventories, and what it answers: plain values that travel as canonical JSON.

The leader sends the JSON of its decision, every rank compares it with its own, and errors travel inside, so that all
ranks raise the same one.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Literal

from resilience.errors import (
    CheckpointNotFoundError,
    MissingCheckpointExit,
    NoProgressError,
    NoUsableSaveError,
    ResilienceError,
    SourceUnavailableError,
)
from resilience.planning.inventory import SaveId, Tier
from resilience.planning.typed_json import from_json

ErrorKind = Literal["NoUsableSave", "SourceUnavailable", "CheckpointNotFound", "NoProgress", "MissingCheckpointExit"]

_ERRORS: dict[str, type[ResilienceError]] = {
    "NoUsableSave": NoUsableSaveError,
    "SourceUnavailable": SourceUnavailableError,
    "CheckpointNotFound": CheckpointNotFoundError,
    "NoProgress": NoProgressError,
}


@dataclass(frozen=True)
class Strike:
    """A copy that failed to read or verify. `where`: the node directory (`NodeSave.node_id`), or "save", "load", ….

    `owner` None strikes all copies of the save there, parity too. `parity`: not the owner's shard is meant, but the
    parity that this rank made.
    """

    where: str
    tier: Tier
    save: SaveId
    owner: int | None = None
    parity: bool = False


@dataclass(frozen=True)
class ElectionPolicy:
    """What the user's configuration says about the choice.

    `fork_id` goes with `ckpt_step`. `pretrained`: a `pretrained_checkpoint` is configured. `unknown_final`: the bound
    for retrying unknown sources is used up. `elastic`: saves of another world size may be loaded.
    """

    ckpt_step: int | None = None
    fork_id: str = ""
    on_no_usable_save: Literal["stop", "fresh"] = "stop"
    max_restarts_without_progress: int = 3
    exit_on_missing: bool = False
    pretrained: bool = False
    unknown_final: bool = False
    elastic: bool = True


@dataclass(frozen=True)
class Candidate:
    """The elected save. Kind "node": shards on nodes, see the retrieval plan; "shared": one folder under `source`.

    `tier` of a node save is the slowest that is needed. `foreign`: a checkpoint of another run (under `load`).
    `weights_only`: a pretrained checkpoint; the start is a fresh one in all but the weights. `world_size`: ranks that
    took it; None where that is not known.
    """

    save: SaveId
    tier: Tier
    kind: Literal["node", "shared"]
    source: str
    run_id: str | None
    nbytes: int
    foreign: bool = False
    weights_only: bool = False
    world_size: int | None = None


@dataclass(frozen=True)
class PassedOver:
    """A save that was not elected although it comes before the one that was, or could never be; and why."""

    iteration: int
    generation: int
    tier: Tier
    reason: str


@dataclass(frozen=True)
class Decision:
    """The outcome of an election: exactly one of `chosen`, `fresh`, `retry` and `error` is set.

    `retry`: the sources named in `unknown` must be asked again before anything is decided. `next_generation` and `fork`
    are for the new attempt's log, and so is `base`.
    """

    reason: str
    next_generation: int
    chosen: Candidate | None = None
    passed_over: tuple[PassedOver, ...] = ()
    fresh: bool = False
    retry: bool = False
    unknown: tuple[str, ...] = ()
    error: tuple[ErrorKind, str, str] | None = None
    fork: tuple[int, str] | None = None

    @property
    def base(self) -> SaveId | None:
        """What the new attempt's log names as its base; None for a fresh start, also from pretrained weights."""
        return None if self.chosen is None or self.chosen.weights_only else self.chosen.save

    def raise_if_error(self) -> None:
        """Raise the typed error that this decision stands for, if any; the same on every rank."""
        if self.error is None:
            return
        kind, message, advice = self.error
        if kind == "MissingCheckpointExit":
            raise MissingCheckpointExit(f"{message} {advice}".strip())
        raise _ERRORS[kind](message, advice=advice)

    def to_json(self) -> str:
        """Canonical: equal decisions give equal text."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True, separators=(",", ":"))

    @staticmethod
    def from_json(text: str) -> Decision:
        """The decision whose `to_json` this is."""
        return from_json(Decision, text, "the leader's decision")
