"""How a checkpoint is written so that torch.distributed.checkpoint reads it, without a process group of torch's.

    1. agree   which tensors of the model and the optimizer that ranks give as their own get their plain name: from the
               only rank that has it, or (the model's) from the lowest of several
    2. write   every rank its files in sub-folders and its `__R_0.distcp`: one `torch.save` archive after the other,
               hashed as they pass, fsynced
    3. gather  what every rank wrote, as JSON
    4. finish  rank 0 checks that the parts fit, and writes `.metadata` and the small files, `integrity.json` last
    5. share   how rank 0 fared

A rank that fails says so in the next exchange, so that all raise together and nobody waits.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from resilience.formats.collective import exchange, on_first
from resilience.formats.dcp_assemble import WrittenFile, WrittenTensor, assemble
from resilience.formats.dcp_metadata import METADATA
from resilience.formats.folder_files import Backend, Written, agree_on_save, write_own_files, write_small_files
from resilience.formats.keys import rank_key, stored_key
from resilience.formats.protocol import Chunk, RankShare, SaveMeta
from resilience.formats.torch_archive import archive_of, as_own_storage
from resilience.replication.communicator import Agreements
from resilience.stores.filesystem import FileSystem

__all__ = ["write_checkpoint"]

BACKEND = Backend("torch_dist")


def write_checkpoint(folder: Path, share: RankShare, meta: SaveMeta, agreements: Agreements, fs: FileSystem) -> None:
    """See `CheckpointFormat.save`. Collective over `agreements`."""
    plain = agree_on_save(share, meta, agreements)
    alone = [chunk for chunk in share.chunks if chunk.per_rank and plain.get(chunk.key) != "only"]
    shared = [chunk for chunk in share.chunks if not chunk.per_rank or chunk.key in plain]
    file = _RankFile(meta, agreements.rank, alone, shared, share.values, share.aliases)

    def write() -> dict[str, Any]:
        own = write_own_files(folder, share, fs)
        return {"own": {name: one.to_json() for name, one in own.items()}, "data": file.write(folder, fs).to_json()}

    answers = exchange(agreements, write, "write")
    on_first(agreements, lambda: _finish(folder, answers, share, meta, fs))


def _has_bytes(chunk: Chunk) -> bool:
    """Whether it must be stored. An empty part of a tensor would share its offset with the part that follows it."""
    return 0 not in chunk.tensor.shape or 0 in chunk.global_shape


class _RankFile:
    """One rank's `__R_0.distcp`: what it has alone (objects go first, as Megatron Core has them), then its tensors.

    The bytes are made as they are asked for; where everything lies and their digest are known afterwards.
    """

    def __init__(
        self,
        meta: SaveMeta,
        rank: int,
        alone: Sequence[Chunk],
        shared: Sequence[Chunk],
        values: bytes,
        aliases: Mapping[str, str],
    ) -> None:
        self._name = f"__{rank}_0.distcp"
        self._object_key = rank_key(rank, meta.world_size)
        self._alone = alone
        self._shared = shared
        self._values = values
        self._aliases = aliases
        self._nbytes = 0
        self._digest = hashlib.sha256()
        self._tensors: list[WrittenTensor] = []
        self._object_nbytes = 0

    def write(self, folder: Path, fs: FileSystem) -> WrittenFile:
        """Once."""
        fs.write_file(folder / self._name, self._pieces())
        tensors, digest = tuple(self._tensors), self._digest.hexdigest()
        return WrittenFile(
            self._name, self._nbytes, digest, tensors, self._object_key, self._object_nbytes, dict(self._aliases)
        )

    def _pieces(self) -> Iterator[memoryview]:
        yield from self._passing(self._object())
        self._object_nbytes = self._nbytes
        for chunk in self._shared:
            if not _has_bytes(chunk):
                continue
            tensor = as_own_storage(chunk.tensor)
            start = self._nbytes
            yield from self._passing(archive_of(tensor, [tensor]))
            self._tensors.append(
                WrittenTensor(
                    stored_key(chunk.key),
                    str(tensor.dtype).removeprefix("torch."),
                    tuple(chunk.global_shape),
                    tuple(chunk.offsets),
                    tuple(tensor.shape),
                    start,
                    self._nbytes - start,
                )
            )

    def _object(self) -> list[memoryview]:
        """A list of one: the form in which Megatron Core stores objects. Text, because a safe loader takes no bytes."""
        own = {chunk.key: as_own_storage(chunk.tensor) for chunk in self._alone}
        named = own | {alias: own[key] for alias, key in self._aliases.items() if key in own}
        return archive_of([{"values": self._values.decode(), "tensors": named}], own.values())

    def _passing(self, pieces: Sequence[memoryview]) -> Iterator[memoryview]:
        for piece in pieces:
            self._digest.update(piece)
            self._nbytes += len(piece)
            yield piece


def _finish(
    folder: Path, answers: Sequence[Mapping[str, Any]], share: RankShare, meta: SaveMeta, fs: FileSystem
) -> None:
    ranks = [WrittenFile.from_json(answer["data"]) for answer in answers]
    written = {rank.file: Written(rank.file_bytes, rank.sha256) for rank in ranks}
    written |= {name: Written(**one) for answer in answers for name, one in answer["own"].items()}
    metadata = pickle.dumps(assemble(ranks, f"{meta.save.folder}-{meta.iteration}"))
    write_small_files(folder, BACKEND, written, share, meta, fs, {METADATA: metadata})
