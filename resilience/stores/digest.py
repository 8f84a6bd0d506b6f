"""The digest that proves a shard: of each 32 MiB segment, then of those digests in order, by one of two algorithms.

`xxh3-128-32m` notices every accident at memory speed, but whoever wants to can find other bytes with the same digest.
`blake2b-256-32m` cannot be deceived and costs a second per gigabyte: it is used where peers are authenticated.

Segments can be hashed as they arrive. One-shot calls on large segments matter: xxhash gives up the interpreter lock
only above about 64 KiB, and each time it takes it back can cost a switch interval.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final

import xxhash

__all__ = [
    "ALGORITHM",
    "SEGMENT_BYTES",
    "STRONG",
    "SegmentedDigest",
    "algorithm_of",
    "combined",
    "digest_of",
    "is_digest",
    "segment_digests",
    "segments",
]

ALGORITHM: Final = "xxh3-128-32m"
STRONG: Final = "blake2b-256-32m"
SEGMENT_BYTES: Final = 32 << 20


@dataclass(frozen=True)
class _Algorithm:
    """`whole` takes the segments' digests, one after the other; `digits` are hexadecimal."""

    segment: Callable[[memoryview], bytes]
    whole: Callable[[bytes], str]
    digits: int


_ALGORITHMS: Final[Mapping[str, _Algorithm]] = {
    ALGORITHM: _Algorithm(xxhash.xxh3_128_digest, xxhash.xxh3_128_hexdigest, 32),
    STRONG: _Algorithm(
        lambda segment: blake2b(segment, digest_size=32, person=b"segment").digest(),
        lambda digests: blake2b(digests, digest_size=32, person=b"shard").hexdigest(),
        64,
    ),
}


class SegmentedDigest:
    """Takes a shard's segments in order; `value()` is the digest's text."""

    def __init__(self, algorithm: str = ALGORITHM) -> None:
        self._name = algorithm
        self._algorithm = _ALGORITHMS[algorithm]
        self._digests: list[bytes] = []

    def add(self, segment: memoryview) -> None:
        """Hash the next segment: 32 MiB, or less for the last one."""
        self._digests.append(self._algorithm.segment(segment))

    def value(self) -> str:
        return combined(self._digests, self._name)


def combined(digests: Iterable[bytes], algorithm: str = ALGORITHM) -> str:
    """The digest's text, given those of the segments in order."""
    return f"{algorithm}:{_ALGORITHMS[algorithm].whole(b''.join(digests))}"


def segment_digests(content: memoryview, algorithm: str = ALGORITHM) -> list[bytes]:
    """Of each segment of a shard: 16 bytes, or 32 of the strong one."""
    segment = _ALGORITHMS[algorithm].segment
    return [segment(content[start:stop]) for start, stop in segments(len(content))]


def segments(nbytes: int) -> Iterator[tuple[int, int]]:
    """`(start, stop)` of each segment of a shard of `nbytes`."""
    for start in range(0, nbytes, SEGMENT_BYTES):
        yield start, min(start + SEGMENT_BYTES, nbytes)


def digest_of(content: memoryview | bytes, algorithm: str = ALGORITHM) -> str:
    """Digest of a whole shard."""
    view = memoryview(content)
    digest = SegmentedDigest(algorithm)
    for start, stop in segments(len(view)):
        digest.add(view[start:stop])
    return digest.value()


def algorithm_of(digest: str) -> str:
    """By which algorithm a digest was made, so that bytes can be held against it; the usual one if it is no digest."""
    name = digest.partition(":")[0]
    return name if name in _ALGORITHMS else ALGORITHM


def is_digest(text: object) -> bool:
    """Whether `text` has the form of a digest."""
    if not isinstance(text, str):
        return False
    name, _, digits = text.partition(":")
    known = _ALGORITHMS.get(name)
    return known is not None and len(digits) == known.digits and all(c in "0123456789abcdef" for c in digits)
