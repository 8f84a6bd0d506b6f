"""How tensors of a checkpoint become safetensors files, written as they are read.

    model.safetensors                         the model, by the names of its own state dict
    optimizer.safetensors, extra.safetensors  what else has a global shape
    model-00001-of-00003.safetensors          where one file would be larger than 5 GB
    model.safetensors.index.json              which file has which tensor, where there is more than one file in all

A tensor is in one file. A second name of one stands in the file's metadata (`lm_head.weight`: `wte.weight`), as
`safetensors.torch.save_model` has it. Dtypes without a name there are stored as bytes, with one axis more, and named in
the metadata (`dtype:<key>`). What a rank had alone (random state, the loader's place) has no place here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from resilience.formats.convert_parts import rows_of
from resilience.formats.convert_source import PART_BYTES, StoredTensors
from resilience.formats.keys import stored_key
from resilience.formats.protocol import StoredTensor
from resilience.state.tensors import dtype_name, memory_of
from resilience.stores.filesystem import FileSystem

__all__ = ["write_safetensors"]

_FILE_BYTES = 5_000_000_000
_HEADER_STEP = 8
_NAMES: Final[Mapping[str, str]] = {
    "bool": "BOOL",
    "bfloat16": "BF16",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "complex64": "C64",
    **{f"{kind}{bits}": f"{kind[0].upper()}{bits}" for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": f"F{bits}" for bits in (16, 32, 64)},
}


@dataclass(frozen=True)
class _File:
    """`paths` in the order in which their bytes lie: by falling element size, so that each is aligned."""

    name: str
    paths: Sequence[str]


def write_safetensors(folder: Path, tensors: StoredTensors, fs: FileSystem) -> None:
    """Write all tensors into the empty `folder`; each file is fsynced."""
    groups: dict[str, list[str]] = {}
    for path in sorted(tensors.roots):
        stem = path.split("/", 1)[0]
        groups.setdefault(stem if stem in ("model", "optimizer") else "extra", []).append(path)
    files = {stem: _files(stem, paths, tensors.index) for stem, paths in groups.items()}
    several = sum(map(len, files.values())) > 1
    for stem, each in files.items():
        for file in each:
            fs.write_file(folder / file.name, _content(file, tensors))
        if several:
            fs.write_atomic(folder / f"{stem}.safetensors.index.json", _index(each, tensors.index))


def _files(stem: str, paths: Sequence[str], index: Mapping[str, StoredTensor]) -> list[_File]:
    filled: list[list[str]] = []
    room = 0
    for path in paths:
        nbytes = _nbytes(index[path])
        if not filled or nbytes > room:
            filled.append([])
            room = _FILE_BYTES
        filled[-1].append(path)
        room -= nbytes
    count = len(filled)
    return [
        _File(
            f"{stem}.safetensors" if count == 1 else f"{stem}-{number:05d}-of-{count:05d}.safetensors",
            sorted(inside, key=lambda path: -index[path].dtype.itemsize),
        )
        for number, inside in enumerate(filled, 1)
    ]


def _nbytes(stored: StoredTensor) -> int:
    return math.prod(stored.global_shape) * stored.dtype.itemsize


def _index(files: Sequence[_File], index: Mapping[str, StoredTensor]) -> bytes:
    places = {stored_key(path): file.name for file in files for path in file.paths}
    total = sum(_nbytes(index[path]) for file in files for path in file.paths)
    return json.dumps(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}, indent=2
    ).encode()


def _content(file: _File, tensors: StoredTensors) -> Iterator[memoryview]:
    yield memoryview(_header(file, tensors))
    for path in file.paths:
        yield from _bytes_of(path, tensors)


def _header(file: _File, tensors: StoredTensors) -> bytes:
    metadata = {"format": "pt"}
    metadata |= {stored_key(alias): stored_key(root) for alias, root in tensors.aliases.items() if root in file.paths}
    entries: dict[str, Any] = {}
    start = 0
    for path in file.paths:
        stored, key = tensors.index[path], stored_key(path)
        dtype, shape = dtype_name(stored.dtype), list(stored.global_shape)
        if dtype not in _NAMES:
            metadata[f"dtype:{key}"] = dtype
            dtype, shape = "uint8", [*shape, stored.dtype.itemsize]
        stop = start + _nbytes(stored)
        entries[key] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    header = json.dumps({"__metadata__": metadata, **entries}, separators=(",", ":")).encode()
    header += b" " * (-len(header) % _HEADER_STEP)
    return len(header).to_bytes(8, "little") + header


def _bytes_of(path: str, tensors: StoredTensors) -> Iterator[memoryview]:
    """A tensor's bytes in C order, by ranges of rows."""
    stored = tensors.index[path]
    shape = stored.global_shape
    if 0 in shape:
        return
    inner = shape[1:]
    row_bytes = math.prod(inner) * stored.dtype.itemsize
    rows = rows_of(shape, tensors.boxes(path), row_bytes, PART_BYTES) if shape else []
    for start, count in rows:
        yield memory_of(tensors.part(path, ((start, *(0,) * len(inner)), (count, *inner))))
    if not shape:
        yield memory_of(tensors.part(path, ((), ())))
