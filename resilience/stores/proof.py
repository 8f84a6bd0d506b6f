"""Whether a copy on a node is what its record says: sizes, header, and (deep) every byte against the owner's digest.

Free of torch, so that `verify` and `explain` answer quickly. A job may be alive beside us: a copy that its owner took
away while we looked was not damaged.
"""

from __future__ import annotations

from dataclasses import dataclass

from resilience.errors import CorruptCopyError
from resilience.stores.digest import algorithm_of, digest_of
from resilience.stores.filesystem import FileSystem
from resilience.stores.node_reader import CopyLocation
from resilience.stores.parity_file import ParityHeader, check_parity_header, read_parity_header
from resilience.stores.records import ShardRecord
from resilience.stores.shard_file import ShardHeader, check_header, read_header

__all__ = ["CopyGoneError", "header_of", "prove_copy", "prove_header"]


class CopyGoneError(Exception):
    """The copy was deleted or replaced by its owner meanwhile; never seen by a user."""


@dataclass(frozen=True)
class _Seen:
    record: bytes
    inode: int


def header_of(location: CopyLocation, fs: FileSystem) -> ShardHeader:
    """The shard's header, held against its record. CorruptCopyError, StoreError, CopyGoneError."""
    header = _look(location, fs, deep=False)
    if not isinstance(header, ShardHeader):
        raise CorruptCopyError(f"{location.path} is parity, and no shard.")
    return header


def prove_header(location: CopyLocation, fs: FileSystem) -> None:
    """Hold the file's header, a shard's or parity's, against its record. Errors as of `prove_copy`."""
    _look(location, fs, deep=False)


def prove_copy(location: CopyLocation, fs: FileSystem) -> None:
    """Read the whole file, a shard or parity, and compare digests. CorruptCopyError, StoreError, CopyGoneError."""
    _look(location, fs, deep=True)


def _look(location: CopyLocation, fs: FileSystem, *, deep: bool) -> ShardHeader | ParityHeader:
    before = _seen(location, fs)
    try:
        return _judge(location, fs, deep=deep)
    except (CorruptCopyError, FileNotFoundError) as error:
        if _seen(location, fs) != before:
            raise CopyGoneError from error
        if isinstance(error, FileNotFoundError):
            raise CorruptCopyError(f"{location.path} is missing beside its record.") from error
        raise


def _judge(location: CopyLocation, fs: FileSystem, *, deep: bool) -> ShardHeader | ParityHeader:
    path, record = location.path, location.record
    mapped = fs.open_mapping(path)
    try:
        if mapped.nbytes != record.nbytes:
            raise CorruptCopyError(f"{path} has {mapped.nbytes} bytes, its record says {record.nbytes}.")
        header = _header(mapped.view, record, str(path))
        if deep and (found := digest_of(mapped.view, algorithm_of(record.digest))) != record.digest:
            raise CorruptCopyError(
                f"{path} has digest {found}, its {'maker' if record.cover else 'owner'} computed {record.digest}."
            )
        return header
    finally:
        mapped.close()


def _header(content: memoryview, record: ShardRecord, what: str) -> ShardHeader | ParityHeader:
    if record.cover is not None:
        parity = read_parity_header(content, what)
        check_parity_header(parity, record, what)
        return parity
    header = read_header(content, what)
    check_header(header, record, what)
    return header


def _seen(location: CopyLocation, fs: FileSystem) -> _Seen:
    """Which record and which file lie there now: a recycled buffer keeps its inode, but loses its record first."""
    try:
        record = fs.read(location.path.with_suffix(".json"))
    except FileNotFoundError as error:
        raise CopyGoneError from error
    found = fs.stat(location.path)
    return _Seen(record, found.inode if found is not None else -1)
