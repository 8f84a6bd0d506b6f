"""Where in the data a rank is, and how a fresh process gets to the same place.

A loader that has `state_dict` and `load_state_dict` (torchdata's StatefulDataLoader) is asked for its own state. Any
other is replayed: its epoch is begun again with the random state that it was begun with, and as many batches are drawn
and dropped as had been drawn. How exact that is, `LoaderCursor.exactness` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from resilience.errors import ConfigError, LayoutMismatchError
from resilience.state import rng
from resilience.state.sample_sharing import RestOfEpoch, moved_place, sharing_of


class LoaderCursor:
    """Draws batches from a data loader, epoch after epoch, and knows how many it drew.

    Without a loader (None) there is nothing to draw: `next_batch` raises StopIteration at once.
    """

    def __init__(self, dataloader: Any = None) -> None:
        if dataloader is not None and not hasattr(dataloader, "__iter__"):
            raise ConfigError(
                f"dataloader is a {type(dataloader).__name__}, which cannot be iterated over.",
                advice="Give a torch DataLoader, or any iterable of batches.",
            )
        self.loader = dataloader
        self._iterator: Iterator[Any] | None = None
        self._epoch = 0
        self._drawn = 0  # over all epochs
        self._drawn_in_epoch = 0
        self._start: dict[str, Any] | None = None  # random state with which the epoch was begun
        self._skipped = 0  # samples of this epoch that other ranks had seen when these came to share out the rest
        self._full: int | None = None  # batches of a whole epoch, while only the rest of one is shared out

    @property
    def stateful(self) -> bool:
        """Whether the loader keeps its own state."""
        return callable(getattr(self.loader, "state_dict", None)) and callable(
            getattr(self.loader, "load_state_dict", None)
        )

    @property
    def exact(self) -> bool:
        """Whether a resumed run is known to see the very batches that an undisturbed one would."""
        return self.exactness.startswith("exact")

    @property
    def exactness(self) -> str:
        """In words, how well a resume finds its place: begins with `exact`, or with `not known to be exact` and why."""
        if self.loader is None:
            return "exact: there is no data loader"
        unknown = "not known to be exact: "
        if self.stateful:
            if getattr(self.loader, "num_workers", 0):  # tried with torchdata's: items come back, their noise does not
                return f"{unknown}what worker processes draw at random is no part of the loader's own state"
            return "exact, as far as the loader's own state_dict goes"
        replayed = "; a resume draws and drops the batches of the epoch that were already seen"
        if isinstance(self.loader, DataLoader):
            if isinstance(self.loader.dataset, IterableDataset):
                return f"{unknown}an IterableDataset has to yield the same again{replayed}"
            if self.loader.persistent_workers:
                return f"{unknown}random numbers of persistent workers carry over from epoch to epoch{replayed}"
            return f"exact, for a dataset and a sampler without memory of their own{replayed}"
        if isinstance(self.loader, Iterator):
            return f"{unknown}an iterator cannot be rewound; a resume draws from wherever the one it is given begins"
        if isinstance(self.loader, (list, tuple)):
            return f"exact{replayed}"
        return f"{unknown}iterating over a {type(self.loader).__name__} has to give the same again{replayed}"

    def position(self) -> int:
        """How many batches this rank drew since the run began."""
        return self._drawn

    @property
    def position_in_epoch(self) -> int:
        """The same since its epoch was begun; as many as the epoch has, at its end."""
        return self._drawn_in_epoch

    def next_batch(self) -> Any:
        """The next batch; a loader that can be iterated over again goes on with its next epoch.

        Raises StopIteration when a one-shot iterator is at its end, ConfigError when an epoch has no batch at all.
        """
        if self.loader is None:
            raise StopIteration
        if self._iterator is None:
            self._begin()
        try:
            batch = self._advance()
        except StopIteration:
            batch = self._first_of_next_epoch()
        self._drawn += 1
        self._drawn_in_epoch += 1
        return batch

    def state_dict(self) -> dict[str, Any] | None:
        """Where the next batch would come from; to be taken before it is drawn. None without a loader."""
        if self.loader is None:
            return None
        begun = self._iterator is not None
        return {
            "kind": self._kind,
            "epoch": self._epoch,
            "drawn": self._drawn,
            "drawn_in_epoch": self._drawn_in_epoch,
            "batches_per_epoch": self._full_epoch(),
            "sharing": sharing_of(self.loader, self._skipped),
            "start": self._start if begun else None,
            "generators": [generator.get_state() for generator in self._generators()],
            # A loader that was never begun has no place yet, and asking some for their state begins them.
            "loader": self.loader.state_dict() if begun and self.stateful else None,
        }

    def differences(self, saved: Any) -> list[str]:
        """Why `load_state_dict(saved)` cannot work here, in words; empty when it can. Draws nothing."""
        if not isinstance(saved, dict) or self.loader is None:
            return [] if saved is None and self.loader is None else [_presence(saved)]
        if saved["kind"] != self._kind:
            return [f"dataloader: saved as {saved['kind']}, here it is {self._kind}"]
        found: list[str] = []
        before, now = saved["batches_per_epoch"], self._full_epoch()
        if not self.stateful and None not in (before, now) and before != now:
            found.append(f"dataloader: saved with {before} batches per epoch, here it has {now}")
        if len(saved["generators"]) != len(self._generators()):
            found.append("dataloader: its generators of random numbers are not those that it was saved with")
        return found

    def moved(self, saved: Mapping[str, Any]) -> dict[str, Any] | str:
        """The entries of a saved place that change where another number of ranks share the data, or why there is none.

        The place is exact: behind the same samples of the epoch, none left out and none repeated. Draws nothing.
        """
        return moved_place(saved, self.loader, self._full_epoch() or 0)

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Go to the place that `state_dict` told of. Changes the global random state: restore that one afterwards.

        Raises LayoutMismatchError when the loader ends before the place is reached.
        """
        self._epoch, self._drawn, self._drawn_in_epoch = saved["epoch"], saved["drawn"], 0
        self._iterator = None
        self._share_out((saved.get("sharing") or {}).get("skipped", 0))
        if saved["start"] is not None:
            self._restart(saved)
        for generator, state in zip(self._generators(), saved["generators"], strict=True):
            generator.set_state(state)

    @property
    def _kind(self) -> str:
        return "stateful" if self.stateful else "replayed"

    def _begin(self) -> None:
        """Start the epoch `self._epoch`, remembering the random state that its order follows from."""
        self._set_epoch()
        self._start = {**rng.capture_host(), "generators": [generator.get_state() for generator in self._generators()]}
        self._iterator = iter(self.loader)
        self._drawn_in_epoch = 0

    def _restart(self, saved: dict[str, Any]) -> None:
        """Start a saved epoch again, as it was started, up to the saved place."""
        start, seen = saved["start"], saved["drawn_in_epoch"]
        rng.restore_host(start)
        for generator, state in zip(self._generators(), start["generators"], strict=True):
            generator.set_state(state)
        self._set_epoch()
        if self.stateful:
            self.loader.load_state_dict(saved["loader"])
        self._start = start
        self._iterator = iter(self.loader)
        for drawn in range(0 if self.stateful else seen):
            try:
                self._advance()
            except StopIteration:
                raise LayoutMismatchError(
                    f"The data loader ends after {drawn} batches; {seen} of epoch {self._epoch} had been drawn.",
                    advice="Resume with the data that the run was started with.",
                ) from None
        self._drawn_in_epoch = seen

    def _first_of_next_epoch(self) -> Any:
        one_shot, place = self._iterator is self.loader, (self._epoch, self._drawn_in_epoch, self._start)
        self._epoch += 1
        self._share_out(0)
        self._begin()
        try:
            return self._advance()
        except StopIteration:
            if one_shot and self._drawn:  # it is at its end for good: stay where that was
                self._epoch, self._drawn_in_epoch, self._start = place
                raise
            raise ConfigError(
                "The data loader gives no batch at all.",
                advice="Check its dataset's length, batch_size and drop_last, and the sampler's share of each rank.",
            ) from None

    def _advance(self) -> Any:
        assert self._iterator is not None, "an epoch was begun"
        return next(self._iterator)

    def _share_out(self, skipped: int) -> None:
        """The samples behind the first `skipped` ones of an epoch, in the same order, among the ranks of today."""
        if self._full is not None:
            self.loader.batch_sampler.sampler = self.loader.sampler
        self._skipped, self._full = skipped, None
        if skipped:
            self._full = _length(self.loader)
            self.loader.batch_sampler.sampler = RestOfEpoch(self.loader.sampler, skipped)

    def _full_epoch(self) -> int | None:
        return _length(self.loader) if self._full is None else self._full

    def _set_epoch(self) -> None:
        for part in _parts(self.loader):
            set_epoch = getattr(part, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(self._epoch)

    def _generators(self) -> list[torch.Generator]:
        """The loader's own generators of random numbers: their state lives on from epoch to epoch."""
        found = [getattr(part, "generator", None) for part in (self.loader, *_parts(self.loader))]
        return list({id(each): each for each in found if isinstance(each, torch.Generator)}.values())


def _parts(loader: Any) -> list[Any]:
    """The samplers of a loader, each once: in torch's DataLoader one may stand behind a batch sampler."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    parts = (getattr(loader, "sampler", None), batch_sampler, getattr(batch_sampler, "sampler", None))
    return list({id(part): part for part in parts if part is not None}.values())


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # no length, or an IterableDataset without one
        return None


def _presence(saved: Any) -> str:
    there, here = ("without", "one is given") if saved is None else ("with", "none is given")
    return f"dataloader: saved {there} a data loader, here {here}"
