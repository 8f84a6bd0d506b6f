"""How long a save and a restore take, from bytes and bandwidths: what a node copies, hashes, sends and writes."""

from __future__ import annotations

from dataclasses import dataclass

from resilience.foresight.simulation import Durations

__all__ = ["ASSUMED", "Bandwidths", "durations_of"]


@dataclass(frozen=True)
class Bandwidths:
    """Bytes per second of one node, all its ranks together; `shared`: of the shared storage, for the whole job.

    `memory`: from the training's memory into an arena, `hash`: xxh3-128, `disk`: written and synchronised, `network`:
    to another node and from another node at once.
    """

    memory: float
    hash: float
    disk: float
    network: float
    shared: float


#: For what nobody measured or told: modest for a machine that trains.
ASSUMED = Bandwidths(memory=8e9, hash=16e9, disk=1.5e9, network=5e9, shared=10e9)


def durations_of(
    *,
    shard_bytes: int,
    sent_bytes: int,
    kept_bytes: int,
    ranks: int,
    ranks_per_node: int,
    on_disk: bool,
    speed: Bandwidths,
    detect_s: float,
    restart_s: float,
) -> tuple[float, Durations]:
    """Seconds that training waits for a snapshot, and what everything else takes.

    `shard_bytes`, `sent_bytes`, `kept_bytes` are a rank's at one save: its own, what it sends, what it holds of others.
    A lost node fetches its shards and what it held; what is not local has to come over the network once.
    """
    own, sent, held = (ranks_per_node * each for each in (shard_bytes, sent_bytes, kept_bytes))
    stall_s = own / speed.memory
    commit_s = own / speed.hash + (own / speed.disk if on_disk else 0.0)
    protect_s = commit_s + sent / speed.network + held / speed.hash + (held / speed.disk if on_disk else 0.0)
    restore_s = own / speed.hash + own / speed.memory + (own / speed.disk if on_disk else 0.0)
    shared_s = shard_bytes * ranks / speed.shared
    return stall_s, Durations(
        commit_s=commit_s,
        protect_s=protect_s if sent else commit_s,
        persist_s=own / speed.hash + shared_s,
        refill_s=(own + held) / speed.network,
        detect_s=detect_s,
        restart_s=restart_s,
        restore_s=restore_s,
        peer_restore_s=own / speed.network + restore_s,
        persistent_restore_s=shared_s + own / speed.hash + own / speed.memory,
    )
