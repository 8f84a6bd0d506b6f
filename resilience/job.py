"""Who takes part in this start: the ranks, the nodes they run on, the groups they form.

Node identity comes from the machine (`RESILIENCE_NODE_ID`, `SLURMD_NODENAME`, host name), never from the rank, because
ranks move between restarts.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilience.config import ResiliencyConfig
from resilience.errors import ConfigError
from resilience.planning.typed_json import from_json, parsed
from resilience.planning.wire import to_json
from resilience.replication.communicator import Agreements, Communicator, SoloCommunicator
from resilience.state.parallel_layout import ParallelLayout
from resilience.stores.records import is_name

__all__ = ["Job", "join_job", "launcher_id", "make_communicator", "node_identity", "resolve_run_id", "start_id"]


@dataclass(frozen=True)
class Job:
    """Equal on all ranks but for `rank` and `local_rank`."""

    rank: int
    local_rank: int
    nodes: tuple[str, ...]  # node id of each rank
    domains: Mapping[str, str]  # failure domain of each node
    coordinates: tuple[tuple[int, int], ...]  # (tp, pp) place of each rank: equal ones are data-parallel replicas

    @property
    def world_size(self) -> int:
        return len(self.nodes)

    @property
    def node_id(self) -> str:
        return self.nodes[self.rank]

    @property
    def node_ranks(self) -> tuple[int, ...]:
        """The ranks of this node, ascending."""
        return tuple(rank for rank, node in enumerate(self.nodes) if node == self.node_id)

    @property
    def leads_node(self) -> bool:
        """One rank per node sweeps, writes certificates and logs."""
        return self.node_ranks[0] == self.rank

    def data_parallel(self, rank: int | None = None) -> tuple[int, ...]:
        """The ranks that hold the same parameters as `rank` (default: this one), itself included."""
        mine = self.coordinates[self.rank if rank is None else rank]
        return tuple(other for other, place in enumerate(self.coordinates) if place == mine)

    def group_leaders(self) -> tuple[int, ...]:
        """The first rank of every data-parallel group."""
        first: dict[tuple[int, int], int] = {}
        for rank, place in enumerate(self.coordinates):
            first.setdefault(place, rank)
        return tuple(first.values())


@dataclass(frozen=True)
class _Identity:
    """What a rank tells of itself. `place`: see `Job.coordinates`."""

    node: str
    domain: str
    place: tuple[int, int]


def make_communicator(timeout_s: float) -> Communicator:
    """Over torch.distributed if it is initialised, else a world of one.

    ConfigError if a launcher promised more than one rank and torch.distributed is not initialised: each rank would
    train, and save, alone.
    """
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        from resilience.replication.gloo import TorchCommunicator

        return TorchCommunicator(timeout_s)
    world_size = os.environ.get("WORLD_SIZE", "1")
    if world_size.isdigit() and int(world_size) > 1:
        raise ConfigError(
            f"WORLD_SIZE is {world_size}, but torch.distributed is not initialised.",
            advice="Call torch.distributed.init_process_group() before the trainer is made, or unset WORLD_SIZE.",
        )
    return SoloCommunicator()


def join_job(
    communicator: Communicator,
    setup: Agreements,
    layout: ParallelLayout,
    config: ResiliencyConfig,
    settings: Mapping[str, Any],
    env: Mapping[str, str],
) -> Job:
    """Exchange identities. Collective over all ranks.

    `settings`: what must be equal on all ranks, by name; ConfigError on all of them names what is not.
    """
    node_id = node_identity(config, env)
    domain = config.failure_domain or env.get("RESILIENCE_FAILURE_DOMAIN") or node_id
    _refuse_different_settings(setup, settings)
    told = setup.gather(to_json(_Identity(node_id, domain, layout.shard_coordinate)))
    everyone = [from_json(_Identity, payload, f"rank {rank}'s identity") for rank, payload in enumerate(told)]
    domains: dict[str, str] = {}
    for each in everyone:
        known = domains.setdefault(each.node, each.domain)
        if known != each.domain:
            raise ConfigError(f"node {each.node!r} is said to be in failure domain {known!r} and {each.domain!r}.")
    return Job(
        rank=communicator.rank,
        local_rank=communicator.local_rank,
        nodes=tuple(each.node for each in everyone),
        domains=domains,
        coordinates=tuple(each.place for each in everyone),
    )


def _refuse_different_settings(setup: Agreements, mine: Mapping[str, Any]) -> None:
    """Ranks that save at other intervals, or elsewhere, would wait for each other for ever.

    What is compared is a digest: two thousand bytes of settings from each of many thousand ranks are a lot.
    """
    word = json.dumps(mine, sort_keys=True).encode()
    mark = int.from_bytes(hashlib.blake2b(word, digest_size=7).digest(), "big")
    highest, lowest = setup.maximum([mark, -mark])
    if highest == -lowest:
        return
    everyone = [parsed(payload, f"rank {rank}'s settings") for rank, payload in enumerate(setup.gather(word))]
    for rank, settings in enumerate(everyone):
        differ = [name for name, value in settings.items() if value != everyone[0].get(name)]
        if differ:
            name = differ[0]
            raise ConfigError(
                f"{name} is {everyone[0].get(name)!r} on rank 0 and {settings[name]!r} on rank {rank}.",
                advice="Start all ranks with the same configuration.",
            )
    raise ConfigError("ranks have different settings.", advice="Start all ranks with the same configuration.")


def node_identity(config: ResiliencyConfig, env: Mapping[str, str]) -> str:
    """This node's name; ConfigError if it could not be a folder's."""
    name = config.node_id or env.get("RESILIENCE_NODE_ID") or env.get("SLURMD_NODENAME") or socket.gethostname()
    if not is_name(name):
        raise ConfigError(
            f"the node's name {name!r} cannot be a folder's.",
            advice="Set RESILIENCE_NODE_ID to letters, digits, '.', '_' and '-'.",
        )
    return name


def resolve_run_id(
    config: ResiliencyConfig, kept: str | None, *, draw: Callable[[int], str] | None, env: Mapping[str, str]
) -> str:
    """The run's name: given, kept in `save`, Slurm's job, the launcher's job, or a new one to keep in `save`.

    `draw`: draws a name of so many random bytes, where a new one can be kept.


    ConfigError if none of these gives one: without a name a restart could not find its own saves.
    """
    given = config.run_id or kept or (None if draw else launcher_id(env))
    if given is None and draw is not None:
        given = draw(8)
    if given is None or not is_name(given):
        raise ConfigError(
            "run_id: this run has no name that a restart would know"
            + (f" ({given!r} cannot be a folder's name)." if given else "."),
            advice="Set resiliency.run_id, or `save` (the name is then kept there), or start under Slurm.",
        )
    return given


def start_id(env: Mapping[str, str]) -> str | None:
    """What tells one launch from the next, and stays over its automatic restarts; None if nothing does.

    Unlike `launcher_id` it need not outlive the launch: a random name will do, or the identity of the elastic agent
    that restarts this process in place.
    """
    named = env.get("SLURM_JOB_ID") or env.get("TORCHELASTIC_RUN_ID")
    if named != "none":
        return named
    agent = os.getppid()
    try:
        started = Path(f"/proc/{agent}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
    return f"agent-{agent}-{started}"


def launcher_id(env: Mapping[str, str]) -> str | None:
    """What the launcher calls this job over its restarts; None if it has no such name or draws a new one each time."""
    slurm = env.get("SLURM_JOB_ID")
    elastic = env.get("TORCHELASTIC_RUN_ID")
    if slurm:
        return slurm
    if not elastic or elastic == "none" or re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", elastic):
        return None  # torchrun --standalone draws a random one
    return elastic
