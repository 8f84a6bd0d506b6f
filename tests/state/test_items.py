"""Items name live tensors, tell aliases and shards, and refuse what has no place in a whole."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

from resilience.errors import UnsupportedStateError
from resilience.state import Item, SavedItem, items_of


def item(tensor: torch.Tensor, key: str = "model/0/w") -> Item:
    (found,) = items_of([(key, tensor)])
    return found


class World:
    """A process group that sends nothing: enough for a DTensor to know where it stands as one rank of many."""

    def start(self, rank: int, size: int) -> None:
        self.stop()
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())

    def stop(self) -> None:
        if dist.is_initialized():
            dist.destroy_process_group()

    def shards(self, shape: tuple[int, ...], mesh_shape: tuple[int, ...], placements: list[Any]) -> list[Item]:
        """The item that each rank in turn makes of one tensor, whose elements are numbered in the whole."""
        size = torch.Size(mesh_shape).numel()
        whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
        found = []
        for rank in range(size):
            self.start(rank, size)
            mesh = init_device_mesh("cpu", mesh_shape)
            local = whole
            for axis, placement in enumerate(placements):
                if isinstance(placement, (Shard, _StridedShard)):
                    parts, _ = placement._split_tensor(local, mesh.size(axis), with_padding=False, contiguous=True)
                    local = parts[mesh.get_coordinate()[axis]]
            shard = DTensor.from_local(
                local, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride()
            )
            found.append(item(shard))
        return found


@pytest.fixture
def world() -> Iterator[World]:
    made = World()
    yield made
    made.stop()


def check_places(found: list[Item], shape: tuple[int, ...]) -> None:
    """Each item's elements, numbered in the whole, are those at its offsets."""
    whole = torch.arange(torch.Size(shape).numel()).reshape(shape)
    for each in found:
        assert each.global_shape == shape
        expected = whole
        for dim, (start, length) in enumerate(zip(each.offsets, each.tensor.shape, strict=True)):
            expected = expected.narrow(dim, start, length)
        assert torch.equal(each.tensor, expected)


def test_an_item_is_the_live_tensor() -> None:
    weight = torch.nn.Parameter(torch.zeros(2, 3).t())
    found = item(weight)
    with torch.no_grad():
        weight += 1
    assert found.tensor.tolist() == [[1.0, 1.0]] * 3
    assert (found.global_shape, found.offsets) == ((3, 2), (0, 0))
    assert not found.tensor.requires_grad


@pytest.mark.parametrize(
    ("key", "replicated"),
    [("model/0/w", True), ("optimizer/0/state/w/exp_avg", True), ("rng/torch", False), ("extra/model/w", False)],
)
def test_only_tensors_of_model_and_optimizer_are_taken_as_replicated(key: str, replicated: bool) -> None:
    assert item(torch.ones(1), key).replicated is replicated


def test_tied_tensors_are_stored_once() -> None:
    base = torch.arange(6.0).reshape(2, 3)
    tensors = [("a", base), ("b", base.view(2, 3)), ("c", torch.nn.Parameter(base)), ("d", base.clone())]
    assert [each.alias_of for each in items_of(tensors)] == [None, "a", "a", None]


def test_views_that_are_not_the_same_elements_are_no_aliases() -> None:
    base = torch.arange(4.0).reshape(2, 2)
    others = [base.t(), base[0], base[1], base.view(torch.int32), base.flatten(), base[:1]]
    assert {each.alias_of for each in items_of([("a", base), *((str(n), t) for n, t in enumerate(others))])} == {None}


def test_tensors_without_elements_are_nobodys_alias() -> None:
    empty = torch.empty(0, 3)
    assert [each.alias_of for each in items_of([("a", empty), ("b", empty)])] == [None, None]


def test_a_saved_item_says_what_the_item_was() -> None:
    found = item(torch.ones(2, 1, dtype=torch.bfloat16))
    assert SavedItem.of(found) == SavedItem("model/0/w", torch.bfloat16, (2, 1), (0, 0), (2, 1), None)


@pytest.mark.parametrize(
    ("shape", "mesh", "placements"),
    [
        ((8, 2), (4,), [Shard(0)]),
        ((2, 7), (3,), [Shard(1)]),
        ((5,), (4,), [Shard(0)]),
        ((2, 3), (4,), [Shard(0)]),
        ((0, 3), (2,), [Shard(0)]),
        ((4, 6), (2, 3), [Shard(0), Shard(1)]),
        ((9, 2), (2, 2), [Shard(0), Shard(0)]),
        ((6, 2), (2, 3), [Replicate(), Shard(0)]),
        ((8, 2), (2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
        ((7, 2), (2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
        ((3, 2), (2, 2), [_StridedShard(0, split_factor=2), Shard(0)]),
        ((4, 4), (2, 2), [Shard(1), Shard(0)]),
    ],
)
def test_a_shards_offsets_are_where_its_elements_lie(
    world: World, shape: tuple[int, ...], mesh: tuple[int, ...], placements: list[Any]
) -> None:
    found = world.shards(shape, mesh, placements)
    check_places([each for each in found if each.tensor.numel()], shape)
    assert not any(each.replicated for each in found)


def test_torch_agrees_on_the_first_row_of_a_strided_shard(world: World) -> None:
    placements = [_StridedShard(0, split_factor=2), Shard(0)]
    for rank, each in enumerate(world.shards((9, 2), (2, 2), placements)):
        world.start(rank, 4)
        mesh = init_device_mesh("cpu", (2, 2))
        local_shape, offsets = compute_local_shape_and_global_offset((9, 2), mesh, placements)
        assert (tuple(each.tensor.shape), each.offsets) == (local_shape, offsets)


def test_a_strided_shard_that_is_no_block_is_refused(world: World) -> None:
    with pytest.raises(UnsupportedStateError, match=r"model/0/w .*several places of dimension 0"):
        world.shards((8, 2), (2,), [_StridedShard(0, split_factor=2)])


def test_a_replicated_dtensor_is_a_candidate_and_whole(world: World) -> None:
    for each in world.shards((3, 2), (2,), [Replicate()]):
        assert (each.replicated, each.offsets, each.global_shape) == (True, (0, 0), (3, 2))


def test_a_dtensor_sharded_over_one_rank_is_whole(world: World) -> None:
    (found,) = world.shards((3, 2), (1,), [Shard(0)])
    assert found.replicated


def test_a_pending_sum_is_refused(world: World) -> None:
    world.start(0, 2)
    tensor = DTensor.from_local(torch.ones(2), init_device_mesh("cpu", (2,)), [Partial()], run_check=False)
    with pytest.raises(UnsupportedStateError, match="model/0/w is a DTensor placed as"):
        item(tensor)


def test_a_dtensor_on_others_ranks_is_refused(world: World) -> None:
    from torch.distributed.device_mesh import DeviceMesh

    world.start(3, 4)
    mesh = DeviceMesh("cpu", [0, 1])
    tensor = DTensor.from_local(torch.ones(2), mesh, [Shard(0)], run_check=False)
    with pytest.raises(UnsupportedStateError, match="not part of"):
        item(tensor)


def test_places_are_worked_out_once(world: World) -> None:
    world.start(1, 2)
    mesh = init_device_mesh("cpu", (2,))
    tensors = [(str(n), DTensor.from_local(torch.ones(2, 3), mesh, [Shard(0)], run_check=False)) for n in range(3)]
    places: dict[Any, Any] = {}
    assert {each.offsets for each in items_of(tensors, places)} == {(2, 0)}
    assert len(places) == 1
