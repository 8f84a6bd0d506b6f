"""What ranks say to each other while they bring shards together, in rounds; one that fails keeps nobody waiting."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.errors import DivergedRanksError, StoreError
from resilience.replication import assembling
from resilience.replication.assembling import share
from resilience.replication.communicator import PeerFailedError
from resilience.testing.ranks import ThreadAgreements, on_all_ranks


@settings(max_examples=30, deadline=None)
@given(st.lists(st.binary(max_size=40), min_size=1, max_size=4), st.integers(1, 9))
def test_every_rank_hears_what_every_rank_made_however_many_rounds_that_takes(said: list[bytes], piece: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assembling, "_LEAST_BYTES", piece)
        patch.setattr(assembling, "_ROUND_BYTES", 1)
        heard = on_all_ranks(len(said), lambda group: share(group, lambda: said[group.rank]))
    assert heard == [said] * len(said)


def test_a_rank_that_cannot_make_its_own_raises_why_and_the_others_that_one_could_not() -> None:
    def work(group: ThreadAgreements) -> list[bytes]:
        def make() -> bytes:
            if group.rank == 1:
                raise StoreError("its disk is gone")
            return b"mine"

        return share(group, make)

    first, second, third = on_all_ranks(3, work)
    assert isinstance(second, StoreError)
    assert isinstance(first, PeerFailedError)
    assert isinstance(third, PeerFailedError)


@pytest.mark.parametrize(
    "payload", [b"", b"{", b"[[0]]", b"[[7, [0]]]", b"[[0, [5]]]", b"[[0, [-1]]]", b'[["a", [0]]]', b"[[0, 3]]", b"7"]
)
def test_what_makes_no_sense_is_a_typed_error(payload: bytes) -> None:
    with pytest.raises(DivergedRanksError, match=r"the segments that a rank wants|no shard has"):
        assembling._unpacked(payload, {0: [b""] * 5})


def test_what_a_rank_wants_reads_back() -> None:
    wanted = {0: {1, 4}, 3: {0}}
    assert assembling._unpacked(assembling._packed(wanted), {0: [b""] * 5, 3: [b""]}) == wanted
