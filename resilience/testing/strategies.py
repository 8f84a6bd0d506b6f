"""Hypothesis strategies for what formats and file systems are given. Needs hypothesis, which is imported here alone.

@given(checkpoints())
def test_mine_gives_back_what_it_was_given(checkpoint): ...
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from resilience.errors import ResilienceError, StoreError
from resilience.formats.protocol import Chunk, RankShare
from resilience.stores.filesystem import FileSystem
from resilience.testing.formats import DTYPES

__all__ = ["DTYPES", "Checkpoint", "FileOperation", "checkpoints", "file_operations", "perform", "tensors"]


@dataclass(frozen=True)
class Checkpoint:
    """Global tensors by tree path, and of each which rows every rank has (start and stop; a scalar is rank 0's)."""

    world_size: int
    tensors: Mapping[str, torch.Tensor]
    rows: Mapping[str, Sequence[tuple[int, int]]]

    def share(self, rank: int) -> RankShare:
        """What `rank` gives to a save."""
        chunks = [chunk for path in self.tensors for chunk in self._of(path, rank)]
        return RankShare(chunks, json.dumps({"rank": rank}).encode())

    def _of(self, path: str, rank: int) -> list[Chunk]:
        tensor = self.tensors[path]
        shape = tuple(tensor.shape)
        if not shape:
            return [Chunk(path, tensor, (), (), False)] if rank == 0 else []
        start, stop = self.rows[path][rank]
        if start == stop and (rank or shape[0]):
            return []
        return [Chunk(path, tensor[start:stop].contiguous(), shape, (start, *(0,) * (len(shape) - 1)), False)]


@st.composite
def tensors(
    draw: st.DrawFn, dtypes: Sequence[torch.dtype] = DTYPES, max_axes: int = 3, max_length: int = 6
) -> torch.Tensor:
    """Of any bits: infinities, every NaN and subnormal numbers among them; axes may be empty."""
    dtype = draw(st.sampled_from(dtypes))
    shape = draw(st.lists(st.integers(0, max_length), max_size=max_axes))
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        flags = draw(st.lists(st.booleans(), min_size=count, max_size=count))
        return torch.tensor(flags, dtype=torch.bool).reshape(shape)
    nbytes = count * dtype.itemsize
    content = draw(st.binary(min_size=nbytes, max_size=nbytes))
    if not nbytes:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(dtype).reshape(shape)


@st.composite
def checkpoints(draw: st.DrawFn, max_world_size: int = 3, max_tensors: int = 4) -> Checkpoint:
    """Rows are dealt unevenly; ranks may have none."""
    world_size = draw(st.integers(1, max_world_size))
    drawn = draw(st.lists(tensors(), min_size=1, max_size=max_tensors))
    by_path = {f"model/0/layer{number}.weight": tensor for number, tensor in enumerate(drawn)}
    rows = {}
    for path, tensor in by_path.items():
        length = tensor.shape[0] if tensor.dim() else 0
        cuts = sorted(draw(st.lists(st.integers(0, length), min_size=world_size - 1, max_size=world_size - 1)))
        rows[path] = tuple(zip([0, *cuts], [*cuts, length], strict=True))
    return Checkpoint(world_size, by_path, rows)


@dataclass(frozen=True)
class FileOperation:
    """One call, on names of a small directory. `content`: of a write."""

    kind: str
    name: str
    other: str = ""
    content: bytes = b""


_NAMES: Final = st.sampled_from(["a", "b", "d", "d/a", "d/b", "d/e"])


def file_operations(max_size: int = 12) -> SearchStrategy[list[FileOperation]]:
    """Writes, renames and removals that meet each other, over and over."""
    kinds = st.sampled_from(
        ["make_dir", "write", "write_file", "read", "rename", "unlink", "remove_dir", "list", "tree"]
    )
    one = st.builds(FileOperation, kinds, _NAMES, _NAMES, st.binary(max_size=8))
    return st.lists(one, max_size=max_size)


def perform(fs: FileSystem, here: Path, operations: Sequence[FileOperation]) -> list[object]:
    """What each call answered, or the kind of error that it raised: equal on file systems that behave alike."""
    return [_answer(fs, here, operation) for operation in operations]


def _answer(fs: FileSystem, here: Path, operation: FileOperation) -> object:
    path, other = here / operation.name, here / operation.other
    try:
        match operation.kind:
            case "make_dir":
                fs.make_dir(path)
            case "write":
                fs.write_atomic(path, operation.content)
            case "write_file":
                fs.write_file(path, iter([memoryview(operation.content)]))
            case "read":
                return fs.read(path)
            case "rename":
                fs.rename(path, other)
            case "unlink":
                return fs.unlink(path)
            case "remove_dir":
                return fs.remove_dir(path)
            case "list":
                return fs.list_dir(path)
            case "tree":
                fs.remove_tree(path)
    except StoreError:
        return "StoreError"  # which of them is for people
    except (ResilienceError, OSError) as error:
        return type(error).__name__
    return None
