"""How a checkpoint is written so that torch.distributed.checkpoint reads it, without a process group of torch's.

    1. agree   which tensors of the model and the optimizer that ranks give as their own get their plain name: from the
               only rank that has it, or (the model's) from the lowest of several
    2. write   every rank its own `__R_0.distcp`: one `torch.save` archive after the other, hashed as they pass, fsynced
    3. gather  what every rank wrote, as JSON
    4. finish  rank 0 checks that the parts fit, and writes `.metadata` and the small files, `integrity.json` last
    5. share   how rank 0 fared

A rank that fails says so in the next exchange, so that all raise together and nobody waits.
"""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from resilience.errors import LayoutMismatchError, SaveFailedError
from resilience.formats.collective import exchange, on_first
from resilience.formats.dcp_assemble import WrittenFile, WrittenTensor, assemble
from resilience.formats.dcp_metadata import METADATA
from resilience.formats.directory import COMMON, INTEGRITY, MARKER, RUN_CONFIG, encode_integrity, encode_run_config
from resilience.formats.keys import MODEL_PREFIX, OPTIMIZER_PREFIX, rank_key, stored_key
from resilience.formats.protocol import Chunk, SaveMeta
from resilience.formats.torch_archive import archive_of, as_own_storage, saved_bytes
from resilience.replication.communicator import Agreements
from resilience.stores.filesystem import FileSystem
from resilience.stores.shared_records import RECORD_NAME, FolderRecord, encode_folder
from resilience.stores.trackers import TRAIN_STATE

__all__ = ["write_checkpoint"]

_INT32_MAX = 2**31 - 1


def write_checkpoint(
    folder: Path,
    chunks: Sequence[Chunk],
    values: bytes,
    aliases: Mapping[str, str],
    meta: SaveMeta,
    agreements: Agreements,
    fs: FileSystem,
) -> None:
    """See `CheckpointFormat.save`. Collective over `agreements`."""
    prepared = exchange(agreements, lambda: _prepare(chunks, meta, agreements.size), "prepare")
    if any(answer["save"] != prepared[0]["save"] for answer in prepared):
        raise SaveFailedError(f"Ranks save different things: {[answer['save'] for answer in prepared][:8]}.")
    plain = _plain_names([answer["alone"] for answer in prepared], agreements.rank)
    alone = [chunk for chunk in chunks if chunk.per_rank and plain.get(chunk.key) != "only"]
    shared = [chunk for chunk in chunks if not chunk.per_rank or chunk.key in plain]
    file = _RankFile(meta, agreements.rank, alone, shared, values, aliases)
    written = exchange(agreements, lambda: file.write(folder, fs).to_json(), "write")
    on_first(agreements, lambda: _finish(folder, [WrittenFile.from_json(answer) for answer in written], meta, fs))


def _prepare(chunks: Sequence[Chunk], meta: SaveMeta, size: int) -> dict[str, Any]:
    if meta.world_size != size:
        raise LayoutMismatchError(f"The save is of {meta.world_size} ranks, and {size} take part.")
    alone = [chunk.key for chunk in chunks if chunk.per_rank and chunk.key.startswith((MODEL_PREFIX, OPTIMIZER_PREFIX))]
    return {"save": [meta.iteration, meta.generation, meta.attempt], "alone": alone}


def _plain_names(own_keys: Sequence[Sequence[str]], rank: int) -> dict[str, str]:
    """The tensors of its own that `rank` writes under their plain names: as the "only" holder, or as the "first"."""
    holders: dict[str, list[int]] = {}
    for holder, keys in enumerate(own_keys):
        for key in keys:
            holders.setdefault(key, []).append(holder)
    return {
        key: "only" if len(having) == 1 else "first"
        for key, having in holders.items()
        if having[0] == rank and (len(having) == 1 or key.startswith(MODEL_PREFIX))
    }


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


def _finish(folder: Path, ranks: Sequence[WrittenFile], meta: SaveMeta, fs: FileSystem) -> None:
    small = {
        METADATA: pickle.dumps(assemble(ranks, f"{meta.save.folder}-{meta.iteration}")),
        COMMON: saved_bytes(_common(meta)),
        MARKER: json.dumps(_MARKER).encode(),
        TRAIN_STATE: saved_bytes(_train_state(meta)),
        RUN_CONFIG: encode_run_config(meta.run_config, save_optim=meta.save_optim, save_rng=meta.save_rng),
    }
    lengths = {written.file: written.file_bytes for written in ranks}
    lengths |= {name: len(content) for name, content in small.items()}
    record = FolderRecord(meta.run_id, meta.save, meta.world_size, "torch_dist", lengths, meta.base, meta.fork)
    small[RECORD_NAME] = encode_folder(record)
    digests = {written.file: written.sha256 for written in ranks}
    digests |= {name: hashlib.sha256(content).hexdigest() for name, content in small.items()}
    small[INTEGRITY] = encode_integrity(digests)
    for name, content in small.items():
        fs.write_file(folder / name, iter([memoryview(content)]))


#: Megatron Core 0.16 takes every key as an argument of a constructor: no other may stand here.
_MARKER = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def _common(meta: SaveMeta) -> dict[str, Any]:
    content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    return {"checkpoint_version": 3.0, "iteration": meta.iteration, "content_metadata": content}


def _train_state(meta: SaveMeta) -> dict[str, torch.Tensor]:
    """Megatron Bridge's counters in its dtypes; an integer that int32 cannot hold goes as int64."""
    given = {**meta.train_state, "step": meta.iteration}
    state: dict[str, torch.Tensor] = {}
    for name in ("step", "consumed_train_samples", "skipped_train_samples", "consumed_valid_samples"):
        count = int(given.get(name, 0))
        state[name] = torch.tensor(count, dtype=torch.int32 if abs(count) <= _INT32_MAX else torch.int64)
    flops = float(given.get("floating_point_operations_so_far", 0.0))
    state["floating_point_operations_so_far"] = torch.tensor(flops, dtype=torch.float32)
    for name in ("do_train", "do_valid", "do_test"):
        state[name] = torch.tensor(bool(given.get(name, False)))
    return state
