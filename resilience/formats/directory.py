"""Which files an `iter_NNNNNNN` folder has besides its data, how they are written, and how their digests are checked.

`integrity.json` is written last, in the form of newer Megatron Core: the SHA-256 of every other file directly in the
folder. `integrity_nested.json`, of ours, is the same for files in its sub-folders. Importing this file needs no torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

from resilience.errors import ConfigError, CorruptCopyError, UnsafePathError
from resilience.formats.protocol import SaveMeta
from resilience.stores.filesystem import FileSystem, MappedFile
from resilience.stores.shared_records import is_inner_name

__all__ = [
    "COMMON",
    "INTEGRITY",
    "MARKER",
    "NESTED_INTEGRITY",
    "RUN_CONFIG",
    "FolderFiles",
    "damaged_files",
    "encode_integrity",
    "encode_run_config",
    "marked_backend",
    "read_digests",
    "verify_files",
]

MARKER: Final = "metadata.json"
COMMON: Final = "common.pt"
RUN_CONFIG: Final = "run_config.yaml"
INTEGRITY: Final = "integrity.json"
NESTED_INTEGRITY: Final = "integrity_nested.json"

_SEGMENT_BYTES = 32 << 20
_INTEGRITY_LIMIT = 256 << 20  # one line per file of every rank


class FolderFiles:
    """Read access to the files of one folder, each mapped when it is first asked for; `close` unmaps them."""

    def __init__(self, folder: Path, fs: FileSystem) -> None:
        self._folder = folder
        self._fs = fs
        self._mapped: dict[str, MappedFile] = {}
        self._plain = {folder}  # sub-folders that were looked at and are no links

    def view(self, name: str) -> memoryview:
        """All bytes of a file; CorruptCopyError if it is missing."""
        if name not in self._mapped:
            path = self._folder / name
            self._refuse_links(path.parent)
            found = self._fs.stat(path)
            if found is None:
                raise CorruptCopyError(f"{path} is missing.")
            if found.nbytes == 0:
                return memoryview(b"")
            self._mapped[name] = self._fs.open_mapping(path)
        return self._mapped[name].view

    def _refuse_links(self, parent: Path) -> None:
        """A sub-folder that is a link leads out of the folder; the file system itself looks at the last part only."""
        while parent not in self._plain:
            found = self._fs.stat(parent)
            if found is not None and not found.is_dir:
                raise UnsafePathError(f"{parent} is no folder (a link is not followed).", advice="Remove it.")
            self._plain.add(parent)
            parent = parent.parent

    def part(self, name: str, start: int, nbytes: int) -> memoryview:
        """`nbytes` bytes from `start` on; CorruptCopyError if the file ends before."""
        whole = self.view(name)
        if start + nbytes > len(whole):
            raise CorruptCopyError(
                f"{self._folder / name} has {len(whole)} bytes where at least {start + nbytes} are expected."
            )
        return whole[start : start + nbytes]

    def sha256(self, name: str) -> str:
        """Digest of a whole file, read once through a bounded window."""
        digest = hashlib.sha256()
        for start in range(0, len(self.view(name)), _SEGMENT_BYTES):
            digest.update(self.view(name)[start : start + _SEGMENT_BYTES])
            self._unmap(name)  # what was read counts as this process's memory for as long as it is mapped
        return digest.hexdigest()

    def _unmap(self, name: str) -> None:
        if name in self._mapped:
            self._mapped.pop(name).close()

    def close(self) -> None:
        mapped, self._mapped = self._mapped, {}
        for file in mapped.values():
            file.close()


def marked_backend(folder: Path, fs: FileSystem) -> str | None:
    """`sharded_backend` of `metadata.json`; None without that file, CorruptCopyError if it cannot be read."""
    path = folder / MARKER
    try:
        marker = json.loads(fs.read(path))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise CorruptCopyError(f"{path} is no JSON: {error}.") from error
    backend = marker.get("sharded_backend") if isinstance(marker, dict) else None
    if not isinstance(backend, str):
        raise CorruptCopyError(f"{path} names no sharded_backend.")
    return backend


def encode_integrity(digests: Mapping[str, str]) -> bytes:
    return json.dumps({"algorithm": "sha256", "files": dict(sorted(digests.items()))}, indent=1).encode()


def read_digests(folder: Path, fs: FileSystem) -> dict[str, str] | None:
    """File name (relative to the folder) → SHA-256; None where the folder has no `integrity.json`."""
    digests = _listed_in(folder, INTEGRITY, fs)
    if digests is not None and NESTED_INTEGRITY in digests:
        nested = _listed_in(folder, NESTED_INTEGRITY, fs)
        if nested is None:
            raise CorruptCopyError(f"{folder / NESTED_INTEGRITY} is missing.")
        digests |= nested
    return digests


def _listed_in(folder: Path, list_name: str, fs: FileSystem) -> dict[str, str] | None:
    path = folder / list_name
    try:
        listed = json.loads(fs.read(path, _INTEGRITY_LIMIT))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError) as error:
        raise CorruptCopyError(f"{path} is no JSON: {error}.") from error
    files = listed.get("files") if isinstance(listed, dict) else None
    if not isinstance(files, dict) or listed.get("algorithm") != "sha256":
        raise CorruptCopyError(f"{path} is not in the form that this version reads (sha256 of files).")
    for name, digest in files.items():
        if not is_inner_name(name) or ("/" in name) != (list_name == NESTED_INTEGRITY) or not isinstance(digest, str):
            raise CorruptCopyError(f"{path} lists {name[:80]!r}, which is no file of its folder.")
    return files


def damaged_files(folder: Path, fs: FileSystem, names: Iterable[str] | None = None) -> Iterator[tuple[str, str]]:
    """`(name, reason)` of each file that is not as `integrity.json` says; reads them in full. `names`: only these.

    What is not listed (a note that somebody put there) is not looked at.
    """
    digests = read_digests(folder, fs)
    if digests is None:
        return
    files = FolderFiles(folder, fs)
    try:
        for name in sorted(digests.keys() & (digests if names is None else set(names))):
            try:
                found = files.sha256(name)
            except (CorruptCopyError, UnsafePathError, FileNotFoundError) as error:
                yield name, str(error)
                continue
            finally:
                files.close()
            if found != digests[name].lower():
                yield name, f"{folder / name} does not match its SHA-256 in {INTEGRITY}."
    finally:
        files.close()


def verify_files(
    folder: Path, fs: FileSystem, data_files: Iterable[str], names: Iterable[str] | None, *, ours: bool
) -> None:
    """See `CheckpointReader.verify`. `data_files` must be listed; `ours`: there must be digests at all."""
    digests = read_digests(folder, fs)
    if digests is None:
        if ours:
            raise CorruptCopyError(f"{folder / INTEGRITY} is missing.")
        return
    unlisted = sorted(set(data_files) - digests.keys())
    if unlisted:
        raise CorruptCopyError(f"{folder / INTEGRITY} does not list {', '.join(unlisted[:20])}.")
    for _, reason in damaged_files(folder, fs, names):
        raise CorruptCopyError(reason)


def encode_run_config(meta: SaveMeta) -> bytes:
    """`run_config.yaml`: the user's mapping and the five keys without which Megatron Bridge does not load.

    What the save itself knows goes before what the user said.
    """
    merged = _plain(meta.run_config or {})
    model, checkpoint = (_section(merged, name) for name in ("model", "checkpoint"))
    for name, size in (("tensor_model_parallel_size", meta.tp), ("pipeline_model_parallel_size", meta.pp)):
        model[name] = model.get(name, 1) if size is None else size
    checkpoint.update(save_optim=meta.save_optim, save_rng=meta.save_rng, fully_parallel_save=meta.fully_parallel_save)
    return yaml.safe_dump(merged, sort_keys=True, allow_unicode=True).encode()


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    section = config.setdefault(name, {})
    if not isinstance(section, dict):
        raise ConfigError(f"run_config[{name!r}] is {section!r}; expected a mapping.")
    return section


def _plain(value: Any) -> Any:
    """What YAML can hold of a user's configuration: anything else by its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(entry) for entry in value]
    # `type is`, because the safe dumper refuses subclasses (an enum that is a str)
    return value if value is None or type(value) in (bool, int, float, str) else str(value)
