"""Do the two configurations, and the job they are used in, fit together, and does this version do what they ask?

Called once per start, on every rank, with values that are equal on all ranks (the configurations apart from `node_id`
and `failure_domain`, the world size, the domains), so that all ranks raise or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from resilience.config.checkpoint import CheckpointConfig
from resilience.config.metrics import metrics_target
from resilience.config.resiliency import ResiliencyConfig
from resilience.errors import ConfigError

__all__ = ["unsupported", "validate_together", "without_effect"]


def validate_together(
    checkpoint: CheckpointConfig,
    resiliency: ResiliencyConfig,
    *,
    world_size: int | None = None,
    ranks_per_node: int | None = None,
    domains: Sequence[str] | None = None,
) -> None:
    """Raises one ConfigError that tells everything that is wrong; fields changed since construction are checked again.

    `domains` names each rank's failure domain, in rank order. Pass it at a run's first start only: a restart on fewer
    domains lowers the factor instead of refusing.
    """
    checkpoint.__post_init__()
    resiliency.__post_init__()
    problems = unsupported(checkpoint, resiliency)
    if checkpoint.save_interval is not None and checkpoint.save is None:
        problems.append(
            ConfigError(
                f"checkpoint.save_interval: given {checkpoint.save_interval}, but there is no directory in save, so "
                "that no persistent checkpoint would ever be written.",
                advice="Set save, or leave save_interval out.",
            )
        )
    if not resiliency.save_frozen and checkpoint.pretrained_checkpoint is None:
        problems.append(
            ConfigError(
                "resiliency.save_frozen: given False, but there is no pretrained_checkpoint from which a restart could "
                "take the parameters that are not saved.",
                advice="Set pretrained_checkpoint, or leave save_frozen at True.",
            )
        )
    if resiliency.metrics is not None:
        try:
            metrics_target(resiliency.metrics)
        except ConfigError as error:
            problems.append(error)
    problems += _redundancy_problems(checkpoint, resiliency)
    problems += _composing_problems(checkpoint, resiliency)
    if checkpoint.replication and resiliency.redundancy == "replica" and domains is not None:
        problems += _domain_problems(checkpoint, domains, world_size, ranks_per_node)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        raise ConfigError(f"{len(problems)} settings cannot be used:\n{listed}")


def without_effect(checkpoint: CheckpointConfig) -> list[tuple[str, str]]:
    """Settings that change nothing as the others are: what to say, and what to do about it."""
    if checkpoint.distrib_optim_fully_reshardable_mem_efficient and not checkpoint.dist_ckpt_optim_fully_reshardable:
        name = "distrib_optim_fully_reshardable_mem_efficient"
        advice = f"Set dist_ckpt_optim_fully_reshardable too, or leave {name} out."
        return [(f"{name} has no effect without dist_ckpt_optim_fully_reshardable", advice)]
    return []


def unsupported(checkpoint: CheckpointConfig, resiliency: ResiliencyConfig) -> list[ConfigError]:
    """What is a valid setting, but asks for something that this version does not do yet."""
    found: list[ConfigError] = []

    def refuse(key: str, given: str, says: str, advice: str) -> None:
        found.append(ConfigError(f'{key}: "{given}" is not in this version: {says}.', advice=advice))

    if checkpoint.ckpt_format == "zarr" and find_spec("google_crc32c") is None:
        says = 'checkpoint.ckpt_format: "zarr" needs packages that are not installed here.'
        found.append(ConfigError(says, advice="Install them: pip install torch-resilience[zarr]"))
    if resiliency.cadence == "auto" and resiliency.mtbf_hours is None:
        refuse(
            "resiliency.cadence",
            "auto",
            "failures are not counted over restarts, so the failure rate must be given",
            "Set mtbf_hours.",
        )
    return found


def _composing_problems(checkpoint: CheckpointConfig, resiliency: ResiliencyConfig) -> list[ConfigError]:
    """Only whole copies can be composed of what a holder has itself."""
    if resiliency.replicas_from == "network" or (checkpoint.replication and resiliency.redundancy == "replica"):
        return []
    given = f'resiliency.replicas_from: given "{resiliency.replicas_from}"'
    why = (
        f'but resiliency.redundancy is "{resiliency.redundancy}": parity is computed from all bytes'
        if checkpoint.replication
        else "but checkpoint.replication is off, so that there are no replicas"
    )
    return [ConfigError(f"{given}, {why}.", advice='Leave replicas_from at "network".')]


#: Of the schemes that keep parity: the smallest clique, and the largest one that a factor may ask for.
_SMALLEST_CLIQUE = {"xor": 2, "rs": 3}
_LARGEST_FACTOR = 64


def _redundancy_problems(checkpoint: CheckpointConfig, resiliency: ResiliencyConfig) -> list[ConfigError]:
    """For parity `replication_factor` is the clique's size, which has bounds; and something must be protected."""
    smallest = _SMALLEST_CLIQUE.get(resiliency.redundancy)
    if smallest is None:
        return []
    given = f'resiliency.redundancy: given "{resiliency.redundancy}"'
    if not checkpoint.replication:
        return [
            ConfigError(
                f"{given}, but checkpoint.replication is off, so that nothing is kept on other nodes.",
                advice='Set replication, or leave redundancy at "replica".',
            )
        ]
    if not smallest <= checkpoint.replication_factor <= _LARGEST_FACTOR:
        return [
            ConfigError(
                f"{given} with checkpoint.replication_factor {checkpoint.replication_factor}, which is then the size "
                f"of a clique: from {smallest} to {_LARGEST_FACTOR}.",
                advice="Use 4 to 8: the larger the clique, the less memory parity takes.",
            )
        ]
    return []


def _domain_problems(
    checkpoint: CheckpointConfig, domains: Sequence[str], world_size: int | None, ranks_per_node: int | None
) -> list[ConfigError]:
    """Two copies in one failure domain would be lost together; a job on one node is not replicated, never refused."""
    ranks = len(domains)
    assert world_size in (None, ranks), f"{ranks} domains for {world_size} ranks"
    distinct = len(set(domains))
    one_node = distinct == 1 if ranks_per_node is None else ranks_per_node >= ranks
    if one_node:
        return []
    factor = checkpoint.replication_factor
    if distinct < factor:
        return [
            ConfigError(
                f"checkpoint.replication_factor: {factor} copies of each rank's save need {factor} failure domains, "
                f"but this job has {distinct} ({', '.join(sorted(set(domains)))}).",
                advice=f"Lower replication_factor to {distinct}, or start on more domains."
                if distinct > 1
                else "Name the failure domains of the nodes apart, or turn replication off.",
            )
        ]
    return _shared_domain_of_a_clique(checkpoint, domains, ranks_per_node)


def _shared_domain_of_a_clique(
    checkpoint: CheckpointConfig, domains: Sequence[str], ranks_per_node: int | None
) -> list[ConfigError]:
    """Where jump × factor divides the world, cliques are fixed; otherwise placement avoids shared domains itself."""
    ranks, factor = len(domains), checkpoint.replication_factor
    jump = checkpoint.replication_jump or ranks_per_node
    if jump is None or ranks % (jump * factor) != 0:
        return []
    for first in range(ranks):
        if first // jump % factor != 0:
            continue
        clique = range(first, first + jump * factor, jump)
        held = [domains[rank] for rank in clique]
        shared = next((name for name in held if held.count(name) > 1), None)
        if shared is not None:
            return [
                ConfigError(
                    f"checkpoint.replication_jump: with a jump of {jump} and {factor} copies the ranks "
                    f"{', '.join(map(str, clique))} hold each other's saves, but more than one of them is in the "
                    f"failure domain {shared!r}, so that its loss takes several copies.",
                    advice="Set replication_jump to a multiple of the ranks that one failure domain has.",
                )
            ]
    return []
