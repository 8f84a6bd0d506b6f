"""How rank 0 puts what all ranks wrote together into one `.metadata`, and refuses parts that do not fit.

DCP's own planner and dataclasses do the assembling, so that what comes out is what torch.distributed.checkpoint writes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from resilience.errors import LayoutMismatchError
from resilience.formats.dcp_dialect import NestedPath
from resilience.formats.dcp_metadata import DTYPE_BYTES

__all__ = ["WrittenFile", "WrittenObject", "WrittenTensor", "assemble", "plan_of"]


@dataclass(frozen=True)
class WrittenTensor:
    """A chunk as it lies in this rank's file."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class WrittenObject:
    """Something else than a tensor, as it lies in this rank's file."""

    key: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class WrittenFile:
    """What one rank wrote; crosses ranks as JSON. `aliases`: a second key of a tensor → the key that it has."""

    file: str
    file_bytes: int
    sha256: str
    tensors: tuple[WrittenTensor, ...]
    objects: tuple[WrittenObject, ...]
    aliases: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return {
            **vars(self),
            "tensors": [list(vars(tensor).values()) for tensor in self.tensors],
            "objects": [list(vars(stored).values()) for stored in self.objects],
        }

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> WrittenFile:
        tensors = tuple(
            WrittenTensor(key, dtype, tuple(shape), tuple(offsets), tuple(sizes), start, nbytes)
            for key, dtype, shape, offsets, sizes, start, nbytes in fields["tensors"]
        )
        objects = tuple(WrittenObject(*each) for each in fields["objects"])
        return cls(**{**fields, "tensors": tensors, "objects": objects})


def assemble(
    ranks: Sequence[WrittenFile],
    save_id: str,
    nested_path: Callable[[str], NestedPath] | None = None,
    plan: Callable[[Sequence[WrittenFile]], Metadata] | None = None,
) -> Metadata:
    """The checkpoint's metadata; LayoutMismatchError unless the parts cover every tensor exactly once.

    `nested_path`: where each key stands in a nested dictionary; this becomes the map that DCP keeps as `planner_data`.
    `plan`: instead of `plan_of`, where a plan of such files is known.
    """
    ranks = list(_without_empty_twins(ranks))
    metadata = Metadata(dict((plan or plan_of)(ranks).state_dict_metadata))
    metadata.storage_data = dict(_storage_entries(ranks))
    for written in ranks:
        _add_aliases(metadata, written.aliases)
    metadata.planner_data = nested_path and {key: nested_path(key) for key in metadata.state_dict_metadata}
    metadata.storage_meta = StorageMeta(save_id=save_id)
    metadata.version = CURRENT_DCP_VERSION
    return metadata


def plan_of(ranks: Sequence[WrittenFile]) -> Metadata:
    """What the files make together, without where it lies; LayoutMismatchError if they do not fit."""
    plans = [SavePlan(list(_write_items(written))) for written in ranks]
    _check_alike(plans)
    try:
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        _, metadata = planner.create_global_plan(plans)
    except ValueError as error:
        raise LayoutMismatchError(f"The ranks' parts do not fit together: {error}") from error
    _check_covered(metadata)
    return metadata


def _write_items(written: WrittenFile) -> Iterator[WriteItem]:
    for stored in written.objects:
        yield WriteItem(MetadataIndex(stored.key), WriteItemType.BYTE_IO)
    for tensor in written.tensors:
        if tensor.dtype not in DTYPE_BYTES:
            raise LayoutMismatchError(f"{tensor.key} has dtype {tensor.dtype}, which this format does not know.")
        offsets = torch.Size(tensor.offsets)
        chunk = ChunkStorageMetadata(offsets, torch.Size(tensor.sizes))
        properties = TensorProperties(dtype=getattr(torch, tensor.dtype))
        tensor_data = TensorWriteData(chunk, properties, torch.Size(tensor.shape))
        yield WriteItem(MetadataIndex(tensor.key, offsets), WriteItemType.SHARD, tensor_data=tensor_data)


def _without_empty_twins(ranks: Sequence[WrittenFile]) -> Iterator[WrittenFile]:
    """Of a tensor without elements every rank may pass the whole: the first one counts."""
    seen: set[str] = set()
    for written in ranks:
        kept = []
        for tensor in written.tensors:
            if 0 in tensor.shape and tensor.key in seen:
                continue
            seen.add(tensor.key)
            kept.append(tensor)
        yield replace(written, tensors=tuple(kept))


def _check_alike(plans: Sequence[SavePlan]) -> None:
    """What DCP's planner lets pass: two parts at one place (it takes them for copies), parts of different dtypes."""
    seen: set[MetadataIndex] = set()
    kinds: dict[str, tuple[torch.Size, torch.dtype]] = {}
    for item in (item for plan in plans for item in plan.items):
        if item.index in seen:
            raise LayoutMismatchError(f"{item.index.fqn} was given twice at offset {item.index.offset}.")
        seen.add(item.index)
        if item.tensor_data is not None:
            kind = item.tensor_data.size, item.tensor_data.properties.dtype
            if kinds.setdefault(item.index.fqn, kind) != kind:
                raise LayoutMismatchError(f"Ranks disagree on {item.index.fqn}: {kind} and {kinds[item.index.fqn]}.")


def _check_covered(metadata: Metadata) -> None:
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            continue
        given, whole = sum(math.prod(chunk.sizes) for chunk in entry.chunks), math.prod(entry.size)
        if given != whole:
            raise LayoutMismatchError(f"The ranks' parts of {key} have {given} elements of {whole}.")


def _storage_entries(ranks: Sequence[WrittenFile]) -> Iterator[tuple[MetadataIndex, _StorageInfo]]:
    for written in ranks:
        for stored in written.objects:
            yield MetadataIndex(stored.key), _StorageInfo(written.file, stored.start, stored.nbytes)
        for tensor in written.tensors:
            yield (
                MetadataIndex(tensor.key, torch.Size(tensor.offsets)),
                _StorageInfo(written.file, tensor.start, tensor.nbytes),
            )


def _add_aliases(metadata: Metadata, aliases: Mapping[str, str]) -> None:
    """A second name of a tensor points to the same bytes, so that others find it under either."""
    for name, key in aliases.items():
        entry = metadata.state_dict_metadata.get(key)
        if entry is None or isinstance(entry, BytesStorageMetadata) or name in metadata.state_dict_metadata:
            continue  # per rank: the rank's object has it under both names
        metadata.state_dict_metadata[name] = entry
        for chunk in entry.chunks:
            stored = metadata.storage_data[MetadataIndex(key, chunk.offsets)]
            metadata.storage_data[MetadataIndex(name, chunk.offsets)] = stored
