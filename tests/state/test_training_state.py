"""The whole state: what is collected, what a load refuses before it touches anything, in what order it hands over."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from resilience.errors import ConfigError, CorruptCopyError, LayoutMismatchError, UnsupportedStateError
from resilience.state import PARTS, SavedItem, TrainingState, encode, rng, state_digest
from tests.state.saving import Save, restore, save_of


class Holder:
    """An object of the user's with a state of its own."""

    def __init__(self, held: Any = None, log: list[str] | None = None) -> None:
        self.held, self.log = held, log

    def state_dict(self) -> Any:
        return self.held

    def load_state_dict(self, state: Any) -> None:
        self.held = state
        if self.log is not None:
            self.log.append("extra")
        torch.rand(1)  # draws, as the making of many an object does


def linear(inputs: int = 2, outputs: int = 2, dtype: torch.dtype = torch.float32) -> nn.Linear:
    return nn.Linear(inputs, outputs, dtype=dtype)


def differences(source: TrainingState, target: TrainingState, parts: Any = PARTS) -> str:
    save = save_of(source.collect())
    with pytest.raises(LayoutMismatchError) as refused:
        target.plan_load(save.values, save.index, parts)
    return str(refused.value)


# -- collecting -----------------------------------------------------------------------------------------------------


def test_the_tree_has_its_parts_in_order_and_items_are_live() -> None:
    model = linear()
    state = TrainingState(model, torch.optim.SGD(model.parameters()), extra_state={"b": Holder(1), "a": Holder(2)})
    assert list(state.tree()) == list(PARTS)
    assert state.tree()["extra"] == {"a": 2, "b": 1}
    items = {item.key: item for item in state.collect().items}
    nn.init.constant_(model.weight, 5.0)
    assert items["model/0/weight"].tensor.data_ptr() == model.weight.data_ptr()
    assert items["model/0/weight"].tensor[0, 0] == 5.0
    assert items["model/0/weight"].replicated
    assert not items["rng/torch"].replicated


def test_only_the_parts_that_were_asked_for_are_collected() -> None:
    model = linear()
    state = TrainingState(model, torch.optim.SGD(model.parameters()))
    assert [item.key for item in state.collect(["model"]).items] == ["model/0/weight", "model/0/bias"]


def test_what_cannot_be_stored_is_named_at_the_first_save() -> None:
    state = TrainingState(linear(), extra_state={"mine": Holder({"deep": [Holder()]})})
    with pytest.raises(UnsupportedStateError, match=r"extra/mine/deep/0 is of type .*Holder"):
        state.collect()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"scheduler": object()}, "scheduler is a object without"),
        ({"scaler": object()}, "scaler is a object without"),
        ({"extra_state": {"x": 3}}, r"extra_state\['x'\] is a int without"),
        ({"extra_state": {1: Holder()}}, "each has to be a str"),
        ({"healthy": True}, "healthy is True"),
    ],
)
def test_wrong_arguments_are_refused_in_words(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TrainingState(linear(), **arguments)


# -- what does not fit ----------------------------------------------------------------------------------------------


def test_other_shapes_dtypes_and_names_are_all_listed() -> None:
    source = TrainingState(nn.ModuleDict({"a": linear(), "b": linear(2, 3), "c": linear()}))
    target = TrainingState(nn.ModuleDict({"a": linear(), "b": linear(2, 4), "d": linear(dtype=torch.float64)}))
    text = differences(source, target)
    assert "model/0/b.weight: saved float32 [3, 2], here float32 [4, 2]" in text
    assert "model/0/c.bias: in the save, not in the model here" in text
    assert "model/0/d.bias: in the model here, not in the save" in text
    assert "a.weight" not in text


def test_another_dtype_is_a_difference() -> None:
    text = differences(TrainingState(linear()), TrainingState(linear(dtype=torch.bfloat16)))
    assert "model/0/weight: saved float32 [2, 2], here bfloat16 [2, 2]" in text


def test_a_long_list_of_differences_is_cut() -> None:
    text = differences(TrainingState(nn.Sequential(*(linear() for _ in range(40)))), TrainingState(nn.Sequential()))
    assert "(80 differences)" in text
    assert "and 60 more" in text


class Scheduler(Holder):
    pass


@pytest.mark.parametrize(
    ("saved", "here", "says"),
    [
        ({"scheduler": Holder({})}, {}, "scheduler: saved one, here none"),
        ({}, {"scheduler": Holder({})}, "scheduler: saved none, here one"),
        ({"scheduler": [Holder({})]}, {"scheduler": Holder({})}, "scheduler: saved a list of 1, here one"),
        ({"scaler": Holder({"scale": 1})}, {}, "scaler: saved an enabled one, here none"),
        ({"scaler": Holder({"scale": 1})}, {"scaler": Holder({})}, "scaler: saved an enabled one, here a disabled one"),
        ({"extra_state": {"a": Holder()}}, {}, "extra/a: in the save, not in extra_state here"),
        ({}, {"extra_state": {"a": Holder()}}, "extra/a: in extra_state here, not in the save"),
        ({"dataloader": [1]}, {}, "dataloader: saved with a data loader, here none is given"),
        ({"dataloader": [1]}, {"dataloader": [1, 2]}, "saved with 1 batches per epoch, here it has 2"),
    ],
)
def test_parts_on_one_side_only_are_differences(saved: dict[str, Any], here: dict[str, Any], says: str) -> None:
    assert says in differences(TrainingState(linear(), **saved), TrainingState(linear(), **here))


def test_more_models_than_were_saved_are_a_difference() -> None:
    assert "model: saved 1, here 2" in differences(TrainingState(linear()), TrainingState([linear(), linear()]))


def test_a_part_that_was_not_saved_is_missed_unless_it_is_left_out() -> None:
    source, target = TrainingState(linear()), TrainingState(linear())
    save = save_of(source.collect(["model"]))
    with pytest.raises(LayoutMismatchError, match="rng: not in the save"):
        target.plan_load(save.values, save.index)
    assert [key for key, _ in target.plan_load(save.values, save.index, ["model"]).targets] == list(save.index)


def test_parts_that_are_not_loaded_stay_as_they_are() -> None:
    source = TrainingState(linear(), extra_state={"a": Holder(torch.ones(2))})
    model, holder = linear(), Holder("mine")
    target = TrainingState(model, extra_state={"a": holder})
    save = save_of(source.collect())
    plan = target.plan_load(save.values, save.index, ["model", "train_state"])
    before = torch.get_rng_state()
    for key, tensor in plan.targets:
        assert key.startswith("model/")
        nn.init.constant_(tensor, 4.0)
    plan.finish()
    assert holder.held == "mine"
    assert torch.equal(torch.get_rng_state(), before)
    assert model.weight[0, 0] == 4.0


# -- copies that make no sense --------------------------------------------------------------------------------------


def some_save() -> Save:
    return save_of(TrainingState(linear(), extra_state={"a": Holder({"x": torch.ones(2), "n": np.ones(3)})}).collect())


def plan_of(save: Save) -> None:
    TrainingState(linear(), extra_state={"a": Holder()}).plan_load(save.values, save.index)


def altered(save: Save, key: str, **changes: Any) -> Save:
    return replace(save, index={**save.index, key: replace(save.index[key], **changes)})


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": torch.float64},
        {"alias_of": "nothing"},
        {"alias_of": "model/0/weight"},
        {"alias_of": "extra/a/n"},
        {"shape": (1,)},
    ],
)
def test_an_index_that_disagrees_with_the_values_is_a_corrupt_copy(changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptCopyError):
        plan_of(altered(some_save(), "extra/a/x", **changes))


def test_an_array_of_another_size_is_a_corrupt_copy() -> None:
    with pytest.raises(CorruptCopyError, match="extra/a/n holds 2 elements"):
        plan_of(altered(some_save(), "extra/a/n", shape=(2,), global_shape=(2,)))


def test_an_item_that_is_not_in_the_index_is_a_corrupt_copy() -> None:
    save = some_save()
    del save.index["extra/a/x"]
    with pytest.raises(CorruptCopyError, match="refer to extra/a/x"):
        plan_of(save)


@pytest.mark.parametrize("tree", [3, [], dict.fromkeys(PARTS, 3), {part: [3] for part in PARTS}, {"model": [None]}])
def test_values_that_are_no_training_state_are_a_corrupt_copy(tree: Any) -> None:
    save = some_save()
    model = linear()
    state = TrainingState(model, torch.optim.SGD(model.parameters()))
    with pytest.raises((CorruptCopyError, LayoutMismatchError)):
        state.plan_load(encode(tree)[0], save.index)


def test_one_item_in_two_places_is_a_corrupt_copy() -> None:
    save = some_save()
    with pytest.raises(CorruptCopyError, match="from two places"):
        plan_of(replace(save, values=save.values.replace(b'"model/0/bias"', b'"model/0/weight"')))


# -- handing over ---------------------------------------------------------------------------------------------------


def test_everything_comes_back_and_random_state_last() -> None:
    def build(value: Any) -> TrainingState:
        return TrainingState(linear(), dataloader=[1, 2, 3], extra_state={"a": Holder(value)})

    source = build({"t": torch.arange(3), "n": np.arange(2), "deep": [(1, None)]})
    source.loader.next_batch()
    source.train_state.step, source.train_state.consumed_train_samples = 7, 2**40
    torch.manual_seed(4), np.random.seed(5), random.seed(6)
    save, digest = save_of(source.collect()), state_digest(source.collect())
    expected = (torch.rand(1).item(), np.random.rand(), random.random())
    target = build(None)
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    restore(target, save)
    assert state_digest(target.collect()) == digest
    assert (torch.rand(1).item(), np.random.rand(), random.random()) == expected
    assert target.train_state == source.train_state
    assert target.loader.next_batch() == 2


def test_tensors_that_shared_their_memory_share_it_again() -> None:
    shared = torch.arange(3.0)
    save = save_of(TrainingState(linear(), extra_state={"a": Holder({"x": shared, "y": [shared]})}).collect())
    holder = Holder()
    restore(TrainingState(linear(), extra_state={"a": holder}), save)
    assert holder.held["x"].data_ptr() == holder.held["y"][0].data_ptr()


def test_a_module_as_extra_state_comes_back() -> None:
    average, fresh = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    average(torch.rand(4, 3))
    save = save_of(TrainingState(linear(), extra_state={"average": average}).collect())
    restore(TrainingState(linear(), extra_state={"average": fresh}), save)
    assert torch.equal(fresh.running_mean, average.running_mean)
    assert fresh.num_batches_tracked == 1


def test_numpy_generators_other_than_the_usual_come_back() -> None:
    before = np.random.get_state(legacy=False)
    try:
        np.random.set_state(np.random.RandomState(np.random.MT19937(3)).get_state(legacy=False))
        np.random.standard_normal()  # leaves half a pair behind
        state = rng.capture()
        expected = np.random.standard_normal(3)
        np.random.seed(0)
        rng.restore(state)
        assert np.array_equal(np.random.standard_normal(3), expected)
    finally:
        np.random.set_state(before)


# -- the digest -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda state: nn.init.zeros_(state.models[0].module.bias),
        lambda state: torch.rand(1),
        lambda state: random.random(),
        lambda state: np.random.rand(),
        lambda state: state.loader.next_batch(),
        lambda state: setattr(state.train_state, "step", 1),
        lambda state: setattr(state.extra["a"], "held", {"x": 2}),
    ],
)
def test_any_change_of_state_changes_the_digest(change: Any) -> None:
    state = TrainingState(linear(), dataloader=[1, 2], extra_state={"a": Holder({"x": 1})})
    before = state_digest(state.collect())
    assert state_digest(state.collect()) == before
    change(state)
    assert state_digest(state.collect()) != before


def test_the_digest_does_not_see_strides_sharing_or_the_order_of_a_dict() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    held = {"a": matrix, "b": matrix, "c": 1}
    same = {"c": 1, "b": matrix.t().contiguous().t(), "a": matrix.clone()}
    model = linear()
    one, other = (TrainingState(model, extra_state={"x": Holder(each)}).collect() for each in (held, same))
    assert state_digest(one) == state_digest(other)
    assert len(state_digest(one)) == len("xxh3-128:") + 32


def test_a_saved_index_is_what_a_save_of_the_restored_state_has() -> None:
    save = some_save()
    target = TrainingState(linear(), extra_state={"a": Holder()})
    restore(target, save)
    again = target.collect()
    assert {item.key: SavedItem.of(item) for item in again.items} == save.index
    assert again.values == save.values
