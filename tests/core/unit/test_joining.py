"""Joining a job: what each rank tells all others is little, whatever the number of settings."""

from __future__ import annotations

from typing import Any

import pytest

from resilience.config import CheckpointConfig, ResiliencyConfig
from resilience.errors import ConfigError
from resilience.job import join_job
from resilience.replication.communicator import SoloAgreements, SoloCommunicator
from resilience.state.parallel_layout import ParallelLayout


class Counted(SoloAgreements):
    """Counts what is gathered; `digests` are the other ranks' words in a maximum."""

    def __init__(self, others: list[list[int]] | None = None) -> None:
        self.gathered: list[int] = []
        self._others = others or []

    def gather(self, payload: bytes) -> list[bytes]:
        self.gathered.append(len(payload))
        return [payload]

    def maximum(self, values: Any) -> list[int]:
        return [max(column) for column in zip(values, *self._others, strict=True)]


def join(setup: Counted) -> None:
    config, checkpoint = ResiliencyConfig(node_id="node0"), CheckpointConfig()
    settings = {**vars(config), **vars(checkpoint), "long": "x" * 10_000}
    join_job(SoloCommunicator(), setup, ParallelLayout().resolve(0, 1), config, settings, {})


def test_a_rank_of_a_large_job_tells_every_other_one_a_hundred_bytes_and_not_its_settings() -> None:
    setup = Counted()
    join(setup)
    (told,) = setup.gathered
    assert told < 100


def test_settings_are_told_in_full_where_they_differ() -> None:
    setup = Counted([[0, 0]])
    with pytest.raises(ConfigError, match="different settings"):
        join(setup)
    assert setup.gathered[0] > 10_000
