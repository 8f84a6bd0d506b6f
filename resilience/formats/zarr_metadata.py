"""What stands in `tensors.zarr`, a group of zarr v3: one array per key, described in JSON. Importing needs no torch.

    tensors.zarr/zarr.json                          the group, with all arrays' metadata consolidated
    tensors.zarr/layers.0.weight/zarr.json          an array
    tensors.zarr/layers.0.weight/c/0/1              one chunk: little endian, C order, then its CRC-32C
    tensors.zarr/resilience%2Fextra%2Fw/…           a key that is no file name

Every array has the attribute `torch_dtype`. Dtypes that zarr lacks are stored as unsigned integers of their size. A key
whose folder has another name is in the attribute `key`; keys with the same bytes are in the group's `aliases`.

Nothing that is read is believed before it was checked; what another program wrote may have any grid and either of the
two key encodings, but no other codecs than `bytes` and `crc32c`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from resilience.errors import CorruptCopyError, UnsafePathError
from resilience.formats.dcp_metadata import DTYPE_BYTES
from resilience.formats.zarr_grid import Grid
from resilience.stores.filesystem import FileSystem

__all__ = [
    "ARRAY",
    "CHECKSUM_BYTES",
    "STORE",
    "ZarrArray",
    "ZarrIndex",
    "array_document",
    "folder_of",
    "group_document",
    "read_index",
    "storage_dtype",
]

STORE: Final = "tensors.zarr"
ARRAY: Final = "zarr.json"
CHECKSUM_BYTES: Final = 4
_LIMIT = 4 << 30
_ELEMENTS = 1 << 60
_CHUNKS = 1 << 24
_MOST_AXES = 64
_DEPTH = 32  # of groups in groups
_NAME_BYTES = 200
_INTEGERS = tuple(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64))
_NATIVE = frozenset({"bool", "float16", "float32", "float64", "complex64", "complex128", *_INTEGERS})
_KEPT = frozenset("/\\%")


@dataclass(frozen=True)
class ZarrArray:
    """One array. `folder` is relative to `tensors.zarr`; `dtype` by its name in torch; `stored` by its name in zarr."""

    key: str
    folder: str
    dtype: str
    stored: str
    grid: Grid
    fill: Any = 0
    checksum: bool = True
    encoding: tuple[str, str] = ("default", "/")

    @property
    def chunk_bytes(self) -> int:
        """Of a chunk's file."""
        return math.prod(self.grid.chunk) * DTYPE_BYTES[self.dtype] + (CHECKSUM_BYTES if self.checksum else 0)

    def chunk_file(self, place: Sequence[int]) -> str:
        """A chunk's name, relative to the checkpoint's folder."""
        name, separator = self.encoding
        parts = [str(at) for at in place]
        inner = separator.join(["c", *parts] if name == "default" else parts or ["0"])
        return f"{STORE}/{self.folder}/{inner}"


@dataclass(frozen=True)
class ZarrIndex:
    """All arrays by key, and keys that stand for another one's bytes."""

    arrays: Mapping[str, ZarrArray]
    aliases: Mapping[str, str] = field(default_factory=dict)


def storage_dtype(dtype: str) -> str:
    """The data type in zarr of a dtype of torch."""
    return dtype if dtype in _NATIVE else f"uint{8 * DTYPE_BYTES[dtype]}"


def folder_of(key: str) -> str:
    """The name of a key's folder: the key itself where it can be one."""
    name = "".join(char if char.isprintable() and char not in _KEPT else _quoted(char) for char in key)
    if name.startswith((".", "__")) or name == ARRAY:
        name = _quoted(name[0]) + name[1:]  # hidden, reserved by zarr, or the group's own metadata
    if name and len(name.encode()) <= _NAME_BYTES:
        return name
    digest = hashlib.sha256(key.encode(errors="surrogatepass")).hexdigest()[:32]
    return f"{name.encode()[: _NAME_BYTES - 40].decode(errors='ignore')}%{digest}"


def _quoted(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode(errors="surrogatepass"))


def array_document(key: str, dtype: str, grid: Grid) -> dict[str, Any]:
    """An array's `zarr.json`."""
    stored = storage_dtype(dtype)
    attributes = {"torch_dtype": dtype} | ({"key": key} if folder_of(key) != key else {})
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(grid.shape),
        "data_type": stored,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(grid.chunk)}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": False if stored == "bool" else [0.0, 0.0] if stored.startswith("complex") else 0,
        "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}],
        "attributes": attributes,
        # xarray wants one length per name, and no name twice in an array
        "dimension_names": [f"n{length}_{axis}" for axis, length in enumerate(grid.shape)],
        "storage_transformers": [],
    }


def group_document(arrays: Mapping[str, Mapping[str, Any]], aliases: Mapping[str, str]) -> dict[str, Any]:
    """The group's `zarr.json`; `arrays` by folder."""
    return {
        "zarr_format": 3,
        "node_type": "group",
        "attributes": {"aliases": dict(aliases)} if aliases else {},
        "consolidated_metadata": {"kind": "inline", "must_understand": False, "metadata": dict(arrays)},
    }


def read_index(folder: Path, fs: FileSystem) -> ZarrIndex:
    """The arrays of a checkpoint; FileNotFoundError without a group, CorruptCopyError or UnsafePathError if refused.

    From the consolidated metadata where there are any, else from each array's own.
    """
    root = folder / STORE
    group = _document(root / ARRAY, fs)
    if group.get("node_type") != "group":
        raise CorruptCopyError(f"{root / ARRAY} describes no group of zarr v3.")
    consolidated = group.get("consolidated_metadata")
    found = consolidated.get("metadata") if isinstance(consolidated, dict) else None
    documents = _listed(found, root) if isinstance(found, dict) else _walk(root, "", fs, _DEPTH)
    arrays: dict[str, ZarrArray] = {}
    for name, document in documents:
        array = _array(name, document, f"{root}/{name}")
        if array.key in arrays:
            raise CorruptCopyError(f"{root} has two arrays for {array.key[:200]}.")
        arrays[array.key] = array
    return ZarrIndex(arrays, _aliases(group, arrays, root))


def _document(path: Path, fs: FileSystem) -> dict[str, Any]:
    try:
        document = json.loads(fs.read(path, _LIMIT))
    except CorruptCopyError:
        raise
    except (ValueError, RecursionError) as error:
        raise CorruptCopyError(f"{path}: {error}") from error
    if not isinstance(document, dict) or document.get("zarr_format") != 3:
        raise CorruptCopyError(f"{path} is no metadata of zarr v3.")
    return document


def _listed(found: Mapping[str, Any], root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, document in found.items():
        parts = name.split("/")
        if len(parts) > _DEPTH or any(part in ("", ".", "..") or not part.isprintable() for part in parts):
            raise UnsafePathError(f"{root / ARRAY} names {name[:80]!r}, which is no folder in it.", advice="Remove it.")
        if isinstance(document, dict) and document.get("node_type") == "array":
            yield name, document


def _walk(root: Path, within: str, fs: FileSystem, depth: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Arrays in a group and in the groups inside it; links are not followed."""
    for name in fs.list_dir(root / within):
        inner = f"{within}/{name}" if within else name
        there = fs.stat(root / inner)
        if there is None or not there.is_dir or fs.stat(root / inner / ARRAY) is None:
            continue
        document = _document(root / inner / ARRAY, fs)
        if document.get("node_type") == "array":
            yield inner, document
        elif depth > 0:
            yield from _walk(root, inner, fs, depth - 1)


def _aliases(group: Mapping[str, Any], arrays: Mapping[str, ZarrArray], root: Path) -> dict[str, str]:
    attributes = group.get("attributes")
    aliases = attributes.get("aliases", {}) if isinstance(attributes, dict) else {}
    if not isinstance(aliases, dict) or not all(isinstance(each, str) for each in aliases.values()):
        raise CorruptCopyError(f"{root / ARRAY}: aliases are no names of arrays.")
    if not aliases.keys().isdisjoint(arrays) or not set(aliases.values()) <= arrays.keys():
        raise CorruptCopyError(f"{root / ARRAY}: aliases and arrays do not fit each other.")
    return aliases


def _array(folder: str, document: Mapping[str, Any], what: str) -> ZarrArray:
    check = _Check(what[:300])
    attributes = document.get("attributes", {})
    if not isinstance(attributes, dict):
        raise check.wrong("attributes", attributes)
    key = attributes.get("key", folder)
    if not isinstance(key, str) or not key:
        raise check.wrong("key", key)
    stored, dtype = check.dtypes(document.get("data_type"), attributes.get("torch_dtype"))
    fill = check.fill(document.get("fill_value", 0), stored)
    encoding = check.encoding(document.get("chunk_key_encoding"))
    if document.get("storage_transformers"):
        raise check.wrong("storage_transformers", document["storage_transformers"])
    checksum = check.codecs(document.get("codecs"))
    return ZarrArray(key, folder, dtype, stored, check.grid(document), fill, checksum, encoding)


class _Check:
    """Takes one field of an array's metadata after the other, or refuses it by name."""

    def __init__(self, what: str) -> None:
        self._what = what

    def wrong(self, name: str, found: object) -> CorruptCopyError:
        return CorruptCopyError(f"{self._what}: {name} is {str(found)[:120]}, which this version does not read.")

    def dtypes(self, stored: object, dtype: object) -> tuple[str, str]:
        if not isinstance(stored, str) or stored not in DTYPE_BYTES:
            raise self.wrong("data_type", stored)
        if dtype is None:
            return stored, stored
        if not isinstance(dtype, str) or dtype not in DTYPE_BYTES or stored not in (storage_dtype(dtype), dtype):
            raise self.wrong(f"torch_dtype of data_type {stored}", dtype)
        return stored, dtype

    def grid(self, document: Mapping[str, Any]) -> Grid:
        shape = self._lengths("shape", document.get("shape"), 0)
        steps = self._lengths("chunk_shape", self._named("chunk_grid", document, "regular").get("chunk_shape"), 1)
        if len(steps) != len(shape):
            raise self.wrong(f"chunk_shape of shape {shape}", steps)
        grid = Grid(shape, steps)
        if math.prod(grid.counts) > _CHUNKS:
            raise self.wrong(f"chunk_shape of shape {shape} with more than {_CHUNKS} chunks", steps)
        return grid

    def _lengths(self, name: str, found: object, least: int) -> tuple[int, ...]:
        if (
            not isinstance(found, list)
            or len(found) > _MOST_AXES
            or not all(type(length) is int and least <= length for length in found)
            or math.prod(found) >= _ELEMENTS
        ):
            raise self.wrong(name, found)
        return tuple(found)

    def _named(self, field_name: str, document: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        found = document.get(field_name)
        configuration = found.get("configuration") if isinstance(found, dict) and found.get("name") == name else None
        if not isinstance(configuration, dict):
            raise self.wrong(field_name, found)
        return configuration

    def encoding(self, found: object) -> tuple[str, str]:
        name = found.get("name") if isinstance(found, dict) else found
        configuration = found.get("configuration", {}) if isinstance(found, dict) else {}
        default = {"default": "/", "v2": "."}.get(name) if isinstance(name, str) else None
        separator = configuration.get("separator", default) if isinstance(configuration, dict) else None
        if default is None or separator not in ("/", "."):
            raise self.wrong("chunk_key_encoding", found)
        return str(name), separator

    def codecs(self, found: object) -> bool:
        """Whether a checksum follows the bytes; any other codec is refused."""
        names = [each.get("name") if isinstance(each, dict) else each for each in found] if found else []  # type: ignore[attr-defined]
        if not isinstance(found, list) or names not in (["bytes"], ["bytes", "crc32c"]):
            raise CorruptCopyError(
                f"{self._what} has the codecs {str(names or found)[:120]}; read are bytes and crc32c.",
                advice="Write it again without compression, sharding and transposition.",
            )
        configuration = found[0].get("configuration") if isinstance(found[0], dict) else None
        if isinstance(configuration, dict) and configuration.get("endian", "little") != "little":
            raise self.wrong("endian", configuration["endian"])
        return len(names) == 2

    def fill(self, found: object, stored: str) -> Any:
        if stored.startswith("complex") and isinstance(found, list) and len(found) == 2:
            return complex(self._number(found[0]), self._number(found[1]))
        return self._number(found)

    def _number(self, found: object) -> Any:
        if isinstance(found, bool | int | float):
            return found
        if found in ("NaN", "Infinity", "-Infinity"):
            return float(str(found))
        raise self.wrong("fill_value", found)
