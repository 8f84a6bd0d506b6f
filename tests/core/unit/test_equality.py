"""What data parallelism is said to keep equal is checked: all of it once, a rotating share at every save."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from resilience.snapshot.copying import Copying
from resilience.snapshot.equality import RotatingShare, Sample, agree_shared
from resilience.state.items import Item
from resilience.testing.ranks import on_all_ranks
from tests.core.shards import item, random_bytes


def agreed(per_rank: list[list[Any]]) -> list[tuple[set[str], set[str]]]:
    """Keys found equal, keys found different, on each rank."""
    results = on_all_ranks(len(per_rank), lambda group: agree_shared(per_rank[group.rank], group))
    for result in results:
        assert not isinstance(result, BaseException), result
    return [(set(equal), set(differ)) for equal, differ in results]  # type: ignore[misc]


def test_items_are_shared_where_every_bit_is_equal() -> None:
    nan, other_nan = torch.tensor([float("nan")]), torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)
    ranks = [
        [item("same", torch.ones(3)), item("zero", torch.zeros(1)), item("nan", nan), item("one", torch.ones(4))],
        [
            item("same", torch.ones(3)),
            item("zero", -torch.zeros(1)),
            item("nan", other_nan),
            item("one", torch.ones(4)),
        ],
    ]
    ranks[1][3].tensor[2] += 1e-7
    assert agreed(ranks) == [({"same"}, {"zero", "nan", "one"})] * 2


def test_strides_do_not_count_and_order_does() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    ranks = [
        [item("t", matrix), item("turned", matrix.t())],
        [item("t", matrix.t().contiguous().t()), item("turned", matrix.reshape(3, 2))],
    ]
    assert agreed(ranks) == [({"t"}, {"turned"})] * 2


def test_what_not_every_rank_has_is_neither_shared_nor_said_to_differ() -> None:
    """As with an optimizer that shards its state over the ranks."""
    ranks = [
        [item("weight", torch.ones(2)), item("state/0", torch.ones(2)), item("shape", torch.ones(2))],
        [item("weight", torch.ones(2)), item("state/1", torch.ones(2)), item("shape", torch.ones(3))],
        [item("weight", torch.ones(2)), item("shape", torch.ones(2))],
    ]
    assert agreed(ranks) == [({"weight"}, set())] * 3


def test_what_belongs_to_a_rank_and_what_is_stored_under_another_name_is_no_candidate() -> None:
    rows = [[item("rng", torch.ones(1), replicated=False), item("tied", torch.ones(1), alias_of="w")] for _ in "ab"]
    assert agreed(rows) == [(set(), set())] * 2


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(["f", "h", "b"]), st.integers(0, 5), st.booleans()), max_size=6))
def test_all_ranks_find_the_same(items: list[tuple[str, int, bool]]) -> None:
    dtypes = {"f": torch.float32, "h": torch.bfloat16, "b": torch.bool}
    ranks: list[list[Any]] = [[], []]
    expected = set()
    for number, (dtype, rows, differs) in enumerate(items):
        for rank in (0, 1):
            seed = number + (100 if differs and rank else 0)
            ranks[rank].append(item(f"i{number}", random_bytes(dtypes[dtype], (rows, 3), seed)))
        left, right = (each[-1].tensor.contiguous().view(torch.uint8) for each in ranks)
        if torch.equal(left, right):
            expected.add(f"i{number}")
    assert agreed(ranks) == [(expected, {f"i{n}" for n in range(len(items))} - expected)] * 2


def _sample(share: RotatingShare, items: list[Item], turn: int) -> Sample:
    sample, pairs = share.choose(items, turn)
    Copying().start((), pairs, lambda: None)
    return sample


def test_over_the_saves_every_shared_byte_is_sampled_and_a_change_is_seen_in_its_turn() -> None:
    items = [item("large", torch.zeros(1_200_000)), item("small", torch.zeros(10)), item("own", torch.zeros(9))]
    share = RotatingShare(items, {"large", "small"})
    turns = 3
    before = [_sample(share, items, turn).fingerprint() for turn in range(turns)]
    assert before == [_sample(share, items, turn + turns).fingerprint() for turn in range(turns)]
    for place in (0, 700_000, 1_199_999):
        items[0].tensor[place] = 1.0
        after = [_sample(share, items, turn).fingerprint() for turn in range(turns)]
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1
        items[0].tensor[place] = 0.0
    items[1].tensor[3] = 1.0
    assert [_sample(share, items, turn).fingerprint() for turn in range(turns)] != before
    assert all(len(_sample(share, items, turn).copies) <= 2 for turn in range(turns))


def test_a_sample_is_a_copy_that_training_does_not_change() -> None:
    items = [item("w", torch.zeros(4))]
    sample = _sample(RotatingShare(items, {"w"}), items, 0)
    seen = sample.fingerprint()
    items[0].tensor.add_(1)
    assert sample.fingerprint() == seen
