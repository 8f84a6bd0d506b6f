"""A folder that all ranks write to and rank 0 makes and clears away."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from benchmarks.rank import Place

__all__ = ["fresh_folder"]


@contextmanager
def fresh_folder(place: Place, name: str) -> Iterator[Path]:
    """Collective. Empty at first, gone afterwards."""
    folder = place.directory / name
    if place.rank == 0:
        folder.mkdir(mode=0o700)
    dist.barrier()
    try:
        yield folder
    finally:
        dist.barrier()
        if place.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        dist.barrier()
