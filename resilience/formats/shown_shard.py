"""What a shard shows of itself to ranks that do not have it: header, values, small tensors, digests of its segments.

Enough to plan a load. Crosses ranks as frames of bytes: nothing is unpickled, every length is checked.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from resilience.errors import CorruptCopyError, in_short
from resilience.formats.in_common import place_sum
from resilience.formats.shard_parts import is_small
from resilience.snapshot.arena import typed_view
from resilience.snapshot.loader import OpenShard
from resilience.state.saved_world import fingerprint
from resilience.stores.shard_file import SavedPiece, ShardHeader, read_header

__all__ = ["ShownShard", "frames", "mark_of", "shown_bytes", "shown_of", "small_marks", "unframed"]

_LENGTH_BYTES = 8


@dataclass(frozen=True)
class ShownShard:
    """What every rank knows of a shard. `small`: by the byte at which each begins, tensors that came along.

    `segments`: digests of its segments, which together give the owner's digest.
    """

    header: ShardHeader
    nbytes: int
    values: bytes
    small: Mapping[int, bytes]
    segments: tuple[bytes, ...]


def shown_bytes(shard: OpenShard, segments: Sequence[bytes]) -> bytes:
    """For all ranks, of a shard that was verified; `segments`: the digests found."""
    view, header = shard.mapped.view, shard.header
    head = view[: _LENGTH_BYTES + int.from_bytes(view[:_LENGTH_BYTES], "little")]
    about = {"nbytes": len(view), "segments": [digest.hex() for digest in segments]}
    start, stop = header.values
    small = (view[piece.start : piece.stop] for piece in _small_pieces(header))
    return frames([json.dumps(about).encode(), head, view[start:stop], *small])


def shown_of(content: memoryview) -> ShownShard:
    """CorruptCopyError if that is not what a shard shows."""
    try:
        about, head, values, *small = unframed(content)
        fields = json.loads(bytes(about))
        nbytes, segments = fields["nbytes"], tuple(map(bytes.fromhex, fields["segments"]))
        if type(nbytes) is not int:
            raise CorruptCopyError(f"a shard has {nbytes!r} bytes.")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CorruptCopyError(f"what was told of a shard makes no sense ({in_short(error)}).") from error
    header = read_header(head, "a shard that a rank told of", nbytes)
    pieces = list(_small_pieces(header))
    lengths = [piece.stop - piece.start for piece in pieces]
    if len(values) != header.values[1] - header.values[0] or [len(each) for each in small] != lengths:
        raise CorruptCopyError(f"what was told of rank {header.owner}'s shard is not what its header says.")
    tensors = {piece.start: bytes(each) for piece, each in zip(pieces, small, strict=True)}
    return ShownShard(header, nbytes, bytes(values), tensors, segments)


def mark_of(shard: OpenShard, piece: SavedPiece) -> str:
    """The content of a piece, as `shard_parts.to_be_marked` wants it."""
    tensor = typed_view(shard.content(), piece.start, _dtype(piece.dtype), piece.shape)
    return str(place_sum(piece, tensor)) if piece.shared else fingerprint(tensor)


def small_marks(shard: ShownShard) -> dict[str, str]:
    """Of a rank's own pieces that came along."""
    marks = {}
    for piece in shard.header.pieces.values():
        if not piece.shared and is_small(piece):
            content = torch.frombuffer(bytearray(shard.small.get(piece.start, b"") or b"\0"), dtype=torch.uint8)
            marks[piece.key] = fingerprint(typed_view(content, 0, _dtype(piece.dtype), piece.shape))
    return marks


def frames(parts: Iterable[bytes | memoryview]) -> bytes:
    """Each part behind its length."""
    return b"".join(piece for part in parts for piece in (len(part).to_bytes(_LENGTH_BYTES, "little"), part))


def unframed(content: memoryview) -> list[memoryview]:
    """The parts; CorruptCopyError if the lengths do not add up."""
    found, at = [], 0
    while at < len(content):
        start = at + _LENGTH_BYTES
        at = start + int.from_bytes(content[at:start], "little")
        found.append(content[start:at])
    if at != len(content):
        raise CorruptCopyError(f"{len(content)} bytes were told, in parts of {at}.")
    return found


def _small_pieces(header: ShardHeader) -> Iterator[SavedPiece]:
    return (piece for piece in header.pieces.values() if is_small(piece) and piece.stop > piece.start)


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)  # type: ignore[no-any-return]  # `read_header` admits names of dtypes only
