"""The digest that proves a shard: `xxh3-128-32m`.

xxh3-128 (seed 0) of each 32 MiB segment, then xxh3-128 of those 16-byte digests in order. Segments can be hashed as
they arrive. One-shot calls on large segments matter: xxhash gives up the interpreter lock only above about 64 KiB, and
each time it takes it back can cost a switch interval.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

import xxhash

__all__ = [
    "ALGORITHM",
    "SEGMENT_BYTES",
    "SegmentedDigest",
    "combined",
    "digest_of",
    "is_digest",
    "segment_digests",
    "segments",
]

ALGORITHM: Final = "xxh3-128-32m"
SEGMENT_BYTES: Final = 32 << 20


class SegmentedDigest:
    """Takes a shard's segments in order; `value()` is the digest's text."""

    def __init__(self) -> None:
        self._digests: list[bytes] = []

    def add(self, segment: memoryview) -> None:
        """Hash the next segment: 32 MiB, or less for the last one."""
        self._digests.append(xxhash.xxh3_128_digest(segment))

    def value(self) -> str:
        return combined(self._digests)


def combined(digests: Iterable[bytes]) -> str:
    """The digest's text, given those of the segments in order."""
    return f"{ALGORITHM}:{xxhash.xxh3_128_hexdigest(b''.join(digests))}"


def segment_digests(content: memoryview) -> list[bytes]:
    """16 bytes for each segment of a shard."""
    return [xxhash.xxh3_128_digest(content[start:stop]) for start, stop in segments(len(content))]


def segments(nbytes: int) -> Iterator[tuple[int, int]]:
    """`(start, stop)` of each segment of a shard of `nbytes`."""
    for start in range(0, nbytes, SEGMENT_BYTES):
        yield start, min(start + SEGMENT_BYTES, nbytes)


def digest_of(content: memoryview | bytes) -> str:
    """Digest of a whole shard."""
    view = memoryview(content)
    digest = SegmentedDigest()
    for start, stop in segments(len(view)):
        digest.add(view[start:stop])
    return digest.value()


def is_digest(text: object) -> bool:
    """Whether `text` has the form of a digest."""
    if not isinstance(text, str):
        return False
    name, _, digits = text.partition(":")
    return name == ALGORITHM and len(digits) == 32 and all(c in "0123456789abcdef" for c in digits)
