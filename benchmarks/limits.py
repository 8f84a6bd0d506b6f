"""What the machine can do: copy the same bytes, hash them, send them over the network both ways at once, and write
them to a disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch.distributed.distributed_c10d import PrefixStore

from benchmarks.rank import Place, timed
from resilience.stores.digest import segments
from resilience.stores.filesystem import PosixFileSystem

__all__ = ["Limits"]


class Limits:
    """Warm buffers of a shard's size: the source in ordinary memory, like live tensors; the targets on the mount."""

    def __init__(self, place: Place, nbytes: int | None = None, repeat: int = 1) -> None:
        """`nbytes`: of the buffers, unless those of a shard. `repeat`: all is done so many times over."""
        nbytes = place.settings.shard_bytes if nbytes is None else nbytes
        self._repeat = repeat
        self._files = files = PosixFileSystem()
        self._source = torch.full((nbytes,), place.rank + 1, dtype=torch.uint8)
        paths = [place.directory / f"{name}-{place.rank}.buffer" for name in ("out", "in")]
        self._mapped = [files.create_mapping(path, nbytes) for path in paths]
        for path in paths:
            files.unlink(path)  # the mapping stays
        self._out, self._in = (torch.frombuffer(mapped.view, dtype=torch.uint8) for mapped in self._mapped)
        self._segments = list(segments(nbytes))
        self._rank = place.rank
        self._next, self._before = (place.rank + 1) % place.size, (place.rank - 1) % place.size
        store: Any = dist.distributed_c10d._get_default_store()
        self._group: Any = dist.ProcessGroupGloo(
            PrefixStore("benchmark-links", store), place.rank, place.size, timedelta(seconds=120)
        )

    def measures(self) -> dict[str, Callable[..., dict[str, Any]]]:
        return {
            "memcpy": self.memcpy,
            "hash": self.hash,
            "gloo": self.gloo,
            "gloo_one_way": self.gloo_one_way,
            "disk": self.disk,
        }

    def memcpy(self) -> dict[str, Any]:
        """A warm copy of one shard's bytes, on all ranks at once."""
        return {"seconds": self._repeat * timed(lambda: self._out.copy_(self._source))}

    def hash(self) -> dict[str, Any]:
        """xxh3-128 of the shard, segment by segment."""
        view = self._mapped[0].view
        hashed = timed(lambda: [xxhash.xxh3_128_digest(view[a:b]) for a, b in self._segments])
        return {"seconds": self._repeat * hashed}

    def gloo(self) -> dict[str, Any]:
        """The shard to the next rank and the one before's here: all receives, then all sends posted, waited for in
        order."""
        return {"seconds": self._repeat * timed(lambda: _wait(self._receive() + self._send()))}

    def gloo_one_way(self) -> dict[str, Any]:
        """Two shards' bytes from rank 0 of two to rank 1, as a rank that lost its node fetches them."""
        way = self._send if self._rank == 0 else self._receive
        return {"seconds": timed(lambda: _wait(way() + way()))}

    def disk(self) -> dict[str, Any]:
        """The shard written to a new file of the temporary directory, and fsynced, on all ranks at once."""
        chunks = (self._mapped[0].view[a:b] for a, b in self._segments)
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "shard"
            return {"seconds": self._repeat * timed(lambda: self._files.write_file(path, chunks))}

    def _receive(self) -> list[Any]:
        return [self._group.recv([self._in[a:b]], self._before, 1) for a, b in self._segments]

    def _send(self) -> list[Any]:
        return [self._group.send([self._out[a:b]], self._next, 1) for a, b in self._segments]

    def close(self) -> None:
        self._group.abort()


def _wait(works: list[Any]) -> None:
    for work in works:
        work.wait()
