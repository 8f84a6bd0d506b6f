"""What the `.metadata` of a torch.distributed.checkpoint folder says, believed only after every field was checked.

The file is a pickle. It is read through stand-ins (`inert_pickle`), without torch and without running anything in it;
afterwards sizes, offsets and file names must fit each other, so that nobody allocates or opens what a liar asks for.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilience.errors import CorruptCopyError, UnsafePathError
from resilience.stores.filesystem import FileSystem
from resilience.stores.inert_pickle import Inert, load_inert, shown

__all__ = ["METADATA", "DcpIndex", "Extent", "StoredChunk", "StoredRegion", "parse_metadata", "read_metadata"]

METADATA = ".metadata"
_LIMIT = 4 << 30

#: Bytes per element of every dtype that a chunk may have.
DTYPE_BYTES: Mapping[str, int] = {
    name: nbytes
    for nbytes, names in {
        1: "bool uint8 int8 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu float4_e2m1fn_x2",
        2: "int16 uint16 float16 bfloat16",
        4: "int32 uint32 float32 complex32",
        8: "int64 uint64 float64 complex64",
        16: "complex128",
    }.items()
    for name in names.split()
}

_DCP = "torch.distributed.checkpoint"
_MCORE = "megatron.core.dist_checkpointing.strategies.torch"
_ALLOWED = frozenset(
    {
        f"{_DCP}.metadata.Metadata",
        f"{_DCP}.metadata.MetadataIndex",
        f"{_DCP}.metadata.TensorStorageMetadata",
        f"{_DCP}.metadata.BytesStorageMetadata",
        f"{_DCP}.metadata.ChunkStorageMetadata",
        f"{_DCP}.metadata.TensorProperties",
        f"{_DCP}.metadata.StorageMeta",
        f"{_DCP}.metadata._MEM_FORMAT_ENCODING",
        f"{_DCP}.filesystem._StorageInfo",
        f"{_DCP}.planner.SavePlan",
        f"{_DCP}.planner.WriteItem",
        f"{_DCP}.planner.WriteItemType",
        f"{_DCP}.planner.TensorWriteData",
        *(f"torch.{name}" for name in DTYPE_BYTES),
        "torch.Size",
        "torch.serialization._get_layout",
        "pathlib.PosixPath",
        "pathlib._local.PosixPath",  # the same, pickled by Python 3.13
        f"{_MCORE}.MCoreMetadata",
        f"{_MCORE}.MCoreSavePlan",
    }
)


@dataclass(frozen=True)
class Extent:
    """A run of bytes in one of the folder's files."""

    file: str
    start: int
    nbytes: int


@dataclass(frozen=True)
class StoredChunk:
    """A box of a tensor, and where its bytes lie (as a `torch.save` archive)."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    extent: Extent


@dataclass(frozen=True)
class StoredRegion:
    """A global tensor; `dtype` by its name in torch. Chunks without elements are left out."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True)
class DcpIndex:
    """All tensors and objects of a checkpoint by key, and how long each of its files must at least be."""

    tensors: Mapping[str, StoredRegion]
    objects: Mapping[str, Extent]
    file_bytes: Mapping[str, int]

    def torn(self, folder: Path, fs: FileSystem) -> str:
        """Which of its files is missing or too short; "" if none is."""
        for name, nbytes in sorted(self.file_bytes.items()):
            found = fs.stat(folder / name)
            if found is None:
                return f"{name} is missing"
            if not found.is_file or found.nbytes < nbytes:
                return f"{name} has {found.nbytes} bytes where at least {nbytes} are expected"
        return ""


def read_metadata(folder: Path, fs: FileSystem) -> DcpIndex:
    """`.metadata` of a folder; FileNotFoundError without one, CorruptCopyError or UnsafePathError if it is refused."""
    return parse_metadata(fs.read(folder / METADATA, _LIMIT), str(folder / METADATA))


def parse_metadata(content: bytes, what: str) -> DcpIndex:
    check = _Check(what)
    fields = check.state(load_inert(content, _ALLOWED, what), "Metadata", "MCoreMetadata")
    extents = dict(_extents(check, fields))
    file_bytes: dict[str, int] = {}
    for extent in extents.values():
        file_bytes[extent.file] = max(file_bytes.get(extent.file, 0), extent.start + extent.nbytes)
    tensors: dict[str, StoredRegion] = {}
    objects: dict[str, Extent] = {}
    for key, entry in check.mapping(fields.get("state_dict_metadata"), "state_dict_metadata").items():
        if not isinstance(key, str):
            raise check.wrong(f"a key is {type(key).__name__}")
        if check.is_a(entry, "BytesStorageMetadata"):
            objects[key] = check.found(extents, key, None)
        else:
            tensors[key] = _region(check, key, check.state(entry, "TensorStorageMetadata"), extents)
    return DcpIndex(tensors, objects, file_bytes)


_Extents = dict[tuple[str, tuple[int, ...] | None], Extent]


def _extents(check: _Check, fields: Mapping[str, Any]) -> Iterator[tuple[tuple[str, tuple[int, ...] | None], Extent]]:
    for index, info in check.mapping(fields.get("storage_data"), "storage_data").items():
        place = check.state(index, "MetadataIndex")
        stored = check.state(info, "_StorageInfo")
        key, offset = place.get("fqn"), place.get("offset")
        if not isinstance(key, str):
            raise check.wrong("an entry of storage_data has no key")
        if stored.get("transform_descriptors"):
            raise check.wrong(f"{key} was written through an extension ({shown(stored['transform_descriptors'])})")
        extent = Extent(
            check.file_name(stored.get("relative_path")),
            check.length(stored.get("offset"), f"the offset of {key}"),
            check.length(stored.get("length"), f"the length of {key}"),
        )
        yield (key, None if offset is None else check.size(offset, f"an offset of {key}")), extent


def _region(check: _Check, key: str, fields: Mapping[str, Any], extents: _Extents) -> StoredRegion:
    dtype = check.dtype(fields.get("properties"), key)
    shape = check.size(fields.get("size"), f"the size of {key}")
    chunks = []
    for chunk in check.listing(fields.get("chunks"), f"the chunks of {key}"):
        box = check.state(chunk, "ChunkStorageMetadata")
        offsets = check.size(box.get("offsets"), f"the offsets of a chunk of {key}")
        sizes = check.size(box.get("sizes"), f"the sizes of a chunk of {key}")
        if not len(offsets) == len(sizes) == len(shape) or any(
            start + length > whole for start, length, whole in zip(offsets, sizes, shape, strict=True)
        ):
            raise check.wrong(f"a chunk of {key} at {offsets} with {sizes} lies outside {shape}")
        if 0 in sizes:
            continue
        extent = check.found(extents, key, offsets)
        if math.prod(sizes) * DTYPE_BYTES[dtype] > extent.nbytes:
            raise check.wrong(f"a chunk of {key} claims {sizes} of {dtype} in {extent.nbytes} bytes")
        chunks.append(StoredChunk(offsets, sizes, extent))
    distinct = len({chunk.offsets for chunk in chunks}) == len(chunks)
    if not distinct or sum(math.prod(chunk.sizes) for chunk in chunks) < math.prod(shape):
        raise check.wrong(f"the chunks of {key} do not cover its shape {shape}")
    return StoredRegion(dtype, shape, tuple(chunks))


class _Check:
    """Turns stand-ins into values, or says what is wrong with them."""

    def __init__(self, what: str) -> None:
        self.what = what

    def wrong(self, how: str) -> CorruptCopyError:
        return CorruptCopyError(f"{self.what}: {how[:400]}.")

    def is_a(self, found: object, *names: str) -> bool:
        return isinstance(found, Inert) and found.pickled_name.rpartition(".")[2] in names

    def state(self, found: object, *names: str) -> Mapping[str, Any]:
        if not isinstance(found, Inert) or not self.is_a(found, *names) or not isinstance(found.state, dict):
            raise self.wrong(f"found {type(found).__name__} where {names[0]} belongs")
        return found.state

    def mapping(self, found: object, name: str) -> dict[Any, Any]:
        if not isinstance(found, dict):
            raise self.wrong(f"{name} is no dictionary")
        return found

    def listing(self, found: object, name: str) -> list[Any]:
        if not isinstance(found, list):
            raise self.wrong(f"{name} are no list")
        return found

    def length(self, found: object, name: str) -> int:
        if type(found) is not int or not 0 <= found < 1 << 62:
            raise self.wrong(f"{name} is {shown(found)}")
        return found

    def size(self, found: object, name: str) -> tuple[int, ...]:
        numbers = found.arguments[0] if isinstance(found, Inert) and len(found.arguments) == 1 else None
        if not self.is_a(found, "Size") or not isinstance(numbers, tuple | list) or len(numbers) > 64:
            raise self.wrong(f"{name} are no torch.Size")
        return tuple(self.length(number, name) for number in numbers)

    def dtype(self, properties: object, key: str) -> str:
        state = properties.state if isinstance(properties, Inert) else None
        kind = state[0] if self.is_a(properties, "TensorProperties") and isinstance(state, tuple) and state else None
        name = str(getattr(kind, "pickled_name", "")).removeprefix("torch.")
        if name not in DTYPE_BYTES:
            raise self.wrong(f"{key} has no dtype that can be read")
        return name

    def file_name(self, found: object) -> str:
        if not isinstance(found, str) or not found or found in (".", "..") or "/" in found or "\0" in found:
            raise UnsafePathError(f"{self.what} names the file {shown(found)}, which is not one of its folder.")
        return found

    def found(self, extents: _Extents, key: str, offsets: tuple[int, ...] | None) -> Extent:
        extent = extents.get((key, offsets))
        if extent is None:
            raise self.wrong(f"{key} at {offsets} is listed and stored nowhere")
        return extent
