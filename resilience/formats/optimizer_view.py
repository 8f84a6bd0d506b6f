"""A checkpoint seen as the live state has it: optimizer state by parameter, wherever and under which name it is stored.

Other programs keep the state of all their optimizers under one name, main parameters instead of float32 weights, or
everything in flat buckets. The view says under which path each of these is asked for here; what is read is what is
stored, nothing is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from resilience.errors import LayoutMismatchError
from resilience.formats.protocol import RankState, StateReader, StoredTensor, Target
from resilience.planning.bucket_space import Flattened, common_box, runs_of_box
from resilience.stores.shared_records import FolderRecord

__all__ = ["OptimizerView"]


class OptimizerView:
    """`reader` with other paths for some of its tensors; see `StateReader`.

    `renamed`: path here → path there. `flattened`: path here → its place in a bucket. `copies`: path of what is stored
    → that of what has the same content, so that whoever asks for the one need not ask for the other.
    """

    def __init__(
        self,
        reader: StateReader,
        renamed: Mapping[str, str],
        flattened: Mapping[str, Flattened],
        copies: Mapping[str, str] | None = None,
    ) -> None:
        self._reader = reader
        self._renamed = renamed
        self._flattened = flattened
        self._copies = copies or {}

    @property
    def folder(self) -> Path:
        return self._reader.folder

    @property
    def record(self) -> FolderRecord | None:
        return self._reader.record

    @cached_property
    def index(self) -> Mapping[str, StoredTensor]:
        there = self._reader.index
        index = dict(there) | {path: there[stored] for path, stored in self._renamed.items()}
        for path, flat in self._flattened.items():
            index[path] = StoredTensor(there[flat.stored].dtype, flat.global_shape)
        return index

    @property
    def aliases(self) -> Mapping[str, str]:
        return {**self._copies, **self._reader.aliases}

    @property
    def common(self) -> Mapping[str, Any]:
        return self._reader.common

    def stored_path(self, path: str) -> str:
        """The path of the tensor that is read when `path` is asked for."""
        flat = self._flattened.get(path)
        return flat.stored if flat is not None else self._renamed.get(path, path)

    def rank_state(self, rank: int) -> RankState | None:
        return self._reader.rank_state(rank)

    @property
    def objects(self) -> Collection[str]:
        return self._reader.objects

    def read_object(self, key: str) -> Any:
        return self._reader.read_object(key)

    def read(self, targets: Sequence[Target]) -> None:
        there: list[Target] = []
        afterwards: list[Callable[[], object]] = []
        for target in targets:
            there += self._translated(target, afterwards)
        self._reader.read(there)
        for put in afterwards:
            put()

    def close(self) -> None:
        self._reader.close()

    def _translated(self, target: Target, afterwards: list[Callable[[], object]]) -> Iterator[Target]:
        flat = self._flattened.get(target.key)
        if flat is None:
            yield Target(self.stored_path(target.key), target.out, target.offsets, target.global_shape)
            return
        if target.global_shape not in (None, flat.global_shape):
            raise LayoutMismatchError(
                f"{target.key} has shape {flat.global_shape} in {self.folder}; asked for is {target.global_shape}."
            )
        length = self._reader.index[flat.stored].global_shape
        found = 0
        for block in flat.blocks:
            common = common_box(block, target.offsets, tuple(target.out.shape))
            if common is None:
                continue
            inside, local, sizes = common
            found += math.prod(sizes)
            region = target.out
            for axis, (first, count) in enumerate(zip(inside, sizes, strict=True)):
                region = region.narrow(axis, first, count)
            staged = region if region.is_contiguous() else torch.empty(sizes, dtype=target.out.dtype)
            elements = staged.view(-1)
            for run in runs_of_box(flat.shape, local, sizes):
                into = elements[run.at : run.at + run.length]
                yield Target(flat.stored, into, (flat.start + run.start,), length)
            if staged is not region:
                afterwards.append(lambda region=region, staged=staged: region.copy_(staged))  # type: ignore[misc]
        if found != target.out.numel():
            raise LayoutMismatchError(
                f"{target.key} at {target.offsets} is not all in the buckets of this rank's place of tensor and "
                f"pipeline parallelism in {self.folder}."
            )
