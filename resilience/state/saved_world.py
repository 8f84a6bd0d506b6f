"""What the ranks of a save knew, each for itself, and where each of them stood; to be asked by another number of ranks.

Nothing here knows of a format: whoever reads one gives the ranks' states and a way to read a whole tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import xxhash

from resilience.errors import CorruptCopyError
from resilience.state.parallel_layout import ParallelLayout
from resilience.state.strict_json import json_of
from resilience.state.tensors import dtype_name, memory_of

__all__ = [
    "OwnState",
    "SavedRank",
    "SavedWorld",
    "StoredWhole",
    "fingerprint",
    "key_of",
    "layout_of",
    "tensor_refs",
    "tree_of",
]


class OwnState(Protocol):
    """What one rank alone knew: the JSON of its tree, and its tensors by key with the fingerprint of each."""

    @property
    def values(self) -> bytes: ...
    @property
    def tensors(self) -> Mapping[str, torch.Tensor]: ...
    @property
    def digests(self) -> Mapping[str, str]: ...


class StoredWhole(Protocol):
    """One tensor that the ranks of the save made up together."""

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def global_shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class SavedRank:
    """One rank of the save. `digests`: of the tensors that it had for itself alone, by key."""

    rank: int
    place: ParallelLayout
    tree: Mapping[str, Any]
    digests: Mapping[str, str]

    def canonical(self, written: Any) -> Any:
        """A piece of the tree in which a tensor of this rank's own is told by its content, not by its name.

        Equal for two ranks exactly if they mean the same.
        """
        if isinstance(written, list):
            return [self.canonical(part) for part in written]
        if not isinstance(written, dict):
            return written
        key = written.get("$tensor", written.get("$array"))
        if isinstance(key, str) and key in self.digests:
            return {**written, next(iter(written)): self.digests[key], "own": True}
        return {name: self.canonical(part) for name, part in written.items()}


class SavedWorld:
    """All ranks of a save. `index`: what is stored of whole tensors, by key; `read_whole` reads one of them."""

    def __init__(
        self,
        world_size: int,
        index: Mapping[str, StoredWhole],
        rank_state: Callable[[int], OwnState | None],
        read_whole: Callable[[str], torch.Tensor],
    ) -> None:
        """Reads every rank's state once; CorruptCopyError if one is not there or makes no sense.

        Tensors are not kept (they may be large), only their digests.
        """
        self.index = index
        self._rank_state = rank_state
        self._read_whole = read_whole
        self._latest: tuple[int, OwnState] | None = None
        self.ranks: Sequence[SavedRank] = [self._rank(rank, world_size) for rank in range(world_size)]
        if any(not each.place.same_sizes(self.layout) for each in self.ranks):
            raise CorruptCopyError("The ranks of the save stood in different layouts.")

    @property
    def layout(self) -> ParallelLayout:
        """The sizes; the places are rank 0's."""
        return self.ranks[0].place

    def alone(self, key: str) -> list[SavedRank]:
        """The ranks that had a tensor of this name for themselves."""
        return [each for each in self.ranks if key in each.digests]

    def tensor(self, rank: SavedRank, key: str) -> torch.Tensor:
        """The whole tensor that stood under `key` on a rank: its own, or what is stored once for all."""
        if key not in rank.digests:
            return self._read_whole(key)
        return self._own(rank.rank).tensors[key]

    def _own(self, rank: int) -> OwnState:
        if self._latest is None or self._latest[0] != rank:
            state = self._rank_state(rank)
            if state is None:
                raise CorruptCopyError(f"The save holds no state of rank {rank}.")
            self._latest = rank, state
        return self._latest[1]

    def _rank(self, rank: int, world_size: int) -> SavedRank:
        state = self._own(rank)
        tree = tree_of(state.values)
        place = layout_of(tree) or ParallelLayout.default(rank, world_size)
        if place.world_size != world_size:
            raise CorruptCopyError(f"Rank {rank} of the save stood in {place.in_words()}, among {world_size} ranks.")
        return SavedRank(rank, place, tree, dict(state.digests))


def tree_of(values: bytes) -> dict[str, Any]:
    """The JSON of a whole training state; CorruptCopyError if it is none."""
    tree = json_of(values)
    if not isinstance(tree, dict) or next(iter(tree), "").startswith("$"):
        raise CorruptCopyError("The values of a save are no tree of a training state.")
    return tree


def layout_of(tree: Mapping[str, Any]) -> ParallelLayout | None:
    """Where the rank with this tree stood; None if it did not say."""
    written = tree.get("layout")
    return None if written is None else ParallelLayout.from_dict(written)


def tensor_refs(written: Any) -> Iterator[dict[str, Any]]:
    """The references to tensors and arrays in a piece of a tree's JSON."""
    if isinstance(written, list):
        for part in written:
            yield from tensor_refs(part)
    elif isinstance(written, dict):
        if isinstance(written.get("$tensor", written.get("$array")), str):
            yield written
        else:
            for part in written.values():
                yield from tensor_refs(part)


def key_of(ref: Mapping[str, Any]) -> str:
    """The key of the item that such a reference means."""
    return str(ref.get("$tensor", ref.get("$array")))


def fingerprint(tensor: torch.Tensor) -> str:
    """Of dtype, shape and bytes."""
    digest = xxhash.xxh3_128(f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}".encode())
    digest.update(memory_of(tensor))
    return digest.hexdigest()
