"""Names in the checkpoint: every path has one key, and every key reads back as that path."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.formats.keys import rank_key, rank_of, stored_key, tree_key


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("model/0/layers.0.weight", "layers.0.weight"),
        ("model/1/layers.0.weight", "model_chunk_1.layers.0.weight"),
        ("optimizer/0/state/layers.0.weight/exp_avg", "optimizer.state.exp_avg.layers.0.weight"),
        ("optimizer/2/state/w/step", "optimizer_2.state.step.w"),
        ("model/0/odd~1name", "odd/name"),
        (
            "optimizer/megatron/optimizer.distributed.dp_group_idx_0.gbuf_idx_0.bucket_idx_0.param",
            "optimizer.distributed.dp_group_idx_0.gbuf_idx_0.bucket_idx_0.param",
        ),
        ("optimizer/megatron/chained_1.optimizer.distributed.x~1y", "chained_1.optimizer.distributed.x/y"),
        ("extra/ema/0/w", "resilience/extra/ema/0/w"),
        ("optimizer/0/param_groups/0/lr", "resilience/optimizer/0/param_groups/0/lr"),
        ("optimizer/0/state/w/nested/a", "resilience/optimizer/0/state/w/nested/a"),
        # names that would read back as something else
        ("model/0/optimizer.state.exp_avg.w", "resilience/model/0/optimizer.state.exp_avg.w"),
        ("model/0/model_chunk_1.w", "resilience/model/0/model_chunk_1.w"),
        ("model/0/optimizer.distributed.w", "resilience/model/0/optimizer.distributed.w"),
        ("optimizer/0/state/w/a.b", "resilience/optimizer/0/state/w/a.b"),
    ],
)
def test_a_path_has_the_key_that_other_programs_expect(path: str, key: str) -> None:
    assert stored_key(path) == key
    assert tree_key(key) == path


_part = st.text("ab.~/_01", min_size=1, max_size=12).map(lambda s: s.replace("~", "~0").replace("/", "~1"))
_paths = st.one_of(
    st.tuples(st.just("model"), st.sampled_from("0123"), _part),
    st.tuples(st.just("optimizer"), st.sampled_from("012"), st.just("state"), _part, _part),
    st.lists(_part, min_size=1, max_size=5),
    st.tuples(st.just("model"), st.just("0"), _part.map(lambda p: f"optimizer.state.{p}")),
    st.tuples(st.just("model"), st.just("0"), _part.map(lambda p: f"model_chunk_1.{p}")),
    st.tuples(st.just("model"), st.just("0"), _part.map(lambda p: f"resilience~1{p}")),
    st.tuples(st.just("model"), st.just("0"), _part.map(lambda p: f"optimizer.distributed.{p}")),
    st.tuples(st.just("optimizer"), st.just("megatron"), _part.map(lambda p: f"optimizer.distributed.{p}")),
    st.tuples(st.just("optimizer"), st.just("megatron"), _part),
).map("/".join)


@given(_paths)
def test_every_path_comes_back_from_its_key(path: str) -> None:
    assert tree_key(stored_key(path)) == path


@given(_paths, _paths)
def test_no_two_paths_share_a_key(one: str, other: str) -> None:
    assert (stored_key(one) == stored_key(other)) == (one == other)


@given(st.integers(0, 99999), st.integers(1, 99999))
def test_a_ranks_object_tells_whose_it_is(rank: int, world_size: int) -> None:
    assert rank_of(rank_key(rank, world_size)) == (rank, world_size)
    assert rank_of("rng_state/shard_0.1_1.2") is None
