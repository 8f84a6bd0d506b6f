"""A cursor finds its place in the data again: the batches after a resume are those that would have come."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from resilience.errors import ConfigError, LayoutMismatchError
from resilience.state import decode, encode, rng
from resilience.state.dataloader import LoaderCursor


class Squares(Dataset[torch.Tensor]):
    def __init__(self, count: int = 10) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index), torch.rand(()).item(), random.random(), np.random.rand()])


class Stream(IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return (torch.tensor(float(index)) for index in range(7))


class Stateful:
    """A loader that keeps its own place, as torchdata's StatefulDataLoader does."""

    def __init__(self, count: int = 5) -> None:
        self.count, self.at, self.order, self.loads = count, 0, list(range(count)), 0

    def __iter__(self) -> Iterator[int]:
        if not self.at:
            self.order = torch.randperm(self.count).tolist()
        while self.at < self.count:
            self.at += 1
            yield self.order[self.at - 1]
        self.at = 0

    def state_dict(self) -> dict[str, Any]:
        return {"at": self.at, "order": list(self.order)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.at, self.order, self.loads = state["at"], state["order"], self.loads + 1


class StatefulWithWorkers(Stateful):
    num_workers = 1


class PairSampler:
    """A batch sampler of one's own around a sampler with epochs."""

    def __init__(self, sampler: Any) -> None:
        self.sampler, self.epochs = sampler, []

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(BatchSampler(self.sampler, 2, drop_last=False))

    def __len__(self) -> int:
        return (len(self.sampler) + 1) // 2


def generator(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


LOADERS: dict[str, Any] = {
    "sequential": lambda: DataLoader(Squares(), batch_size=3),
    "shuffled": lambda: DataLoader(Squares(), batch_size=3, shuffle=True),
    "with a generator": lambda: DataLoader(Squares(), batch_size=3, shuffle=True, generator=generator()),
    "with replacement": lambda: DataLoader(
        Squares(),
        batch_size=3,
        sampler=RandomSampler(Squares(), replacement=True, num_samples=40, generator=generator()),
    ),
    "weighted": lambda: DataLoader(Squares(), batch_size=3, sampler=WeightedRandomSampler([1.0] * 10, 10)),
    "subset": lambda: DataLoader(Squares(), batch_size=3, sampler=SubsetRandomSampler(range(4, 9), generator())),
    "distributed": lambda: DataLoader(
        Squares(), batch_size=2, sampler=DistributedSampler(Squares(), num_replicas=2, rank=1, seed=3)
    ),
    "own batch sampler": lambda: DataLoader(
        Squares(), batch_sampler=PairSampler(DistributedSampler(Squares(), num_replicas=2, rank=0))
    ),
    "stream": lambda: DataLoader(Stream(), batch_size=2),
    "unbatched": lambda: DataLoader(Squares(), batch_size=None, shuffle=True),
    "list": lambda: [torch.tensor(float(index)) for index in range(4)],
    "stateful": Stateful,
}


def through_a_save(state: Any) -> Any:
    values, tensors = encode(state)
    found = {key: tensor.clone() for key, tensor in tensors}
    return decode(values, found.__getitem__)


def seeded(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def training_draws() -> None:
    """What the training does between two batches: draws of its own from the global generators."""
    torch.rand(3)
    random.random()
    np.random.rand()


def drawn(cursor: LoaderCursor, count: int) -> list[Any]:
    batches = []
    for _ in range(count):
        batches.append(cursor.next_batch())
        training_draws()
    return batches


def same_batches(left: list[Any], right: list[Any]) -> bool:
    return all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(left, right, strict=True))


def check_resume(build: Any, before: int, after: int) -> None:
    seeded(0)
    undisturbed = drawn(LoaderCursor(build()), before + after)
    seeded(0)
    stopped = LoaderCursor(build())
    drawn(stopped, before)
    place, random_state = through_a_save([stopped.state_dict(), rng.capture()])
    seeded(1)
    resumed = LoaderCursor(build())
    training_draws()
    assert resumed.differences(place) == []
    resumed.load_state_dict(place)
    rng.restore(random_state)
    assert resumed.position() == before
    assert same_batches(drawn(resumed, after), undisturbed[before:])
    assert resumed.position() == before + after


@pytest.mark.parametrize("name", LOADERS)
@given(st.integers(0, 11))
def test_the_batches_after_a_resume_are_those_that_would_have_come(name: str, before: int) -> None:
    check_resume(LOADERS[name], before, 9)


@pytest.mark.parametrize("before", [0, 2, 5])
def test_the_batches_after_a_resume_are_right_with_workers(before: int) -> None:
    check_resume(lambda: DataLoader(Squares(), batch_size=2, shuffle=True, num_workers=1), before, 4)


def test_an_epoch_that_is_shuffled_anew_is_another_one() -> None:
    cursor = LoaderCursor(LOADERS["distributed"]())
    first, second = drawn(cursor, 3), drawn(cursor, 3)
    assert not same_batches(first[:2], second[:2])


def test_samplers_are_told_the_epoch_that_begins() -> None:
    loader = LOADERS["own batch sampler"]()
    drawn(LoaderCursor(loader), 8)
    assert loader.batch_sampler.epochs == [0, 1, 2]
    assert loader.batch_sampler.sampler.epoch == 2


def test_a_stateful_loader_is_asked_for_its_own_state_and_not_replayed() -> None:
    cursor = LoaderCursor(Stateful())
    drawn(cursor, 7)
    place = through_a_save(cursor.state_dict())
    assert place["loader"]["at"] == 2
    fresh = Stateful()
    LoaderCursor(fresh).load_state_dict(place)
    assert (fresh.loads, fresh.at) == (1, 2)


def test_a_loader_that_was_not_begun_is_not_begun_by_asking_for_its_state() -> None:
    class Eager(Stateful):
        def state_dict(self) -> dict[str, Any]:
            raise AssertionError("asked")

    place = LoaderCursor(Eager()).state_dict()
    assert place is not None
    assert place["loader"] is None


def test_the_loaders_own_generator_goes_on_over_epochs() -> None:
    build = LOADERS["with a generator"]
    for before in (3, 4, 5, 9):
        check_resume(build, before, 9)
    stopped, shared = LoaderCursor(build()), build()
    drawn(stopped, 5)
    torch.rand(1, generator=stopped.loader.generator)  # somebody else draws from it too
    LoaderCursor(shared).load_state_dict(through_a_save(stopped.state_dict()))
    assert torch.equal(shared.generator.get_state(), stopped.loader.generator.get_state())


def test_a_one_shot_iterator_ends_and_stays_where_it_ended() -> None:
    cursor = LoaderCursor(iter([1, 2, 3]))
    assert [cursor.next_batch() for _ in range(3)] == [1, 2, 3]
    for _ in range(2):
        with pytest.raises(StopIteration):
            cursor.next_batch()
    place = cursor.state_dict()
    assert place is not None
    assert (place["epoch"], place["drawn_in_epoch"], cursor.position()) == (0, 3, 3)


def test_a_one_shot_iterator_is_drawn_from_its_start_again() -> None:
    stopped, resumed = LoaderCursor(iter(range(9))), LoaderCursor(iter(range(9)))
    drawn(stopped, 4)
    resumed.load_state_dict(through_a_save(stopped.state_dict()))
    assert resumed.next_batch() == 4


@pytest.mark.parametrize(
    "empty", [[], iter([]), DataLoader(Squares(1), batch_size=2, drop_last=True)], ids=["list", "iterator", "loader"]
)
def test_an_empty_loader_is_an_error_in_words(empty: Any) -> None:
    with pytest.raises(ConfigError, match="gives no batch at all"):
        LoaderCursor(empty).next_batch()


def test_a_loader_that_became_shorter_is_noticed_before_or_while_it_is_replayed() -> None:
    cursor = LoaderCursor(DataLoader(Squares(), batch_size=2))
    drawn(cursor, 4)
    place = cursor.state_dict()
    shorter = LoaderCursor(DataLoader(Squares(4), batch_size=2))
    assert shorter.differences(place) == ["dataloader: saved with 5 batches per epoch, here it has 2"]
    with pytest.raises(LayoutMismatchError, match="ends after 2 batches; 4 of epoch 0"):
        shorter.load_state_dict(place)


def test_another_kind_of_loader_is_a_difference() -> None:
    place = LoaderCursor([1]).state_dict()
    assert LoaderCursor(Stateful()).differences(place) == ["dataloader: saved as replayed, here it is stateful"]
    assert LoaderCursor(None).differences(place) == ["dataloader: saved with a data loader, here none is given"]
    assert LoaderCursor([1]).differences(None) == ["dataloader: saved without a data loader, here one is given"]
    assert LoaderCursor(None).differences(None) == []
    seeded_loader = LoaderCursor(DataLoader([1], generator=generator()))
    assert LoaderCursor(DataLoader([1])).differences(seeded_loader.state_dict()) != []


def test_without_a_loader_there_is_nothing_to_draw_or_keep() -> None:
    cursor = LoaderCursor(None)
    with pytest.raises(StopIteration):
        cursor.next_batch()
    assert (cursor.state_dict(), cursor.position(), cursor.exact) == (None, 0, True)


@pytest.mark.parametrize(
    ("loader", "exact", "says"),
    [
        ([1], True, "draws and drops"),
        (Stateful(), True, "the loader's own"),
        (StatefulWithWorkers(), False, "worker processes draw"),
        (DataLoader(Squares(), sampler=SequentialSampler(Squares())), True, "without memory"),
        (DataLoader(Stream()), False, "IterableDataset"),
        (DataLoader(Squares(), num_workers=1, persistent_workers=True), False, "persistent workers"),
        (iter([1]), False, "cannot be rewound"),
        (type("Own", (), {"__iter__": lambda self: iter([1])})(), False, "Own"),
    ],
)
def test_it_says_how_exact_a_resume_is(loader: Any, exact: bool, says: str) -> None:
    cursor = LoaderCursor(loader)
    assert cursor.exact is exact
    assert says in cursor.exactness


def test_what_cannot_be_iterated_is_refused() -> None:
    with pytest.raises(ConfigError, match="dataloader is a object"):
        LoaderCursor(object())
