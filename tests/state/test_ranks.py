"""Two ranks, sharded by FSDP2 or replicated by DDP, resume to the bits of a run that was not stopped."""

from __future__ import annotations

from tests.ranks import run_ranks, values
from tests.state.ranks import load_the_others_shard, resume_replicated, resume_sharded


def test_sharded_training_resumes_to_the_bit_with_uneven_and_empty_shards() -> None:
    first, second = values(run_ranks(2, resume_sharded))
    assert first["same"]
    assert second["same"]
    assert first["items"]["model/0/up.weight"] == ((5, 4), (0, 0), (3, 4), False)
    assert second["items"]["model/0/up.weight"] == ((5, 4), (3, 0), (2, 4), False)
    assert second["items"]["model/0/down.weight"] == ((1, 5), (1, 0), (0, 5), False)
    assert second["items"]["optimizer/0/state/up.weight/exp_avg"] == ((5, 4), (3, 0), (2, 4), False)
    assert second["items"]["model/0/seen"] == ((), (), (), True)
    assert first["kinds"] == {"step": False, "exp_avg": True, "exp_avg_sq": True}
    assert first["average"]
    assert second["average"]


def test_replicated_training_resumes_to_the_bit_without_a_prefix() -> None:
    first, second = values(run_ranks(2, resume_replicated))
    assert first["same"]
    assert second["same"]
    assert first["items"]["model/0/up.weight"] == ((5, 4), (0, 0), (5, 4), True)
    assert first["items"]["optimizer/0/state/up.weight/exp_avg"][3]
    assert not first["items"]["rng/torch"][3]


def test_another_shard_of_the_same_tensor_does_not_fit() -> None:
    for text in values(run_ranks(2, load_the_others_shard)):
        assert "model/0/up.weight: saved as the shard" in text
        assert "optimizer/0/state/up.weight/exp_avg: saved as the shard" in text
