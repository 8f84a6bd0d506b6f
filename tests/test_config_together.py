"""At a start the two configurations are checked together, with the job's world size and failure domains."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.config import CheckpointConfig, ResiliencyConfig, unsupported, validate_together, without_effect
from resilience.errors import ConfigError

REPLICATED: dict[str, Any] = {
    "non_persistent_ckpt_type": "local",
    "non_persistent_save_interval": 5,
    "non_persistent_local_ckpt_dir": "/node",
    "replication": True,
}


def test_what_fits_together_is_accepted() -> None:
    checkpoint = CheckpointConfig(save="s", save_interval=100, **REPLICATED)
    validate_together(checkpoint, ResiliencyConfig())
    validate_together(checkpoint, ResiliencyConfig(cadence="auto", mtbf_hours=20))
    assert domains_problem(["a", "b", "c", "d"], ranks_per_node=1, save="s", save_interval=100) == ""
    with pytest.raises(ConfigError, match="mtbf_hours"):
        validate_together(checkpoint, ResiliencyConfig(cadence="auto"))


def test_a_field_that_was_changed_after_construction_is_checked_at_the_start() -> None:
    checkpoint, resiliency = CheckpointConfig(), ResiliencyConfig()
    checkpoint.save_interval = 0
    with pytest.raises(ConfigError, match="save_interval"):
        validate_together(checkpoint, resiliency)
    resiliency.node_id = "../other"
    with pytest.raises(ConfigError, match="node_id"):
        validate_together(CheckpointConfig(), resiliency)


def test_an_interval_without_a_directory_would_save_nothing_and_is_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.save_interval: given 10, but there is no directory in save"):
        validate_together(CheckpointConfig(save_interval=10), ResiliencyConfig())


@pytest.mark.parametrize(
    ("checkpoint", "resiliency", "field"),
    [
        ({}, {"cadence": "auto"}, "resiliency.cadence"),
    ],
)
def test_what_this_version_does_not_do_is_refused_at_the_start(
    checkpoint: dict[str, Any], resiliency: dict[str, Any], field: str
) -> None:
    both = CheckpointConfig(**checkpoint), ResiliencyConfig(**resiliency)
    (refusal,) = unsupported(*both)
    assert str(refusal).startswith(f"{field}: ")
    assert refusal.advice
    with pytest.raises(ConfigError, match="is not in this version"):
        validate_together(*both)


def test_defaults_ask_for_nothing_that_is_missing() -> None:
    assert unsupported(CheckpointConfig(), ResiliencyConfig()) == []


def test_replicas_are_composed_only_where_there_are_whole_ones() -> None:
    live = {"replicas_from": "live"}
    validate_together(CheckpointConfig(**REPLICATED), ResiliencyConfig(**live))
    with pytest.raises(ConfigError, match=r"replicas_from.*parity is computed from all bytes"):
        validate_together(
            CheckpointConfig(**REPLICATED, replication_factor=4), ResiliencyConfig(**live, redundancy="xor")
        )
    with pytest.raises(ConfigError, match=r"replicas_from.*replication is off"):
        validate_together(CheckpointConfig(), ResiliencyConfig(**live))


def test_several_problems_are_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)2 settings cannot be used.*metrics.*redundancy"):
        validate_together(CheckpointConfig(), ResiliencyConfig(redundancy="rs", metrics="metrics.txt"))


ON_NODES: dict[str, Any] = {
    "replication": True,
    "non_persistent_ckpt_type": "local",
    "non_persistent_save_interval": 5,
    "non_persistent_local_ckpt_dir": "/local",
}


@pytest.mark.parametrize(
    ("scheme", "fields", "says"),
    [
        ("xor", {}, "replication is off"),
        ("rs", {}, "replication is off"),
        ("rs", {"replication_factor": 2}, "from 3 to 64"),
        ("xor", {"replication_factor": 65}, "from 2 to 64"),
    ],
)
def test_parity_needs_a_clique_that_it_can_cover(scheme: Any, fields: dict[str, Any], says: str) -> None:
    given = {**ON_NODES, **fields} if fields else {}
    with pytest.raises(ConfigError, match=says) as refusal:
        validate_together(CheckpointConfig(**given), ResiliencyConfig(redundancy=scheme))
    assert "resiliency.redundancy" in str(refusal.value)
    assert refusal.value.advice


@pytest.mark.parametrize(("scheme", "size"), [("xor", 2), ("xor", 8), ("rs", 3), ("rs", 64)])
def test_parity_with_a_clique_that_fits_is_accepted(scheme: Any, size: int) -> None:
    given = {**ON_NODES, "replication_factor": size}
    validate_together(CheckpointConfig(**given), ResiliencyConfig(redundancy=scheme))


def domains_problem(domains: list[str], *, ranks_per_node: int | None = None, **fields: Any) -> str:
    checkpoint = CheckpointConfig(**REPLICATED, **fields)
    try:
        validate_together(
            checkpoint,
            ResiliencyConfig(),
            world_size=len(domains),
            ranks_per_node=ranks_per_node,
            domains=domains,
        )
    except ConfigError as error:
        return str(error)
    return ""


def test_more_copies_than_failure_domains_are_refused_with_the_domains() -> None:
    problem = domains_problem(["a", "a", "b", "b"], ranks_per_node=2, replication_factor=3)
    assert "replication_factor" in problem
    assert "this job has 2 (a, b)" in problem
    assert "Lower replication_factor to 2" in problem


def test_several_nodes_in_one_failure_domain_are_refused() -> None:
    assert "this job has 1 (rack)" in domains_problem(["rack"] * 4, ranks_per_node=2)


def test_a_job_on_one_node_is_never_refused() -> None:
    assert domains_problem(["only"] * 4, ranks_per_node=4, replication_factor=4) == ""
    assert domains_problem(["only"] * 4, replication_factor=2) == ""


def test_a_clique_with_two_ranks_in_one_domain_is_refused_with_its_ranks() -> None:
    problem = domains_problem(["a", "a", "b", "b"], ranks_per_node=2, replication_jump=1)
    assert "replication_jump" in problem
    assert "the ranks 0, 1 hold each other's saves" in problem
    assert "'a'" in problem


def test_the_default_jump_is_the_ranks_per_node() -> None:
    assert domains_problem(["a", "a", "b", "b"], ranks_per_node=2) == ""


def test_a_world_that_jump_and_factor_do_not_divide_is_left_to_placement() -> None:
    assert domains_problem(["a", "a", "b", "b", "c", "c"], ranks_per_node=2, replication_jump=2) == ""


@given(
    nodes=st.integers(1, 6),
    ranks_per_node=st.integers(1, 4),
    factor=st.integers(2, 4),
    jump=st.none() | st.integers(1, 8),
)
def test_nvrx_cliques_are_accepted_exactly_when_no_domain_holds_two_of_one(
    nodes: int, ranks_per_node: int, factor: int, jump: int | None
) -> None:
    ranks = nodes * ranks_per_node
    domains = [f"n{rank // ranks_per_node}" for rank in range(ranks)]
    used = jump or ranks_per_node
    fits = nodes == 1 or nodes >= factor
    if nodes > 1 and ranks % (used * factor) == 0:
        starts = [a * used * factor + b for a in range(ranks // (used * factor)) for b in range(used)]
        cliques = [[start + used * copy for copy in range(factor)] for start in starts]
        fits &= all(len({domains[rank] for rank in clique}) == factor for clique in cliques)
    problem = domains_problem(domains, ranks_per_node=ranks_per_node, replication_factor=factor, replication_jump=jump)
    assert (problem == "") == fits


def test_saving_memory_over_a_layout_that_is_not_asked_for_is_warned_of() -> None:
    alone = CheckpointConfig(distrib_optim_fully_reshardable_mem_efficient=True)
    ((what, advice),) = without_effect(alone)
    assert "no effect without dist_ckpt_optim_fully_reshardable" in what
    assert "Set dist_ckpt_optim_fully_reshardable" in advice
    both = CheckpointConfig(dist_ckpt_optim_fully_reshardable=True, distrib_optim_fully_reshardable_mem_efficient=True)
    assert without_effect(both) == without_effect(CheckpointConfig()) == []
    assert unsupported(both, ResiliencyConfig()) == unsupported(alone, ResiliencyConfig()) == []
