"""How ranks share one order of an epoch's samples, and how others go on with it where they were, to the sample.

Known of torch's DataLoader over a DistributedSampler: of `replicas` ranks, rank r takes the samples r, r + replicas, …
of one order that all ranks make alike, `batch` at a time. So after d steps the first d × batch × replicas samples of
that order were seen, and no others. Another number of ranks shares out those that follow, in the same order: what was
seen is not seen again in this epoch, and nothing is left out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, Sampler

__all__ = ["RestOfEpoch", "moved_place", "sharing_of"]


def sharing_of(loader: Any, skipped: int = 0) -> dict[str, Any] | None:
    """What a save says of it; None where it is not known how samples are shared.

    `skipped`: samples of this epoch that were seen before these ranks shared out the rest of it.
    """
    sampler = getattr(loader, "sampler", None)
    if type(loader) is not DataLoader or type(sampler) is not DistributedSampler:
        return None
    if loader.batch_size is None or type(loader.batch_sampler) is not BatchSampler:
        return None
    return {
        "samples": len(sampler.dataset),  # type: ignore[arg-type]  # it has asked for the length itself
        "replicas": sampler.num_replicas,
        "batch": loader.batch_size,
        "shuffle": sampler.shuffle,
        "seed": sampler.seed,
        "skipped": skipped,
        "batches": _batches(loader, sampler, skipped),
    }


def moved_place(saved: Mapping[str, Any], loader: Any, full_epoch: int) -> dict[str, Any] | str:
    """The entries of a saved place that change where another number of ranks share the data, or why there is none.

    `full_epoch`: batches of a whole epoch here. Draws nothing.
    """
    before, now = saved.get("sharing"), sharing_of(loader)
    if before is None or now is None:
        return "only of a DataLoader with torch's DistributedSampler is known which samples were seen by all"
    if any(before[name] != now[name] for name in ("samples", "seed", "shuffle")):
        return f"it goes over its samples in another order ({before}, here {now})"
    drawn = saved["drawn_in_epoch"]
    seen = before.get("skipped", 0) + drawn * before["batch"] * before["replicas"]
    at_once = now["batch"] * now["replicas"]
    over = drawn == before.get("batches", saved["batches_per_epoch"]) or seen >= now["samples"]
    rest = 0 if over else _batches(loader, loader.sampler, seen)
    if rest and seen % at_once:
        here = {"drawn_in_epoch": 0, "sharing": sharing_of(loader, seen)}
    else:  # a place that whole steps of here come to as well
        batches = full_epoch if not rest else min(seen // at_once, full_epoch)
        here = {"drawn_in_epoch": batches, "sharing": now}
    return {"drawn": saved["drawn"], "batches_per_epoch": full_epoch, **here}


class RestOfEpoch(Sampler[int]):
    """Takes the place of a DistributedSampler for what is left of an epoch of which `skipped` samples were seen.

    Padded, or cut, to equally many samples per rank as the sampler itself would do with a whole epoch.
    """

    def __init__(self, sampler: DistributedSampler[Any], skipped: int) -> None:
        self._sampler = sampler
        self._skipped = skipped

    def __len__(self) -> int:
        return _per_rank(self._sampler, self._skipped)

    def __iter__(self) -> Iterator[int]:
        sampler, count = self._sampler, len(self) * self._sampler.num_replicas
        order = _order(sampler)
        rest = order[self._skipped :]
        while len(rest) < count:
            rest += order[: count - len(rest)]
        return iter(rest[sampler.rank : count : sampler.num_replicas])


def _order(sampler: DistributedSampler[Any]) -> list[int]:
    """The samples of the sampler's present epoch, as all ranks together see them."""
    alone = copy.copy(sampler)
    alone.num_replicas, alone.rank, alone.drop_last = 1, 0, False
    alone.num_samples = alone.total_size = len(sampler.dataset)  # type: ignore[arg-type]
    return list(iter(alone))


def _per_rank(sampler: DistributedSampler[Any], skipped: int) -> int:
    left = len(sampler.dataset) - skipped  # type: ignore[arg-type]
    return left // sampler.num_replicas if sampler.drop_last else -(-left // sampler.num_replicas)


def _batches(loader: DataLoader[Any], sampler: DistributedSampler[Any], skipped: int) -> int:
    """Of each rank, in what is left of an epoch."""
    count, batch = _per_rank(sampler, skipped), loader.batch_size or 1
    return count // batch if loader.drop_last else -(-count // batch)
