"""Optimizer state comes back to the bit, by the parameter's name, into an optimizer that never stepped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from resilience.errors import ConfigError, LayoutMismatchError, UnsupportedStateError
from resilience.state import TrainingState
from resilience.state.optimizer_state import optimizer_state
from tests.state.saving import Save, restore, save_of


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    return TrainingState(model, optimizer)


def saved(model: nn.Module, optimizer: torch.optim.Optimizer) -> Save:
    return save_of(stepped(model, optimizer).collect())


def test_state_of_another_dtype_than_its_parameter_is_not_rounded() -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(3, 3, dtype=torch.bfloat16)
        return model, torch.optim.SGD(model.parameters(), lr=0.1)

    model, optimizer = build()
    exact = torch.full((3, 3), 1 / 3)
    optimizer.state[model.weight]["momentum_buffer"] = exact
    optimizer.state[model.weight]["kept"] = torch.tensor(0.1, dtype=torch.float64)
    save = save_of(TrainingState(model, optimizer).collect())
    fresh_model, fresh = build()
    restore(TrainingState(fresh_model, fresh), save)
    state = fresh.state[fresh_model.weight]
    assert torch.equal(state["momentum_buffer"], exact)
    assert state["kept"].dtype == torch.float64
    fresh.load_state_dict(optimizer.state_dict())  # what would have happened
    assert not torch.equal(fresh.state[fresh_model.weight]["momentum_buffer"].float(), exact)


def test_state_is_found_by_name_in_whatever_order_it_came_into_being() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    state = TrainingState(model, optimizer)
    model.bias.grad = torch.ones(2)
    optimizer.step()
    model.weight.grad = torch.ones(2, 2)
    optimizer.step()
    assert list(state.tree()["optimizer"][0]["state"]) == ["weight", "bias"]


def test_groups_stay_the_same_objects_and_a_tensor_keeps_its_memory() -> None:
    def build(lr: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(2, 2)
        return model, torch.optim.Adam(model.parameters(), lr=torch.tensor(lr), betas=(lr, 0.5))

    save = saved(*build(0.25))
    model, optimizer = build(0.5)
    group, rate = optimizer.param_groups[0], optimizer.param_groups[0]["lr"]
    restore(TrainingState(model, optimizer), save)
    assert optimizer.param_groups[0] is group
    assert group["lr"] is rate
    assert (rate.item(), group["betas"]) == (0.25, (0.25, 0.5))
    assert [id(each) for each in group["params"]] == [id(each) for each in model.parameters()]


def test_state_lies_in_memory_as_its_parameter_does() -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Conv2d(3, 4, 2).to(memory_format=torch.channels_last)
        return model, torch.optim.Adam(model.parameters(), fused=True)

    save = saved(*build())
    model, optimizer = build()
    state = TrainingState(model, optimizer)
    restore(state, save)
    assert optimizer.state[model.weight]["exp_avg"].stride() == model.weight.stride()


def test_a_parameter_of_no_model_is_stored_with_its_optimizer() -> None:
    def build(value: float) -> tuple[nn.Module, torch.optim.Optimizer, nn.Parameter]:
        model, alone = nn.Linear(1, 1), nn.Parameter(torch.full((2,), value))
        return model, torch.optim.Adam([{"params": model.parameters()}, {"params": [alone]}]), alone

    model, optimizer, alone = build(3.0)
    alone.grad = torch.ones(2)
    optimizer.step()
    save = save_of(TrainingState(model, optimizer).collect())
    assert {"optimizer/0/parameters/param.1.0", "optimizer/0/state/param.1.0/exp_avg"} <= save.index.keys()
    fresh_model, fresh, its = build(0.0)
    restore(TrainingState(fresh_model, fresh), save)
    assert torch.equal(its, alone)
    assert fresh.param_groups[1]["params"] == [its]
    assert torch.equal(fresh.state[its]["exp_avg"], optimizer.state[alone]["exp_avg"])


def test_a_group_that_is_added_later_is_named_at_the_next_save() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    optimizer = torch.optim.SGD(model[0].parameters())
    state = TrainingState(model, optimizer)
    state.collect()
    optimizer.add_param_group({"params": model[1].parameters()})
    assert state.tree()["optimizer"][0]["param_groups"][1]["params"] == ["1.weight", "1.bias"]


def test_a_missing_group_and_other_parameters_are_differences_in_words() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    two_groups = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[1].parameters()}])
    save = save_of(TrainingState(model, two_groups).collect())

    def load_into(optimizer: Any) -> None:
        TrainingState(model, optimizer).plan_load(save.values, save.index)

    with pytest.raises(LayoutMismatchError, match=r"saved with 2 param groups, here it has 1 .*add_param_group"):
        load_into(torch.optim.SGD(model.parameters()))
    with pytest.raises(LayoutMismatchError, match="another order"):
        load_into(torch.optim.SGD([{"params": [model[0].bias, model[0].weight]}, {"params": model[1].parameters()}]))
    with pytest.raises(LayoutMismatchError, match=r"param_groups/1: saved with 1.weight, which it lacks here"):
        load_into(torch.optim.SGD([{"params": model[0].parameters()}, {"params": [model[1].bias]}]))
    with pytest.raises(LayoutMismatchError, match="optimizer: saved 1, here 0"):
        load_into(None)


def test_state_that_belongs_to_no_parameter_comes_back() -> None:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state["history"] = {"norms": [torch.ones(2)], 3: None}
    fresh = torch.optim.SGD(model.parameters())
    restore(TrainingState(model, fresh), save_of(TrainingState(model, optimizer).collect()))
    assert torch.equal(fresh.state["history"]["norms"][0], torch.ones(2))
    assert fresh.state["history"][3] is None


def test_state_that_is_a_weight_itself_is_stored_once_and_stays_it() -> None:
    def build(value: float) -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Linear(2, 2)
        nn.init.constant_(model.weight, value)
        optimizer = torch.optim.SGD(model.parameters())
        optimizer.state[model.weight]["master"] = model.weight.detach()
        return model, optimizer

    model, optimizer = build(2.0)
    save = save_of(TrainingState(model, optimizer).collect())
    assert save.index["optimizer/0/state/weight/master"].alias_of == "model/0/weight"
    fresh_model, fresh = build(0.0)
    restore(TrainingState(fresh_model, fresh), save)
    assert fresh.state[fresh_model.weight]["master"].data_ptr() == fresh_model.weight.data_ptr()
    assert fresh_model.weight[0, 0] == 2.0


class Own:
    """No torch optimizer, but it can say and take its state."""

    def __init__(self) -> None:
        self.rate, self.seen = 1.0, torch.zeros(2)

    def state_dict(self) -> dict[str, Any]:
        return {"rate": self.rate, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rate, self.seen = state["rate"], state["seen"]


class Overriding(torch.optim.SGD):
    """Keeps something beside state and param_groups that only its own methods know."""

    total = 0

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total = state.pop("total")
        super().load_state_dict(state)


def test_an_object_with_its_own_state_goes_through_its_methods() -> None:
    source, target = Own(), Own()
    source.rate, source.seen = 0.5, torch.ones(2)
    restore(TrainingState(nn.Linear(1, 1), target), save_of(TrainingState(nn.Linear(1, 1), source).collect()))
    assert (target.rate, target.seen.tolist()) == (0.5, [1.0, 1.0])


def test_an_optimizer_that_overrides_its_state_goes_through_its_methods() -> None:
    model = nn.Linear(2, 2)
    source = Overriding(model.parameters(), momentum=0.5)
    source.total = 7
    save = saved(model, source)
    target = Overriding(model.parameters(), momentum=0.5)
    restore(TrainingState(model, target), save)
    assert target.total == 7
    assert torch.equal(target.state[model.weight]["momentum_buffer"], source.state[model.weight]["momentum_buffer"])


def test_another_kind_of_optimizer_is_a_difference() -> None:
    model = nn.Linear(1, 1)
    ours, own = TrainingState(model, torch.optim.SGD(model.parameters())), TrainingState(model, Own())
    for source, target in ((ours, own), (own, ours)):
        save = save_of(source.collect())
        with pytest.raises(LayoutMismatchError, match="optimizer/0: saved from"):
            target.plan_load(save.values, save.index)


def test_what_is_no_optimizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="optimizer is a object without state_dict"):
        TrainingState(nn.Linear(1, 1), object())


def test_several_optimizers_and_schedulers_come_back_each_its_own() -> None:
    def build(rate: float) -> TrainingState:
        models = [nn.Linear(1, 1), nn.Linear(1, 1)]
        optimizers = [torch.optim.SGD(models[0].parameters(), lr=rate), torch.optim.Adam(models[1].parameters())]
        schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, 1) for optimizer in optimizers]
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        return TrainingState(models, optimizers, scheduler=schedulers)

    source, target = build(0.5), build(0.25)
    restore(target, save_of(source.collect()))
    assert target.tree(["optimizer", "scheduler"])["scheduler"] == source.tree(["scheduler"])["scheduler"]
    assert target.optimizers[0].optimizer.param_groups[0]["lr"] == 0.05


def test_a_zero_redundancy_optimizer_that_overlaps_with_ddp_is_refused_with_what_to_use_instead() -> None:
    class ZeroRedundancyOptimizer(torch.optim.SGD):  # the real one needs DDP's hook before it has any state
        _overlap_with_ddp = True

    with pytest.raises(UnsupportedStateError, match="overlap_with_ddp") as refused:
        optimizer_state(ZeroRedundancyOptimizer([torch.nn.Parameter(torch.zeros(2))], lr=0.1), 0, dict)
    assert "resilience.DistributedOptimizer" in refused.value.advice
