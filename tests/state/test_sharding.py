"""A plain tensor that was said to be a part of a whole is stored as that part, with its optimizer's state."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from torch import nn

import resilience
from resilience.errors import ConfigError, LayoutMismatchError, UnsupportedStateError
from resilience.state import Collected, TrainingState, state_digest
from tests.state.saving import restore, save_of


def trained(index: int = 0, count: int = 2, *, stacked: int = 1, dim: int = 0, seed: int = 0) -> TrainingState:
    """One rank of a layer whose rows, or columns, are cut; with Adam's moments."""
    torch.manual_seed(seed)
    model = nn.Linear(4, 6)
    resilience.shard(model.weight, dim, index, count, stacked=stacked)
    if dim == 0:
        resilience.shard(model.bias, 0, index, count, stacked=stacked)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.rand(3, 4)).square().sum().backward()
        optimizer.step()
    return TrainingState(model, optimizer)


def places(collected: Collected) -> dict[str, tuple[object, ...]]:
    return {item.key: (item.global_shape, item.offsets, tuple(item.tensor.shape)) for item in collected.items}


def test_a_part_is_an_item_with_its_place_in_the_whole() -> None:
    found = places(trained(index=1, count=3).collect())
    assert found["model/0/weight"] == ((18, 4), (6, 0), (6, 4))
    assert found["model/0/bias"] == ((18,), (6,), (6,))


def test_columns_are_cut_along_the_last_dimension() -> None:
    assert places(trained(index=1, dim=-1).collect())["model/0/weight"] == ((6, 8), (0, 4), (6, 4))


def test_optimizer_state_of_the_parameters_shape_lies_where_the_parameter_does() -> None:
    found = places(trained(index=1, count=3).collect())
    for moment in ("exp_avg", "exp_avg_sq"):
        assert found[f"optimizer/0/state/weight/{moment}"] == ((18, 4), (6, 0), (6, 4))
    assert found["optimizer/0/state/weight/step"] == ((), (), ())


def test_stacked_sections_are_blocks_of_the_wholes_sections() -> None:
    state = trained(index=1, stacked=2)
    found = places(state.collect())
    assert found["model/0/weight/~[0]"] == ((12, 4), (3, 0), (3, 4))
    assert found["model/0/weight/~[1]"] == ((12, 4), (9, 0), (3, 4))
    assert found["optimizer/0/state/bias/exp_avg/~[1]"] == ((12,), (9,), (3,))
    assert "model/0/weight" not in found


def test_sections_may_differ_in_length() -> None:
    weight = resilience.shard(torch.zeros(8, 2), 0, 1, 2, stacked=(4, 2, 2))
    found = places(TrainingState(_Holder(weight)).collect())
    assert [found[f"model/0/held/~[{number}]"] for number in range(3)] == [
        ((16, 2), (4, 0), (4, 2)),
        ((16, 2), (10, 0), (2, 2)),
        ((16, 2), (14, 0), (2, 2)),
    ]


class _Holder(nn.Module):
    def __init__(self, held: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("held", held)


def test_a_part_anywhere_in_the_whole_is_told_by_its_offsets() -> None:
    held = resilience.shard_at(torch.zeros(2, 3), global_shape=(5, 9), offsets=(3, 6))
    assert places(TrainingState(_Holder(held)).collect())["model/0/held"] == ((5, 9), (3, 6), (2, 3))


@pytest.mark.parametrize("stacked", [1, 2])
def test_parts_come_back_to_the_bit(stacked: int) -> None:
    state = trained(index=1, stacked=stacked)
    before = state.collect()
    save = save_of(before)
    other = trained(index=1, stacked=stacked, seed=7)
    restore(other, save)
    assert state_digest(other.collect()) == state_digest(before)
    fresh = nn.Linear(4, 6)
    for parameter in fresh.parameters():
        resilience.shard(parameter, 0, 1, 2, stacked=stacked)
    optimizer = torch.optim.Adam(fresh.parameters(), lr=0.1)
    restore(TrainingState(fresh, optimizer), save)
    assert torch.equal(
        optimizer.state[fresh.weight]["exp_avg"], state.optimizers[0].optimizer.state_dict()["state"][0]["exp_avg"]
    )


def test_another_part_of_the_same_whole_does_not_fit() -> None:
    save = save_of(trained(index=0).collect())
    with pytest.raises(LayoutMismatchError) as caught:
        trained(index=1).plan_load(save.values, save.index)
    assert "model/0/weight: saved as the shard [6, 4] at [0, 0], here it is [6, 4] at [6, 0]" in str(caught.value)
    assert "optimizer/0/state/weight/exp_avg: saved as [6, 4] at [0, 0] of [12, 4], here it would be" in str(
        caught.value
    )


def test_a_whole_tensor_does_not_fit_a_part() -> None:
    save = save_of(trained(index=0, count=1).collect())
    with pytest.raises(LayoutMismatchError, match="model/0/weight"):
        trained(index=0, count=2).plan_load(save.values, save.index)


def test_two_blocks_do_not_fit_one() -> None:
    save = save_of(trained(index=0, stacked=2).collect())
    with pytest.raises(LayoutMismatchError, match="saved as 2 blocks of rows, here it has 1"):
        trained(index=0, stacked=1).plan_load(save.values, save.index)


def test_what_was_said_survives_an_exchange_of_the_data() -> None:
    state = trained(index=1)
    parameter = next(state.models[0].module.parameters())
    parameter.data = torch.ones(6, 4)
    assert places(state.collect())["model/0/weight"][1] == (6, 0)


def test_what_was_said_is_gone_with_the_tensor_and_leaves_no_mark_on_it() -> None:
    tensor = resilience.shard(torch.zeros(2), 0, 1, 2)
    assert not vars(copy.deepcopy(tensor))
    assert places(TrainingState(_Holder(copy.deepcopy(tensor))).collect())["model/0/held"] == ((2,), (0,), (2,))
    del tensor
    gc.collect()


def test_a_tensor_that_grew_since_is_refused() -> None:
    holder = _Holder(resilience.shard(torch.zeros(2), 0, 1, 2))
    holder.held.resize_(3)
    with pytest.raises(UnsupportedStateError, match=r"said to be a part of shape \[2\], and has now shape \[3\]"):
        TrainingState(holder).collect()


def test_saying_it_again_replaces_what_was_said() -> None:
    held = resilience.shard(torch.zeros(2), 0, 1, 2)
    resilience.shard(held, 0, 0, 3)
    assert places(TrainingState(_Holder(held)).collect())["model/0/held"] == ((6,), (0,), (2,))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, 2, 2), "part 2 of 2 is none"),
        ((1, 0, 2), "dim is 1"),
        ((0, -1, 2), "part -1 of 2"),
    ],
)
def test_what_cannot_be_a_part_is_refused(arguments: tuple[int, int, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        resilience.shard(torch.zeros(4), *arguments)


def test_sections_that_do_not_make_up_the_tensor_are_refused() -> None:
    with pytest.raises(ConfigError, match="stacked is 3"):
        resilience.shard(torch.zeros(4), 0, 0, 2, stacked=3)
    with pytest.raises(ConfigError, match="have to add up to 4"):
        resilience.shard(torch.zeros(4), 0, 0, 2, stacked=(1, 2))
    with pytest.raises(ConfigError, match="does not lie at"):
        resilience.shard_at(torch.zeros(4), global_shape=(5,), offsets=(2,))
    with pytest.raises(ConfigError, match="cannot be a part"):
        resilience.shard([1, 2], 0, 0, 2)  # type: ignore[type-var]
