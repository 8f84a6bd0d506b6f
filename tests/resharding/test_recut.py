"""What is not part of a whole tensor under another layout: taken where all agree, refused or told where they do not."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import resilience
from resilience import ParallelLayout, TrainingState
from resilience.errors import CorruptCopyError, LayoutMismatchError, MissingKeysError, SaveFailedError
from resilience.state.reconcile import without_parts
from resilience.state.tree import encode
from tests.resharding.worlds import Holder, load, place, read_from, save


@pytest.fixture(params=["checkpoint", "fully_parallel", pytest.param("atomic", marks=pytest.mark.long)], autouse=True)
def source(request: pytest.FixtureRequest) -> Iterator[str]:
    """What is loaded: a persistent checkpoint, or the shards of a save on nodes. One set of rules holds for both."""
    with read_from(request.param):
        yield request.param


class Net(nn.Module):
    """Rows of `up` are cut over tensor parallelism, `norm` is whole everywhere."""

    def __init__(self, tp_rank: int = 0, tp: int = 1) -> None:
        super().__init__()
        whole = torch.arange(24.0).reshape(8, 3) / 10
        self.up = nn.Parameter(part_of(whole, tp_rank, tp))
        resilience.shard(self.up, 0, tp_rank, tp)
        self.norm = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x * self.norm, self.up)


def part_of(whole: torch.Tensor, index: int, count: int) -> torch.Tensor:
    return whole.chunk(count)[index].clone()


def ranks(world: int, make: Callable[[int, ParallelLayout], TrainingState], **sizes: int) -> list[TrainingState]:
    """The states of all ranks in a layout."""
    layouts = [ParallelLayout(**sizes).resolve(rank, world) for rank in range(world)]
    return [place(make(rank, layout), rank, world, **sizes) for rank, layout in enumerate(layouts)]


def trained(rank: int, layout: ParallelLayout, *, steps: int = 2, lr: float = 0.1, **fields: Any) -> TrainingState:
    """Alike on the ranks of one tensor-parallel place."""
    net = Net(layout.tp_rank or 0, layout.tp)
    optimizer = torch.optim.Adam([{"params": [net.up], "lr": lr}, {"params": [net.norm], "lr": 0.5, "eps": 1e-6}])
    for _ in range(steps):
        net.up.grad, net.norm.grad = net.up.detach() + 1, torch.ones(3)
        optimizer.step()
    return TrainingState(net, optimizer, **fields)


def fresh(rank: int, layout: ParallelLayout, **fields: Any) -> TrainingState:
    return trained(rank, layout, steps=0, **fields)


def only(state: TrainingState) -> Any:
    return state.models[0].module, state.optimizers[0].optimizer


# -- optimizers -------------------------------------------------------------------------------------------------------


def test_a_fresh_optimizer_gets_its_part_of_the_moments_and_the_hyperparameters(tmp_path: Path) -> None:
    save(tmp_path, ranks(2, trained, tp=2))
    (whole,) = ranks(1, trained)
    for here in ranks(4, lambda r, p: fresh(r, p, lr=0.9), tp=4):
        load(tmp_path, here)
        net, optimizer = only(here)
        rank = here.layout.tp_rank if here.layout else 0
        expected, its = only(whole)
        assert torch.equal(net.up, part_of(expected.up.detach(), rank, 4))
        for moment in ("exp_avg", "exp_avg_sq"):
            theirs = its.state[expected.up][moment]
            assert torch.equal(optimizer.state[net.up][moment], part_of(theirs, rank, 4))
            assert torch.equal(optimizer.state[net.norm][moment], its.state[expected.norm][moment])
        assert optimizer.state[net.up]["step"].item() == 2
        assert optimizer.param_groups[0]["lr"] == 0.1
        assert optimizer.param_groups[1]["eps"] == 1e-6


def test_momentum_and_an_optimizer_without_state_yet_come_along(tmp_path: Path) -> None:
    def make(rank: int, layout: ParallelLayout, steps: int = 1) -> TrainingState:
        net = Net(layout.tp_rank or 0, layout.tp)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        for _ in range(steps):
            net.up.grad, net.norm.grad = net.up.detach() + 1, torch.ones(3)
            optimizer.step()
        return TrainingState(net, optimizer)

    save(tmp_path / "one", ranks(2, make, tp=2))
    (here,) = ranks(1, lambda r, p: make(r, p, 0))
    load(tmp_path / "one", here)
    net, optimizer = only(here)
    expected, its = only(ranks(1, make)[0])
    assert torch.equal(optimizer.state[net.up]["momentum_buffer"], its.state[expected.up]["momentum_buffer"])
    save(tmp_path / "two", ranks(2, lambda r, p: make(r, p, 0), tp=2))
    (later,) = ranks(1, make)
    load(tmp_path / "two", later)
    assert not only(later)[1].state


def test_parameters_may_be_grouped_otherwise_if_their_hyperparameters_agree(tmp_path: Path) -> None:
    def together(rank: int, layout: ParallelLayout) -> TrainingState:
        net = Net(layout.tp_rank or 0, layout.tp)
        return TrainingState(net, torch.optim.Adam([net.norm, net.up], lr=0.3))

    save(tmp_path / "agree", ranks(2, together, tp=2))

    def apart(rank: int, layout: ParallelLayout) -> TrainingState:
        net = Net(layout.tp_rank or 0, layout.tp)
        return TrainingState(net, torch.optim.Adam([{"params": [net.up]}, {"params": [net.norm]}], lr=0.7))

    (here,) = ranks(1, apart)
    load(tmp_path / "agree", here)
    assert [group["lr"] for group in only(here)[1].param_groups] == [0.3, 0.3]
    save(tmp_path / "differ", ranks(2, trained, tp=2))
    with pytest.raises(
        LayoutMismatchError, match=r"optimizer/0/param_groups/0: lr was not the same for its parameters"
    ):
        load(tmp_path / "differ", ranks(1, together)[0])


def test_a_hyperparameter_on_which_ranks_disagree_is_refused(tmp_path: Path) -> None:
    save(tmp_path, ranks(2, lambda r, p: trained(r, p, lr=0.1 + r), tp=2))
    with pytest.raises(LayoutMismatchError, match=r"lr was not the same .* on the saved ranks \[0, 1\]"):
        load(tmp_path, ranks(1, fresh)[0])


def test_a_learning_rate_that_is_a_tensor_keeps_its_memory(tmp_path: Path) -> None:
    def make(rank: int, layout: ParallelLayout, lr: float = 0.25) -> TrainingState:
        net = Net(layout.tp_rank or 0, layout.tp)
        return TrainingState(
            net, torch.optim.Adam(net.parameters(), lr=torch.tensor(lr), capturable=False, foreach=False)
        )

    save(tmp_path, ranks(2, make, tp=2))
    (here,) = ranks(1, lambda r, p: make(r, p, 0.5))
    kept = only(here)[1].param_groups[0]["lr"]
    load(tmp_path, here)
    assert kept.item() == 0.25
    assert only(here)[1].param_groups[0]["lr"] is kept


class Own:
    """An optimizer that alone knows what its state is."""

    def __init__(self, count: int) -> None:
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_state_that_only_an_optimizer_knows_is_taken_where_all_have_the_same(tmp_path: Path) -> None:
    save(tmp_path / "same", ranks(2, lambda r, p: TrainingState(Net(r, 2), Own(3)), tp=2))
    (here,) = ranks(1, lambda r, p: TrainingState(Net(), Own(0)))
    load(tmp_path / "same", here)
    assert only(here)[1].count == 3
    save(tmp_path / "differ", ranks(2, lambda r, p: TrainingState(Net(r, 2), Own(r)), tp=2))
    with pytest.raises(LayoutMismatchError, match="optimizer/0: differs between the saved ranks 0 and 1"):
        load(tmp_path / "differ", ranks(1, lambda r, p: TrainingState(Net(), Own(0)))[0])


def test_parameters_of_no_model_have_no_names_in_another_cut(tmp_path: Path) -> None:
    def make(rank: int, layout: ParallelLayout) -> TrainingState:
        net, temperature = Net(layout.tp_rank or 0, layout.tp), nn.Parameter(torch.tensor([2.5]))
        return TrainingState(net, torch.optim.SGD([*net.parameters(), temperature], lr=0.1))

    save(tmp_path, ranks(2, make, tp=2))
    with pytest.raises(LayoutMismatchError, match="trains parameters of no model"):
        load(tmp_path, ranks(1, make)[0])
    (here, _, _, _) = ranks(4, make, tp=2, dp=2)
    only(here)[1].param_groups[0]["params"][-1].data.zero_()
    load(tmp_path, here)
    assert only(here)[1].param_groups[0]["params"][-1].item() == 2.5


# -- what each rank has for itself ------------------------------------------------------------------------------------


class Counter:
    def __init__(self, value: Any) -> None:
        self.value = value

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value = state["value"]


@pytest.mark.parametrize("value", [5, torch.tensor([1.0, 2.0])])
def test_extra_state_is_taken_if_all_ranks_had_the_same(tmp_path: Path, value: Any) -> None:
    save(tmp_path, ranks(2, lambda r, p: fresh(r, p, extra_state={"counter": Counter(value)}), tp=2))
    counter = Counter(None)
    load(tmp_path, ranks(1, lambda r, p: fresh(r, p, extra_state={"counter": counter}))[0])
    assert torch.equal(torch.as_tensor(counter.value), torch.as_tensor(value))


def test_extra_state_that_differs_is_refused_by_name_unless_it_is_known_whose_it_is(tmp_path: Path) -> None:
    def make(rank: int, layout: ParallelLayout) -> TrainingState:
        return fresh(rank, layout, extra_state={"counter": Counter(torch.tensor([10.0 * (layout.tp_rank or 0)]))})

    save(tmp_path, ranks(2, make, tp=2))
    with pytest.raises(LayoutMismatchError, match="extra/counter: differs between the saved ranks 0 and 1"):
        load(tmp_path, ranks(1, make)[0])
    _, here, *_ = ranks(4, make, tp=2, dp=2)
    here.extra["counter"].value = None
    load(tmp_path, here)
    assert here.extra["counter"].value.item() == 10.0


def with_buffer(rank: int, layout: ParallelLayout) -> TrainingState:
    net = Net(layout.tp_rank or 0, layout.tp)
    net.register_buffer("seen", torch.tensor([float(rank)]))
    return TrainingState(net)


def test_a_buffer_that_differs_within_data_parallelism_is_the_lowest_ranks_and_that_is_said(tmp_path: Path) -> None:
    save(tmp_path, ranks(4, with_buffer, tp=2, dp=2))
    *_, here = ranks(2, with_buffer, tp=2)
    here.models[0].module.seen.fill_(-1)
    notes = load(tmp_path, here).notes
    assert here.models[0].module.seen.item() == 1.0
    assert any("differed from rank to rank, and are those of the lowest that held them: seen" in note for note in notes)


def test_a_tensor_that_differs_over_tensor_parallelism_and_has_no_place_is_refused(tmp_path: Path) -> None:
    def unsaid(rank: int, layout: ParallelLayout) -> TrainingState:
        return TrainingState(nn.Linear(2, 2, bias=False))

    different = save(tmp_path, ranks(2, unsaid, tp=2))
    assert different == [frozenset({"model/0/weight"})] * 2
    with pytest.raises(LayoutMismatchError, match="model/0/weight: differs between the saved ranks"):
        load(tmp_path, ranks(1, unsaid)[0])


def test_replicas_of_a_part_that_differ_fail_the_save(tmp_path: Path) -> None:
    def diverged(rank: int, layout: ParallelLayout) -> TrainingState:
        return TrainingState(Holder(w=resilience.shard(torch.full((2,), float(rank)), 0, layout.tp_rank or 0, 2)))

    with pytest.raises(SaveFailedError, match=r"ranks \[0, 2\] hold the same part of model/0/w and differ"):
        save(tmp_path, ranks(4, diverged, tp=2, dp=2))


def test_the_scheduler_and_the_counters_have_to_agree(tmp_path: Path) -> None:
    def make(rank: int, layout: ParallelLayout) -> TrainingState:
        state = fresh(rank, layout)
        state.train_state.consumed_train_samples = 100 + rank
        return state

    save(tmp_path, ranks(2, make, tp=2))
    with pytest.raises(LayoutMismatchError, match="train_state: differs between the saved ranks 0 and 1"):
        load(tmp_path, ranks(1, make)[0])


def test_stages_have_different_names_and_share_one_embedding(tmp_path: Path) -> None:
    def stage(rank: int, layout: ParallelLayout) -> TrainingState:
        parts = {"token": torch.tensor([1.0, 2.0])}
        if layout.pp == 1 or layout.pp_rank == 0:
            parts["first"] = torch.tensor([3.0])
        if layout.pp == 1 or layout.pp_rank == 1:
            parts["second"] = torch.tensor([4.0])
        return TrainingState(Holder(**parts))

    assert save(tmp_path, ranks(2, stage, pp=2)) == [frozenset()] * 2
    (here,) = ranks(1, stage)
    for buffer in here.models[0].module.buffers():
        buffer.zero_()
    load(tmp_path, here)
    assert {name: each.tolist() for name, each in here.models[0].module.named_buffers()} == {
        "token": [1.0, 2.0],
        "first": [3.0],
        "second": [4.0],
    }


def test_an_entry_that_no_rank_saved_is_judged_by_the_strictness(tmp_path: Path) -> None:
    save(tmp_path, ranks(2, fresh, tp=2))

    (grown,) = ranks(1, fresh)
    grown.models[0].module.register_buffer("added", torch.ones(1))
    with pytest.raises(MissingKeysError, match="added"):
        load(tmp_path, grown)
    assert load(tmp_path, grown, dist_ckpt_strictness="log_unexpected").unexpected_keys == ("added",)


def test_another_global_shape_is_refused(tmp_path: Path) -> None:
    save(tmp_path, ranks(2, lambda r, p: TrainingState(Holder(w=resilience.shard(torch.ones(2), 0, r, 2))), tp=2))
    with pytest.raises(LayoutMismatchError, match=r"saved float32 \[4\], here float32 \[5\]"):
        load(tmp_path, ranks(1, lambda r, p: TrainingState(Holder(w=torch.ones(5))))[0])


# -- random numbers ---------------------------------------------------------------------------------------------------


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.random()), float(torch.rand(()))


def saved_with_seeds(folder: Path, seeds: list[int], **sizes: int) -> None:
    """Rank r had just been seeded with seeds[r]; states are collected before any is drawn from."""
    states = ranks(len(seeds), lambda r, p: TrainingState(Holder(w=torch.ones(2))), **sizes)
    for state, seed in zip(states, seeds, strict=True):
        state.collect = _collected_under(state, seed)  # type: ignore[method-assign]
    save(folder, states)


def _collected_under(state: TrainingState, seed: int) -> Any:
    collect = state.collect

    def seeded(*parts: Any) -> Any:
        reseed(seed)
        found = collect(*parts)
        return type(found)(tuple(_own(item) for item in found.items), found.values)

    return seeded


def _own(item: Any) -> Any:
    import dataclasses

    return dataclasses.replace(item, tensor=item.tensor.clone())


def reseed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def resumed_draws(folder: Path, rank: int, world: int, seed: int, **sizes: int) -> tuple[Any, bool]:
    """What a rank draws after the load, and whether it was told that it is not what it would have been."""
    (here,) = [place(TrainingState(Holder(w=torch.ones(2))), rank, world, **sizes)]
    reseed(seed)
    told = any(note.startswith("random numbers") for note in load(folder, here).notes)
    return draws(), told


def test_random_numbers_go_on_where_it_is_known_whose_they_are(tmp_path: Path) -> None:
    saved_with_seeds(tmp_path, [1, 1, 2, 2], pp=2, dp=2)
    for rank, seed in ((0, 1), (1, 2)):
        found = resumed_draws(tmp_path, rank, 2, 99, pp=2)
        reseed(seed)
        assert found == (draws(), False)


def test_one_state_on_all_ranks_is_every_ranks(tmp_path: Path) -> None:
    saved_with_seeds(tmp_path, [4, 4], tp=2)
    found = resumed_draws(tmp_path, 2, 3, 99, dp=3)
    reseed(4)
    assert found == (draws(), False)


def test_else_they_are_derived_and_that_is_said(tmp_path: Path) -> None:
    saved_with_seeds(tmp_path, [1, 2], dp=2)
    found = {(rank, seed): resumed_draws(tmp_path, rank, 3, seed, dp=3) for rank in range(3) for seed in (7, 8)}
    assert all(told for _, told in found.values())
    assert found[0, 7] == resumed_draws(tmp_path, 0, 3, 7, dp=3), "the same again"
    assert found[0, 7] == found[1, 7], "seeded alike they stay alike"
    assert found[0, 7] != found[0, 8], "seeded differently they stay different"
    saved_with_seeds(tmp_path / "other", [3, 2], dp=2)
    assert resumed_draws(tmp_path / "other", 0, 3, 7, dp=3) != found[0, 7], "they follow from what was saved"
    assert len(set(found[0, 7][0])) == 3


# -- data -------------------------------------------------------------------------------------------------------------


def loader(layout: ParallelLayout, batch: int, *, samples: int = 48, seed: int = 3) -> DataLoader[Any]:
    dataset = TensorDataset(torch.arange(samples))
    share = DistributedSampler(dataset, layout.dp, layout.dp_rank, seed=seed)
    return DataLoader(dataset, batch, sampler=share, drop_last=True)


def reading(batch: int, **fields: int) -> Callable[[int, ParallelLayout], TrainingState]:
    return lambda r, p: TrainingState(Holder(w=torch.ones(1)), dataloader=loader(p, batch, **fields))


def drawn(states: list[TrainingState], steps: int) -> list[set[int]]:
    """The samples of each step, over all ranks."""
    found = []
    for _ in range(steps):
        batches = [state.loader.next_batch()[0].tolist() for state in states]
        found.append({sample for batch in batches for sample in batch})
    return found


@pytest.mark.parametrize(("dp", "batch"), [(1, 8), (4, 2), (8, 1), (2, 4)])
def test_data_goes_on_behind_the_same_samples_however_many_share_it(tmp_path: Path, dp: int, batch: int) -> None:
    states = ranks(2, reading(4), dp=2)
    seen = drawn(states, 8)  # into the second epoch of six batches
    save(tmp_path, states)
    rest = set().union(*drawn(states, 4))
    here = ranks(dp, reading(batch), dp=dp)
    for state in here:
        notes = load(tmp_path, state).notes
        assert dp == 2 or any(note.startswith("data: goes on behind the same samples") for note in notes)
    steps = 4 * 8 // (dp * batch)
    assert set().union(*drawn(here, steps)) == rest
    assert not rest & set().union(*seen[6:])


@pytest.mark.parametrize(("dp", "batch"), [(4, 4), (3, 1), (5, 2)])
def test_data_goes_on_to_the_sample_also_between_two_steps_of_here(tmp_path: Path, dp: int, batch: int) -> None:
    """And what was begun so can be handed on again, to others and to ranks that are restarted."""
    states = ranks(2, reading(4), dp=2)
    seen = set().union(*drawn(states, 1))
    save(tmp_path / "first", states)
    here = ranks(dp, reading(batch), dp=dp)
    for state in here:
        assert any("8 samples into their epoch" in note for note in load(tmp_path / "first", state).notes)
    then = set().union(*drawn(here, 1))
    assert (len(then), then & seen) == (dp * batch, set())
    save(tmp_path / "second", here)
    rest = set(range(48)) - seen - then
    for again in (ranks(dp, reading(batch), dp=dp), ranks(1, reading(1), dp=1)):
        for state in again:
            load(tmp_path / "second", state)
        steps = len(rest) // (len(again) * again[0].loader.loader.batch_size)
        last = set().union(*drawn(again, steps))
        assert last <= rest
        assert len(last) == steps * len(again) * again[0].loader.loader.batch_size, "none twice"


def test_another_order_of_the_samples_is_refused(tmp_path: Path) -> None:
    states = ranks(2, reading(4), dp=2)
    drawn(states, 1)
    save(tmp_path, states)
    with pytest.raises(LayoutMismatchError, match="goes over its samples in another order"):
        load(tmp_path, ranks(4, reading(2, seed=4), dp=4)[0])


def test_a_loader_of_which_only_its_own_rank_knows_what_it_saw_is_refused(tmp_path: Path) -> None:
    save(tmp_path, ranks(2, lambda r, p: TrainingState(Holder(w=torch.ones(1)), dataloader=[1, 2, 3]), dp=2))
    with pytest.raises(LayoutMismatchError, match="shared by 2 data-parallel ranks, here by 1"):
        load(tmp_path, ranks(1, lambda r, p: TrainingState(Holder(w=torch.ones(1)), dataloader=[1, 2, 3]))[0])


def test_ranks_that_had_drawn_unequally_are_refused(tmp_path: Path) -> None:
    states = ranks(2, reading(4), dp=2)
    drawn(states[:1], 1)
    save(tmp_path, states)
    with pytest.raises(LayoutMismatchError, match="had not drawn equally many batches"):
        load(tmp_path, ranks(1, reading(8))[0])


# -- hostile saves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [{"tp": 2}, {**ParallelLayout.default(0, 2).to_dict(), "tp": "2"}, 5, {"tp": -1}])
def test_a_layout_that_cannot_be_is_a_corrupt_copy(tmp_path: Path, layout: Any) -> None:
    states = ranks(2, lambda r, p: TrainingState(Holder(w=torch.ones(1))), dp=2)
    for state in states:
        state.collect = _lying_about(state, layout)  # type: ignore[method-assign]
    save(tmp_path, states)
    with pytest.raises(CorruptCopyError, match="layout in the save"):
        load(tmp_path, ranks(1, lambda r, p: TrainingState(Holder(w=torch.ones(1))))[0])


def _lying_about(state: TrainingState, layout: Any) -> Any:
    found = state.collect()
    values = without_parts(found.values, ["layout"])[:-1] + b',"layout":' + encode({"x": layout})[0][5:]
    return lambda *_: type(found)(found.items, values)
