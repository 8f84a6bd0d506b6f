"""A parity file: a safetensors file with a P, for `rs` also a Q, whose header says what it was made of.

The header has a fixed size for its clique, so that the file's size is known before any shard's digest is. Reading
validates everything before a byte is believed, as with shards. Free of torch.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Final

from resilience.errors import CorruptCopyError, in_short
from resilience.planning.erasure import LARGEST_CLIQUE, Code
from resilience.planning.inventory import ParityCover, SaveId
from resilience.stores.records import ShardRecord

__all__ = ["ParityHeader", "check_parity_header", "parity_bounds", "parity_header", "read_parity_header"]

_NAMES: Final = ("p", "q")
_HEADER_LIMIT: Final = 64 << 10
_LARGEST_SHARD: Final = 1 << 60


@dataclass(frozen=True)
class ParityHeader:
    """What a parity file says of itself: it is that of the clique's member `index`."""

    run_id: str
    save: SaveId
    index: int
    world_size: int
    cover: ParityCover


def parity_bounds(cover: ParityCover, parity: int) -> tuple[int, int]:
    """Where the P (0) or Q (1) lies in a file of this cover."""
    code = Code(len(cover.members), cover.parities)
    stripe = code.stripe_bytes(max(cover.nbytes))
    start = code.header_bytes + parity * stripe
    return start, start + stripe


def parity_header(header: ParityHeader) -> bytes:
    """The first bytes of the file."""
    cover = header.cover
    code = Code(len(cover.members), cover.parities)
    stripe = code.stripe_bytes(max(cover.nbytes))
    identity = {
        "run_id": header.run_id,
        "attempt": header.save.attempt,
        "generation": header.save.generation,
        "iteration": header.save.iteration,
        "index": header.index,
        "world_size": header.world_size,
        "members": ",".join(map(str, cover.members)),
        "bytes": ",".join(map(str, cover.nbytes)),
        "digests": ",".join(cover.digests),
    }
    fields: dict[str, Any] = {"__metadata__": {"resilience": json.dumps(identity, separators=(",", ":"))}}
    for place, name in enumerate(_NAMES[: cover.parities]):
        offsets = [place * stripe, (place + 1) * stripe]
        fields[name] = {"dtype": "U8", "shape": [stripe], "data_offsets": offsets}
    text = json.dumps(fields, separators=(",", ":")).encode()
    room = code.header_bytes - 8
    if len(text) > room:
        raise ValueError(f"a parity header of {len(text)} bytes in {room}")
    return room.to_bytes(8, "little") + text.ljust(room, b" ")


def read_parity_header(content: memoryview, what: str) -> ParityHeader:
    """Of the file whose whole bytes are `content`; CorruptCopyError names `what`."""
    try:
        header = _read(content)
        canonical = parity_header(header)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError, OverflowError) as error:
        raise CorruptCopyError(f"{what}: its header is not one of parity ({in_short(error)}).") from error
    cover = header.cover
    nbytes = Code(len(cover.members), cover.parities).file_bytes(max(cover.nbytes))
    if len(content) != nbytes or content[: len(canonical)] != canonical:
        raise CorruptCopyError(f"{what}: its header does not describe its {len(content)} bytes.")
    return header


def _read(content: memoryview) -> ParityHeader:
    size = int.from_bytes(content[:8], "little")
    if size > min(_HEADER_LIMIT, len(content) - 8):
        raise ValueError(f"it claims {size} bytes in a file of {len(content)}")
    fields = json.loads(bytes(content[8 : 8 + size]))
    identity = json.loads(fields["__metadata__"]["resilience"])
    members, nbytes = (tuple(map(int, identity[key].split(","))) for key in ("members", "bytes"))
    cover = ParityCover(int("q" in fields) + 1, members, nbytes, tuple(identity["digests"].split(",")))
    save = SaveId(identity["iteration"], identity["generation"], identity["attempt"])
    numbers = (identity["index"], identity["world_size"], save.iteration, save.generation)
    if not cover.parities < len(members) <= LARGEST_CLIQUE or not len(nbytes) == len(cover.digests) == len(members):
        raise ValueError(f"{len(members)} members, {len(nbytes)} sizes, {len(cover.digests)} digests")
    if any(type(number) is not int for number in numbers) or not all(0 < each <= _LARGEST_SHARD for each in nbytes):
        raise ValueError(f"numbers out of range: {numbers}, {nbytes}")
    if not 0 <= identity["index"] < len(members):
        raise ValueError(f"member {identity['index']} of {len(members)}")
    return ParityHeader(identity["run_id"], save, identity["index"], identity["world_size"], cover)


def check_parity_header(header: ParityHeader, record: ShardRecord, what: str) -> None:
    """Raise CorruptCopyError if the file and its record do not speak of the same save, rank and shards."""
    rank = header.cover.members[header.index]
    found = (header.run_id, header.save, rank, header.world_size, header.cover)
    expected = (record.run_id, record.save, record.owner, record.world_size, record.cover)
    if found != expected:
        raise CorruptCopyError(f"{what}: its header says {found}, its record {expected}.")
