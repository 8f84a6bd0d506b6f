"""Several ranks in one process, one thread each, and the checkpoints that they write."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from resilience.formats.protocol import Chunk, RankShare, SaveMeta
from resilience.formats.registry import checkpoint_format
from resilience.stores.filesystem import FileSystem, PosixFileSystem
from resilience.testing.ranks import on_all_ranks

RUN = "run-a"
ATTEMPT = "3f9ac01b" + "0" * 24


def meta(iteration: int = 7, world_size: int = 1, **fields: Any) -> SaveMeta:
    standard = {"run_id": RUN, "attempt": ATTEMPT, "generation": 2, "base": None, "fork": None}
    return SaveMeta(iteration=iteration, world_size=world_size, **{**standard, **fields})


def whole(key: str, tensor: torch.Tensor, *, per_rank: bool = False) -> Chunk:
    return Chunk(key, tensor, tuple(tensor.shape), (0,) * tensor.dim(), per_rank)


def rows(key: str, tensor: torch.Tensor, start: int, stop: int) -> Chunk:
    return Chunk(key, tensor[start:stop], tuple(tensor.shape), (start, *(0,) * (tensor.dim() - 1)), False)


def save(
    folder: Path,
    chunks_of: Callable[[int], Sequence[Chunk]],
    *,
    world_size: int = 1,
    iteration: int = 7,
    values: Callable[[int], bytes] = lambda rank: json.dumps({"rank": rank}).encode(),
    aliases: dict[str, str] | None = None,
    files: dict[int, dict[str, bytes]] | None = None,
    fs: FileSystem | None = None,
    form: str = "torch_dist",
    common: Mapping[str, Any] | None = None,
    **fields: Any,
) -> None:
    """Write a checkpoint of `world_size` ranks into `folder`; raises what rank 0 raised."""
    folder.mkdir(parents=True, exist_ok=True)
    about = meta(iteration, world_size, **fields)
    outcomes = on_all_ranks(
        world_size,
        lambda agreements: checkpoint_format(form).save(
            folder,
            RankShare(
                chunks_of(agreements.rank),
                values(agreements.rank),
                aliases or {},
                (files or {}).get(agreements.rank, {}),
                common or {},
            ),
            about,
            agreements,
            fs or PosixFileSystem(),
        ),
    )
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


def arena_of(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same tensors as views into one buffer, as a snapshot has them."""
    nbytes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    arena = torch.zeros(sum(nbytes) + 64, dtype=torch.uint8)
    views, start = [], 0
    for tensor, size in zip(tensors, nbytes, strict=True):
        view = arena[start : start + size].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor)
        views.append(view)
        start += size
    return views
