"""The small files that every format puts beside its tensors, and what all ranks agree on before the first is written.

    1. agree_on_save      all ranks write the same save, and which tensors of their own get a plain name
    2. write_own_files    every rank: its files in sub-folders (`dataloader_state/`, and rank 0's `tokenizer/`)
    3. write_small_files  rank 0, after all: `common.pt`, `metadata.json`, `train_state.pt`, `run_config.yaml`, the
                          record, the digests; `integrity.json` last of all

`integrity.json` lists the files directly in the folder, as Megatron Core has it; those in sub-folders stand in
`integrity_nested.json`, which it lists.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from resilience.errors import CorruptCopyError, LayoutMismatchError, SaveFailedError
from resilience.formats.collective import exchange
from resilience.formats.directory import (
    COMMON,
    INTEGRITY,
    MARKER,
    NESTED_INTEGRITY,
    RUN_CONFIG,
    encode_integrity,
    encode_run_config,
)
from resilience.formats.keys import MODEL_PREFIX
from resilience.formats.protocol import Chunk, RankShare, SaveMeta
from resilience.formats.torch_archive import read_archive, saved_bytes
from resilience.replication.communicator import Agreements
from resilience.state.sharding import may_be_cut
from resilience.stores.filesystem import FileSystem
from resilience.stores.inert_pickle import shown
from resilience.stores.shared_records import RECORD_NAME, FolderRecord, encode_folder
from resilience.stores.trackers import TRAIN_STATE

__all__ = [
    "Backend",
    "Written",
    "agree_on_save",
    "common_state",
    "plain_names",
    "read_train_state",
    "write_own_files",
    "write_small_files",
]

_INT32_MAX = 2**31 - 1
_TRAIN_STATE_LIMIT = 1 << 20
_COUNTERS: Mapping[str, type] = {
    "step": int,
    "consumed_train_samples": int,
    "skipped_train_samples": int,
    "consumed_valid_samples": int,
    "floating_point_operations_so_far": float,
    "do_train": bool,
    "do_valid": bool,
    "do_test": bool,
}


@dataclass(frozen=True)
class Backend:
    """A format's name and version. `marked`: it has Megatron Core's `metadata.json` and `common.pt`."""

    name: str
    version: int = 1
    marked: bool = True


@dataclass(frozen=True)
class Written:
    """A file that was written and fsynced, as its writer knows it."""

    nbytes: int
    sha256: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def agree_on_save(share: RankShare, meta: SaveMeta, agreements: Agreements) -> tuple[list[Chunk], list[Chunk]]:
    """This rank's chunks: those that it keeps for itself alone, and those that are written under their plain names.

    One that several ranks have as their own is both on the first of them. Collective. SaveFailedError on all ranks if
    they save different things, or one of them is not ready.
    """
    prepared = exchange(agreements, lambda: _prepare(share.chunks, meta, agreements.size), "prepare")
    if any(answer["save"] != prepared[0]["save"] for answer in prepared):
        raise SaveFailedError(f"Ranks save different things: {[answer['save'] for answer in prepared][:8]}.")
    plain = plain_names([answer["alone"] for answer in prepared])
    mine = {key: only for key, (rank, only) in plain.items() if rank == agreements.rank}
    alone = [chunk for chunk in share.chunks if chunk.per_rank and not mine.get(chunk.key, False)]
    return alone, [chunk for chunk in share.chunks if not chunk.per_rank or chunk.key in mine]


def _prepare(chunks: Sequence[Chunk], meta: SaveMeta, size: int) -> dict[str, Any]:
    if meta.world_size != size:
        raise LayoutMismatchError(f"The save is of {meta.world_size} ranks, and {size} take part.")
    alone = [chunk.key for chunk in chunks if chunk.per_rank and may_be_cut(chunk.key)]
    return {"save": [meta.iteration, meta.generation, meta.attempt], "alone": alone}


def plain_names(own_keys: Sequence[Sequence[str]]) -> dict[str, tuple[int, bool]]:
    """Which tensors that ranks have for themselves get their plain name: from which rank, and whether only it has one.

    From the only rank that has a tensor, or (the model's) from the lowest of several. `own_keys`: by rank.
    """
    holders: dict[str, list[int]] = {}
    for holder, keys in enumerate(own_keys):
        for key in keys:
            holders.setdefault(key, []).append(holder)
    return {
        key: (having[0], len(having) == 1)
        for key, having in holders.items()
        if len(having) == 1 or key.startswith(MODEL_PREFIX)
    }


def write_own_files(folder: Path, share: RankShare, fs: FileSystem) -> dict[str, Written]:
    """This rank's files besides its tensors, fsynced with their folders; by name."""
    written: dict[str, Written] = {}
    for name, content in share.files.items():
        fs.make_dir((folder / name).parent)
        fs.write_file(folder / name, iter([memoryview(content)]))
        written[name] = _written(content)
    inner = {parent for name in written for parent in (folder / name).parents if parent.is_relative_to(folder)}
    for each in sorted(inner - {folder}):
        fs.fsync_dir(each)
    return written


def write_small_files(
    folder: Path,
    backend: Backend,
    written: Mapping[str, Written],
    share: RankShare,
    meta: SaveMeta,
    fs: FileSystem,
    own: Mapping[str, bytes] | None = None,
) -> None:
    """Everything that makes the ranks' data a checkpoint. Rank 0, once every rank has written and fsynced its files.

    `written`: what all ranks wrote, by name relative to the folder (`tokenizer/vocab.txt` may be among them). `own`:
    the format's own small files (`.metadata`), written first. `share` is rank 0's.
    """
    small = dict(own or {})
    if backend.marked:
        small[COMMON] = saved_bytes(common_state(share, meta))
        small[MARKER] = json.dumps(_marker(backend)).encode()
    small[TRAIN_STATE] = saved_bytes(_train_state(meta))
    small[RUN_CONFIG] = encode_run_config(meta)
    nested = {name: file.sha256 for name, file in written.items() if "/" in name}
    if nested:
        small[NESTED_INTEGRITY] = encode_integrity(nested)
    if meta.run_id:
        small[RECORD_NAME] = _record(backend, written, small, meta)
    digests = {name: file.sha256 for name, file in written.items() if "/" not in name}
    digests |= {name: _written(content).sha256 for name, content in small.items()}
    small[INTEGRITY] = encode_integrity(digests)
    for name, content in small.items():
        fs.write_file(folder / name, iter([memoryview(content)]))


def _record(backend: Backend, written: Mapping[str, Written], small: Mapping[str, bytes], meta: SaveMeta) -> bytes:
    lengths = {name: file.nbytes for name, file in written.items()}
    lengths |= {name: len(content) for name, content in small.items()}
    record = FolderRecord(meta.run_id, meta.save, meta.world_size, backend.name, lengths, meta.base, meta.fork)
    return encode_folder(record)


def _written(content: bytes) -> Written:
    return Written(len(content), hashlib.sha256(content).hexdigest())


def _marker(backend: Backend) -> dict[str, Any]:
    """Megatron Core 0.16 takes every key as an argument of a constructor: no other may stand here."""
    return {
        "sharded_backend": backend.name,
        "sharded_backend_version": backend.version,
        "common_backend": "torch",
        "common_backend_version": 1,
    }


def common_state(share: RankShare, meta: SaveMeta) -> dict[str, Any]:
    """What is not sharded: the content of `common.pt`. `share` is rank 0's."""
    content = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True, **meta.content}
    return {**share.common, "checkpoint_version": 3.0, "iteration": meta.iteration, "content_metadata": content}


def _train_state(meta: SaveMeta) -> dict[str, torch.Tensor]:
    """Megatron Bridge's counters in its dtypes; an integer that int32 cannot hold goes as int64."""
    given = {**meta.train_state, "step": meta.iteration}
    return {name: _scalar(kind(given.get(name, 0))) for name, kind in _COUNTERS.items()}


def _scalar(value: Any) -> torch.Tensor:
    if isinstance(value, bool):
        return torch.tensor(value)
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float32)
    return torch.tensor(value, dtype=torch.int32 if abs(value) <= _INT32_MAX else torch.int64)


def read_train_state(folder: Path, fs: FileSystem) -> dict[str, int | float | bool] | None:
    """The counters in `train_state.pt`, whoever wrote it; one that it lacks is 0. None: there is no such file.

    CorruptCopyError if it holds anything else than such counters.
    """
    path = folder / TRAIN_STATE
    try:
        stored = read_archive(memoryview(fs.read(path, _TRAIN_STATE_LIMIT)), str(path))
    except FileNotFoundError:
        return None
    counters: dict[str, int | float | bool] = {}
    for name, kind in _COUNTERS.items():
        value = stored.get(name, 0) if isinstance(stored, dict) else None
        number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
        whole = isinstance(number, int) or (isinstance(number, float) and number.is_integer())
        if not isinstance(number, int | float) or (kind is not float and not whole):
            raise CorruptCopyError(f"{path} has {_said(value)} for {name}, which is no counter.")
        counters[name] = kind(number)
    return counters


def _said(value: object) -> str:
    return str(value)[:40] if isinstance(value, torch.Tensor | float) else shown(value)
