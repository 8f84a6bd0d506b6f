"""Modules of every kind go into a save and come back: weights in place, names without wrappers, hooks respected."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from resilience.errors import ConfigError, LayoutMismatchError, UnsupportedStateError
from resilience.state import TrainingState
from resilience.state.tensors import DTYPES, byte_view
from tests.state.saving import restore, save_of


def fresh(*sizes: int) -> nn.Sequential:
    torch.manual_seed(sum(sizes))
    return nn.Sequential(*(nn.Linear(before, after) for before, after in itertools.pairwise(sizes)))


def moved(saved_from: Any, into: Any, **arguments: Any) -> None:
    restore(TrainingState(into, **arguments), save_of(TrainingState(saved_from, **arguments).collect()))


def keys(model: Any, optimizer: Any = None) -> list[str]:
    items = TrainingState(model, optimizer).collect(["model", "optimizer"]).items
    return [item.key for item in items]


def test_parameters_are_filled_in_place() -> None:
    source, target = fresh(2, 3), fresh(2, 3)
    nn.init.zeros_(source[0].weight)
    weight, pointer = target[0].weight, target[0].weight.data_ptr()
    moved(source, target)
    assert target[0].weight is weight
    assert weight.data_ptr() == pointer
    assert not weight.any()
    assert weight.requires_grad


def test_nothing_live_changes_while_a_load_is_planned() -> None:
    source, target = fresh(2, 3), nn.Sequential(nn.Linear(2, 3))
    optimizer = torch.optim.Adam(target.parameters())
    state = TrainingState(target, optimizer)
    before = save_of(state.collect(["model", "optimizer", "rng"]))
    source_state = TrainingState(source, torch.optim.Adam(source.parameters()))
    source(torch.ones(1, 2)).sum().backward()
    source_state.optimizers[0].optimizer.step()
    torch.manual_seed(9)
    save = save_of(source_state.collect())
    torch.random.set_rng_state(torch.tensor(bytearray(before.content["rng/torch"]), dtype=torch.uint8))
    state.plan_load(save.values, save.index)
    assert save_of(state.collect(["model", "optimizer", "rng"])) == before


def test_tied_weights_are_stored_once_and_stay_tied() -> None:
    def tied(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        return model

    source, target = tied(0), tied(1)
    save = save_of(TrainingState(source).collect(["model"]))
    assert save.index["model/0/1.weight"].alias_of == "model/0/0.weight"
    assert "model/0/1.weight" not in save.content
    moved(source, target)
    assert target[1].weight is target[0].weight
    assert torch.equal(target[0].weight, source[0].weight)


def test_weights_that_are_tied_on_one_side_only_do_not_fit() -> None:
    model, tied = fresh(3, 3, 3), fresh(3, 3, 3)
    tied[1].weight = tied[0].weight
    with pytest.raises(LayoutMismatchError, match=r"model/0/1.weight: saved alone, here the same memory as .*0.weight"):
        moved(model, tied)
    with pytest.raises(LayoutMismatchError, match=r"model/0/1.weight: saved the same memory as .*here alone"):
        moved(tied, model)


@pytest.mark.parametrize("name", sorted(DTYPES))
@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_a_buffer_of_every_dtype_comes_back(name: str) -> None:
    def holder(fill: int) -> nn.Module:
        content = torch.full((32,), fill, dtype=torch.uint8).view(DTYPES[name])
        model = nn.Module()
        model.register_buffer("whole", content.clone())
        model.register_buffer("scalar", content[0].clone())
        model.register_buffer("none", content[:0].clone())
        model.register_buffer("odd", content.clone().reshape(2, -1).t())
        return model

    source, target = holder(1), holder(0)
    moved(source, target)
    for key, value in source.state_dict().items():
        assert torch.equal(byte_view(target.state_dict()[key]), byte_view(value)), key


def test_buffers_that_are_not_persistent_are_no_state() -> None:
    model = nn.Module()
    model.register_buffer("cache", torch.ones(1), persistent=False)
    model.register_buffer("mean", torch.ones(1))
    assert keys(model) == ["model/0/mean"]


def test_an_expanded_buffer_is_filled_through_its_one_row() -> None:
    def expanded(value: float) -> nn.Module:
        model = nn.Module()
        model.register_buffer("mask", torch.full((1, 3), value).expand(4, 3))
        return model

    source, target = expanded(2.0), expanded(0.0)
    buffer = target.mask
    moved(source, target)
    assert target.mask is buffer
    assert torch.equal(target.mask, source.mask)
    assert target.mask.stride() == (0, 1)


class WithExtraState(nn.Module):
    def __init__(self, note: Any) -> None:
        super().__init__()
        self.weight, self.note = nn.Parameter(torch.ones(2)), note

    def get_extra_state(self) -> Any:
        return self.note

    def set_extra_state(self, state: Any) -> None:
        self.note = state


@pytest.mark.parametrize("note", [{"scale": torch.ones(2), "steps": (1, None)}, torch.ones(3), None, b"x"])
def test_a_modules_extra_state_comes_back(note: Any) -> None:
    target = nn.Sequential(WithExtraState("other"), nn.BatchNorm1d(2))
    moved(nn.Sequential(WithExtraState(note), nn.BatchNorm1d(2)), target)
    assert repr(target[0].note) == repr(note)


def test_extra_state_that_needs_pickle_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedStateError, match=r"model/0/0._extra_state is of type .*object"):
        TrainingState(nn.Sequential(WithExtraState(object()))).collect()


def test_entries_that_a_hook_makes_go_back_through_load_state_dict() -> None:
    class Transposing(nn.Module):
        """Stores its weight the other way round, as layers do whose layout in memory is their own business."""

        def __init__(self, fill: float) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.full((2, 3), fill)), nn.Parameter(torch.full((2,), fill))
            self.register_state_dict_post_hook(self._store)
            self.register_load_state_dict_pre_hook(self._load)

        @staticmethod
        def _store(module: nn.Module, entries: dict[str, Any], prefix: str, metadata: Any) -> None:
            entries[prefix + "turned"] = entries.pop(prefix + "weight").t().clone()

        @staticmethod
        def _load(module: nn.Module, entries: dict[str, Any], prefix: str, *rest: Any) -> None:
            entries[prefix + "weight"] = entries.pop(prefix + "turned").t()

    source, target = nn.Sequential(Transposing(1.0), nn.Linear(1, 1)), nn.Sequential(Transposing(0.0), nn.Linear(1, 1))
    with torch.no_grad():
        source[0].weight.copy_(torch.arange(6.0).reshape(2, 3))
    weight = target[0].weight
    moved(source, target)
    assert target[0].weight is weight
    assert torch.equal(weight, source[0].weight)
    assert torch.equal(target[0].bias, source[0].bias)
    assert torch.equal(target[1].weight, source[1].weight)


def test_wrappers_leave_no_trace_in_the_names() -> None:
    plain = fresh(2, 3, 2)
    wrapped = fresh(2, 3, 2)
    wrapped[0] = checkpoint_wrapper(wrapped[0])
    wrapped[1] = torch.compile(wrapped[1])
    outer = torch.compile(nn.DataParallel(wrapped))
    expected = keys(plain, torch.optim.Adam(plain.parameters()))
    assert keys(outer, torch.optim.Adam(outer.parameters())) == expected
    moved(plain, outer)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), outer.parameters(), strict=True))


def test_a_child_that_is_called_like_a_wrapper_keeps_its_name() -> None:
    model = nn.Module()
    model.module = nn.Linear(1, 1)
    assert keys(model) == ["model/0/module.weight", "model/0/module.bias"]


def test_names_that_only_a_wrapper_tells_apart_keep_it() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(1))
    model._orig_mod = nn.Module()
    model._orig_mod.weight = nn.Parameter(torch.zeros(1))
    assert keys(model) == ["model/0/weight", "model/0/_orig_mod.weight"]


def test_chunks_of_a_pipeline_are_told_apart() -> None:
    def build(seed: int) -> tuple[list[nn.Module], torch.optim.Optimizer]:
        torch.manual_seed(seed)
        chunks: list[nn.Module] = [nn.Linear(2, 2), nn.Linear(2, 2)]
        optimizer = torch.optim.Adam([parameter for chunk in chunks for parameter in chunk.parameters()])
        chunks[1](chunks[0](torch.ones(1, 2))).sum().backward()
        optimizer.step()
        return chunks, optimizer

    source, target = build(0), build(1)
    assert "optimizer/0/state/1.weight/exp_avg" in keys(*source)
    restore(TrainingState(*target), save_of(TrainingState(*source).collect()))
    for mine, its in zip(target[1].param_groups[0]["params"], source[1].param_groups[0]["params"], strict=True):
        assert torch.equal(mine, its)
        assert torch.equal(target[1].state[mine]["exp_avg"], source[1].state[its]["exp_avg"])


@pytest.mark.parametrize(("model", "says"), [("x", "model is a str"), ([], "model is empty"), ([3], "model is a int")])
def test_what_is_no_model_is_refused(model: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        TrainingState(model)


def test_a_model_on_the_meta_device_is_refused() -> None:
    with pytest.raises(UnsupportedStateError, match="model/0/weight is a tensor on the meta device"):
        TrainingState(nn.Linear(1, 1, device="meta")).collect()


def test_a_flattening_wrapper_is_refused_with_what_to_use_instead() -> None:
    class FullyShardedDataParallel(nn.Module):
        """Stands in for FSDP1, which needs a process group only to be made."""

    with pytest.raises(UnsupportedStateError, match=r"fully_shard \(FSDP2\)"):
        TrainingState(nn.Sequential(FullyShardedDataParallel()))
