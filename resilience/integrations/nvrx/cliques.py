"""Which ranks keep each other's shards, said in the way of NVRx: groups, or a jump and a factor.

Only the ranks matter here. What travels between them goes over links of our own, whatever backend the groups have.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import distributed as dist

from resilience.integrations.nvrx.names import LocalCheckpointError
from resilience.planning.topology import columns

__all__ = [
    "CliqueReplicationStrategy",
    "GroupWrapper",
    "LazyCliqueReplicationStrategy",
    "members_of",
    "parse_group_sequence",
]


def parse_group_sequence(replication_jump: int, replication_factor: int, world_size: int) -> list[tuple[int, ...]]:
    """The groups `n, n+J, …, n+(F-1)J`; where J·F does not divide the world, the last groups are larger.

    ValueError where a group would be smaller than the factor.
    """
    jump, factor = replication_jump, replication_factor
    if jump < 1 or factor < 1:
        raise ValueError(
            f"replication_jump={jump}, replication_factor={factor}: both are at least 1 (without GPUs NVRx's default "
            "jump is 0: give the number of ranks per node)."
        )
    groups = sorted(columns(world_size, jump, factor))
    short = next((group for group in groups if len(group) < factor), None)
    if short is not None:
        fitting = [each for each in range(1, world_size + 1) if each * factor <= world_size]
        raise ValueError(
            f"{world_size} ranks cannot form groups of {factor} with a jump of {jump}: rank {short[0]} would be in one "
            f"of {len(short)}. "
            + (f"Jumps up to {fitting[-1]} fit." if fitting else f"The factor can be {world_size} at most.")
        )
    return groups


class GroupWrapper:
    """Some ranks; of a process group, or all of them."""

    def __init__(self, group: Any = None, ranks: Sequence[int] | None = None) -> None:
        self.group = group
        self._ranks = None if ranks is None else tuple(ranks)

    @classmethod
    def wrap(cls, group: Any) -> Any:
        """`group` as one of these: a process group, or a wrapper of NVRx's or ours. ValueError for anything else."""
        if isinstance(group, dist.ProcessGroup):
            return cls(group)
        if hasattr(group, "ranks"):
            return group
        raise ValueError(f"{type(group)} is no group of ranks.")

    @classmethod
    def from_list_of_groups(cls, list_of_groups: Sequence[Any]) -> Self:
        """Of these process groups the one with this rank in it. ValueError if there is none, or more than one."""
        rank = dist.get_rank()
        mine = [group for group in list_of_groups if rank in dist.get_process_group_ranks(group)]
        if len(mine) != 1:
            raise ValueError(f"rank {rank} is in {len(mine)} of the groups; each rank belongs to one.")
        return cls(mine[0])

    @property
    def ranks(self) -> tuple[int, ...]:
        if self._ranks is not None:
            return self._ranks
        return tuple(range(dist.get_world_size()) if self.group is None else dist.get_process_group_ranks(self.group))

    @property
    def world_size(self) -> int:
        return len(self.ranks)


class CliqueReplicationStrategy:
    """`local_group`: this rank's group; each of its ranks keeps the shards of all. `target_device` is not used."""

    def __init__(self, local_group: Any, target_device: str = "cpu") -> None:
        self.local_group = GroupWrapper.wrap(local_group)
        self.target_device = target_device

    @classmethod
    def from_replication_params(
        cls, replication_jump: int | None = None, replication_factor: int = 2
    ) -> CliqueReplicationStrategy:
        """`replication_factor` counts all copies, the own one too. The default jump is the number of ranks per node.

        Local, once torch.distributed is initialised. ValueError where no such groups can be formed.
        """
        if not dist.is_initialized():
            raise LocalCheckpointError(
                "torch.distributed is not initialised.", advice="Use LazyCliqueReplicationStrategy before it is."
            )
        jump = _ranks_per_node() if replication_jump is None else replication_jump
        rank = dist.get_rank()
        groups = parse_group_sequence(jump, replication_factor, dist.get_world_size())
        return cls(GroupWrapper(ranks=next(group for group in groups if rank in group)))


class LazyCliqueReplicationStrategy:
    """The same, formed when it is first needed: where torch.distributed, or the world, comes only later."""

    def __init__(self, replication_jump: int | None = None, replication_factor: int = 2) -> None:
        self.replication_jump = replication_jump
        self.replication_factor = replication_factor
        self._built: tuple[tuple[int, int], CliqueReplicationStrategy] | None = None

    @property
    def replication_strategy(self) -> CliqueReplicationStrategy:
        """Of the world as it is now: after a restart within the process ranks may be others."""
        world = dist.get_rank(), dist.get_world_size()
        if self._built is None or self._built[0] != world:
            made = CliqueReplicationStrategy.from_replication_params(self.replication_jump, self.replication_factor)
            self._built = world, made
        return self._built[1]


def members_of(strategy: Any, rank: int) -> tuple[int, ...]:
    """The ranks of this rank's group, itself included; of a strategy of NVRx's too. LocalCheckpointError."""
    if strategy is None:
        return (rank,)
    built = getattr(strategy, "replication_strategy", strategy)
    group = getattr(built, "local_group", None)
    if group is None:
        raise LocalCheckpointError(
            f"{type(strategy).__name__} does not say which ranks keep each other's shards (it has no local_group).",
            advice="Use CliqueReplicationStrategy or LazyCliqueReplicationStrategy.",
        )
    members = tuple(group.ranks)
    if rank not in members:
        raise LocalCheckpointError(f"rank {rank} is not in its own group {members}.")
    return members


def _ranks_per_node() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", "0")) or torch.cuda.device_count() or 1
