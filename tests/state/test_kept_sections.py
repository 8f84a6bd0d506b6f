"""A state that is collected again is what it would be if nobody had kept anything, whatever was done to it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from resilience import TrainingState, shard
from resilience.state import kept_sections
from resilience.state.items import Collected


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.two = nn.Linear(6, 4)
        self.square = nn.Parameter(torch.randn(5, 5))
        self.register_buffer("seen", torch.zeros(3))

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.two(self.one(batch)).sum() + self.square.sum()


class World:
    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = Net()
        self.optimizer = torch.optim.AdamW(self.net.parameters())
        self.extra = Extra(self)
        self.state = TrainingState(self.net, self.optimizer, extra_state={"mine": self.extra})
        self.step()

    def step(self) -> None:
        self.net(torch.ones(2, 6)).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def first_state(self) -> dict[str, Any]:
        return self.optimizer.state[self.net.one.weight]


class Extra:
    def __init__(self, world: World) -> None:
        self.world = world
        self.value: Any = torch.ones(2)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def transpose(world: World) -> None:
    world.net.square.data = world.net.square.data.t()


def move(world: World) -> None:
    world.net.one.weight.data = world.net.one.weight.data.clone()


def retype(world: World) -> None:
    world.net.two.bias.data = world.net.two.bias.data.double()


def reinterpret(world: World) -> None:
    moment = world.first_state()["exp_avg"]
    world.first_state()["exp_avg"] = moment.view(torch.int32)


def grow(world: World) -> None:
    world.net.register_parameter(f"more{len(list(world.net.parameters()))}", nn.Parameter(torch.randn(2)))


def tie(world: World) -> None:
    world.net.two.tied = world.net.one.weight


def tie_moments(world: World) -> None:
    world.first_state()["exp_avg_sq"] = world.net.one.weight.detach()


def tie_outside(world: World) -> None:
    world.extra.value = world.net.square.detach()


def part(world: World) -> None:
    world.extra.value = torch.ones(2)


def drop_state(world: World) -> None:
    world.optimizer.state.pop(world.net.square, None)


def count(world: World) -> None:
    world.first_state()["own"] = world.first_state().get("own", 0) + 1


def negate_zero(world: World) -> None:
    state = world.first_state()
    state["zero"] = -0.0 if str(state.get("zero", -0.0)) == "0.0" else 0.0


def nest(world: World) -> None:
    world.first_state()["nested"] = {"a": [torch.ones(2)]}


def unnest(world: World) -> None:
    world.first_state().pop("nested", None)


def swap_shapes(world: World) -> None:
    """The same leaves under the same names, one level up and down."""
    state = world.optimizer.state
    if type(state.get(world.net.square)) is dict and "inner" not in state[world.net.square]:
        state[world.net.square] = {"inner": dict(state[world.net.square])}


def complex_values(world: World) -> None:
    world.first_state()["z"] = torch.ones(2, dtype=torch.complex64)


def conjugate(world: World) -> None:
    if "z" in world.first_state():
        world.first_state()["z"] = world.first_state()["z"].conj() + 0 * 1j


def freeze(world: World) -> None:
    world.first_state()["exp_avg"].requires_grad_(True)


def say_so(world: World) -> None:
    shard(world.net.one.weight, 0, 1, 3)


def change_rate(world: World) -> None:
    """To what Python calls equal, and is written otherwise."""
    group = world.optimizer.param_groups[0]
    group["lr"] = {"0.001": 1, "1": 1.0, "1.0": True, "True": 0.0, "0.0": -0.0}.get(repr(group["lr"]), 0.001)


def rate_tensor(world: World) -> None:
    world.optimizer.param_groups[0]["lr"] = torch.tensor(0.001)


def add_group(world: World) -> None:
    world.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 0.5})


def draw(world: World) -> None:
    random.random()


ACTIONS = [
    change_rate, rate_tensor, add_group, draw,
    World.step, transpose, move, retype, reinterpret, grow, tie, tie_moments, tie_outside, part, drop_state, count,
    negate_zero, nest, unnest, swap_shapes, complex_values, conjugate, freeze, say_so,
]  # fmt: skip


def without_keeping(world: World) -> Collected:
    world.state._kept = kept_sections.KeptSections()
    return world.state.collect()


def described(collected: Collected) -> list[tuple[Any, ...]]:
    return [
        (
            i.key, i.tensor.dtype, tuple(i.tensor.shape), i.tensor.stride(), i.global_shape, i.offsets, i.replicated,
            i.alias_of, i.tensor.requires_grad,
            0 if i.key.startswith("rng/") else i.tensor.data_ptr(),  # random state is told in tensors made for it
        )
        for i in collected.items
    ]  # fmt: skip


@settings(max_examples=150)
@given(st.lists(st.sampled_from(ACTIONS), max_size=8))
def test_what_is_kept_is_what_would_be_collected_anew(actions: list[Any]) -> None:
    world = World()
    world.state.collect()
    for action in actions:
        action(world)
        kept = world.state._kept
        here = world.state.collect()
        anew = without_keeping(world)
        world.state._kept = kept
        assert here.values == anew.values
        assert described(here) == described(anew)
        if action in (retype, reinterpret, tie_moments, nest, swap_shapes, complex_values, freeze):
            break  # no optimizer steps with that


def test_most_of_a_state_that_only_trained_is_kept() -> None:
    world = World()
    before = {item.key: item for item in world.state.collect().items}
    world.step()
    after = {item.key: item for item in world.state.collect().items}
    assert {key for key in after if after[key] is before[key]} == {
        key for key in after if key.startswith(("model/", "optimizer/0/state/"))
    }


def test_a_part_alone_and_the_whole_do_not_disturb_each_other() -> None:
    world = World()
    tie_moments(world)
    whole = described(world.state.collect())
    alone = world.state.collect(("optimizer",))
    assert all(item.alias_of is None for item in alone.items), "the model's weight is not there"
    assert described(world.state.collect()) == whole


def test_a_distributed_tensor_is_kept_with_its_placements() -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        mesh = init_device_mesh("cpu", (2,))
        net = nn.Linear(4, 4)
        net.weight = nn.Parameter(distribute_tensor(net.weight.detach(), mesh, [Shard(0)]))
        state = TrainingState(net)
        first = state.collect()
        assert state.collect().items[0] is first.items[0]
        net.weight = nn.Parameter(net.weight.detach().redistribute(mesh, [Replicate()]))
        assert "replicate" in state.collect().values.decode()
        assert "replicate" not in first.values.decode()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("text", ['{"$written":0}', '\\"$written\\":0', '{"$written":1}'])
def test_no_text_of_the_user_s_is_taken_for_a_kept_part(text: str) -> None:
    from resilience.state.tree import decode

    world = World()
    world.extra.value = [text, {text: text}]
    for _ in range(2):
        collected = world.state.collect()
        tensors = {item.key: item.tensor for item in collected.items}
        tree = decode(collected.values, tensors.__getitem__)
        assert tree["extra"]["mine"]["value"] == [text, {text: text}]
