"""How a checkpoint is written so that torch.distributed.checkpoint reads it, without a process group of torch's.

    1. agree   which tensors of the model and the optimizer that ranks give as their own get their plain name: from the
               only rank that has it, or (the model's) from the lowest of several
    2. write   every rank its files in sub-folders and its `__R_0.distcp`: one `torch.save` archive after the other,
               hashed as they pass, fsynced; rank 0 also what the format keeps for other programs
    3. gather  what every rank wrote, as JSON (with `ckpt_assume_constant_structure` only what can have changed)
    4. finish  rank 0 checks that the parts fit, and writes `.metadata` and the small files, `integrity.json` last
    5. share   how rank 0 fared

A rank that fails says so in the next exchange, so that all raise together and nobody waits.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from resilience.formats.collective import exchange, on_first
from resilience.formats.dcp_assemble import WrittenFile, WrittenObject, WrittenTensor, assemble
from resilience.formats.dcp_dialect import Beside, Dialect, NestedPath
from resilience.formats.dcp_metadata import METADATA
from resilience.formats.folder_files import Backend, Written, agree_on_save, write_own_files, write_small_files
from resilience.formats.kept_plan import KeptPlan, brief_of
from resilience.formats.keys import rank_key, stored_key
from resilience.formats.protocol import Chunk, RankShare, SaveMeta
from resilience.formats.rank_object import own_object
from resilience.formats.read_ahead import read_ahead
from resilience.formats.torch_archive import archive_of_one, as_own_storage, saved_bytes
from resilience.replication.communicator import Agreements
from resilience.stores.filesystem import FileSystem

__all__ = ["TORCH_DIST", "write_checkpoint"]

TORCH_DIST = Dialect(Backend("torch_dist"), stored_key, keeps_objects=True)


def write_checkpoint(
    folder: Path,
    share: RankShare,
    meta: SaveMeta,
    agreements: Agreements,
    fs: FileSystem,
    dialect: Dialect = TORCH_DIST,
    kept: KeptPlan | None = None,
) -> None:
    """See `CheckpointFormat.save`. Collective over `agreements`. `kept`: of a series whose structure stays the same."""
    alone, shared = agree_on_save(share, meta, agreements)
    beside: dict[NestedPath, Any] = {}

    data: list[WrittenFile] = []

    def write() -> dict[str, Any]:
        own = write_own_files(folder, share, fs)
        beside.update(dialect.beside(share, meta) if agreements.rank == 0 else {})
        data.append(_RankFile(meta, agreements.rank, alone, shared, beside, share, dialect).write(folder, fs))
        told = data[0].to_json() if kept is None else brief_of(data[0])
        return {"own": {name: one.to_json() for name, one in own.items()}, "data": told}

    answers = exchange(agreements, write, "write")
    briefs = [answer["data"] for answer in answers]
    if kept is not None and not kept.knows(briefs):
        told = exchange(agreements, data[0].to_json, "plan")
        kept.remember(briefs, [WrittenFile.from_json(one) for one in told] if agreements.rank == 0 else ())

    def finish() -> None:
        ranks = kept.files(briefs) if kept else [WrittenFile.from_json(one) for one in briefs]
        own = {name: Written(**one) for answer in answers for name, one in answer["own"].items()}
        _finish(folder, ranks, own, share, meta, fs, dialect, beside, kept.plan(briefs) if kept else None)

    on_first(agreements, finish)


def _joined(path: NestedPath) -> str:
    """As DCP names what it finds in a nested dictionary."""
    return ".".join(map(str, path))


def _has_bytes(chunk: Chunk) -> bool:
    """Whether it must be stored. An empty part of a tensor would share its offset with the part that follows it."""
    return 0 not in chunk.sizes or 0 in chunk.global_shape


class _RankFile:
    """One rank's `__R_0.distcp`: objects go first, as Megatron Core has them (what it has alone is one), then tensors.

    The bytes are made and hashed in a thread of their own, a little ahead of their writing; where everything lies and
    their digest are known afterwards.
    """

    def __init__(
        self,
        meta: SaveMeta,
        rank: int,
        alone: Sequence[Chunk],
        shared: Sequence[Chunk],
        beside: Beside,
        share: RankShare,
        dialect: Dialect,
    ) -> None:
        self._name = f"__{rank}_0.distcp"
        self._own_key = rank_key(rank, meta.world_size)
        self._alone = alone
        self._shared = shared
        self._beside = beside
        self._share = share
        self._stored_key = dialect.stored_key
        self._keeps_objects = dialect.keeps_objects
        self._nbytes = 0
        self._digest = hashlib.sha256()
        self._tensors: list[WrittenTensor] = []
        self._objects: list[WrittenObject] = []

    def write(self, folder: Path, fs: FileSystem) -> WrittenFile:
        """Once."""
        with read_ahead(self._pieces()) as pieces:
            fs.write_file(folder / self._name, pieces)
        aliases = {self._stored_key(alias): self._stored_key(path) for alias, path in self._share.aliases.items()}
        return WrittenFile(
            self._name, self._nbytes, self._digest.hexdigest(), tuple(self._tensors), tuple(self._objects), aliases
        )

    def _pieces(self) -> Iterator[memoryview]:
        if self._share.values:
            yield from self._object(self._own_key, own_object(self._alone, self._share))
        for key, stored in self._share.objects.items() if self._keeps_objects else ():
            yield from self._object(key, [memoryview(saved_bytes([stored]))])
        made: dict[int, bytes] = {}  # a hyperparameter is one object, stored for each of a group's parameters
        for path, stored in self._beside.items():
            if isinstance(stored, torch.Tensor):
                continue
            if id(stored) not in made:
                made[id(stored)] = saved_bytes(stored)
            yield from self._object(_joined(path), [memoryview(made[id(stored)])])
        for path, stored in self._beside.items():
            if isinstance(stored, torch.Tensor):
                yield from self._tensor(_joined(path), stored, tuple(stored.shape), (0,) * stored.dim())
        for chunk in self._shared:
            if _has_bytes(chunk):
                key = self._stored_key(chunk.key)
                yield from self._tensor(key, chunk.tensor, tuple(chunk.global_shape), tuple(chunk.offsets))

    def _object(self, key: str, pieces: Sequence[memoryview]) -> Iterator[memoryview]:
        start = self._nbytes
        yield from self._passing(pieces)
        self._objects.append(WrittenObject(key, start, self._nbytes - start))

    def _tensor(
        self, key: str, given: torch.Tensor, global_shape: tuple[int, ...], offsets: tuple[int, ...]
    ) -> Iterator[memoryview]:
        tensor = as_own_storage(given)
        start = self._nbytes
        yield from self._passing(archive_of_one(tensor))
        dtype, nbytes = str(tensor.dtype).removeprefix("torch."), self._nbytes - start
        self._tensors.append(WrittenTensor(key, dtype, global_shape, offsets, tuple(tensor.shape), start, nbytes))

    def _passing(self, pieces: Sequence[memoryview]) -> Iterator[memoryview]:
        for piece in pieces:
            self._digest.update(piece)
            self._nbytes += len(piece)
            yield piece


def _finish(
    folder: Path,
    ranks: Sequence[WrittenFile],
    own: Mapping[str, Written],
    share: RankShare,
    meta: SaveMeta,
    fs: FileSystem,
    dialect: Dialect,
    beside: Beside,
    plan: Callable[[Sequence[WrittenFile]], Metadata] | None,
) -> None:
    written = {**own, **{rank.file: Written(rank.file_bytes, rank.sha256) for rank in ranks}}
    save_id, paths = f"{meta.save.folder}-{meta.iteration}", {_joined(path): path for path in beside}
    inner = dialect.nested_path
    metadata = assemble(ranks, save_id, inner and (lambda key: paths[key] if key in paths else inner(key)), plan)
    write_small_files(folder, dialect.backend, written, share, meta, fs, {METADATA: pickle.dumps(metadata)})
