"""Every scheme that is shipped keeps to the contract that a user's own would be held to."""

from __future__ import annotations

from pathlib import Path

import pytest

from resilience.planning.schemes import SCHEMES
from resilience.replication.redundancy import REDUNDANCIES
from resilience.testing import RedundancyContract


class TestTwoCopies(RedundancyContract):
    clique = 2


class TestThreeCopies(RedundancyContract):
    clique = 3


class TestXor(RedundancyContract):
    scheme = "xor"
    clique = 4


class TestXorOfTwo(RedundancyContract):
    scheme = "xor"
    clique = 2


class TestRs(RedundancyContract):
    scheme = "rs"
    clique = 5


class TestRsOfThree(RedundancyContract):
    scheme = "rs"
    clique = 3


class InMemory:
    """Where the file is the arena."""

    @pytest.fixture
    def tmp_path(self, memory_mount: Path) -> Path:
        return memory_mount


class TestTwoCopiesInMemory(InMemory, RedundancyContract):
    clique = 2


class TestRsInMemory(InMemory, RedundancyContract):
    scheme = "rs"
    clique = 4


def test_every_scheme_has_a_plan_and_an_exchange() -> None:
    assert SCHEMES.keys() == REDUNDANCIES.keys()
    assert all(scheme.name == name for name, scheme in SCHEMES.items())


@pytest.mark.parametrize("name", SCHEMES)
def test_what_a_scheme_says_it_costs_grows_with_the_shard_and_not_with_what_it_survives(name: str) -> None:
    scheme = SCHEMES[name]
    for clique in range(scheme.smallest_clique, 9):
        assert 0 < scheme.kept_bytes(1 << 20, clique) < scheme.kept_bytes(1 << 24, clique)
        assert 0 < scheme.losses(clique) < clique
        assert scheme.sent_bytes(1 << 20, clique) >= scheme.losses(clique) * (1 << 20) / clique
