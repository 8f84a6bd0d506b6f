"""How fast is this node? Copying, hashing, writing and sending, measured in little time and with little memory.

Every measurement works on one buffer of `BUFFER_BYTES`, goes on for at most `seconds`, and takes the best round: what
disturbed the others is not the node's. Files are made in a directory of their own and removed whatever happens. The
network is only loopback: an upper bound that a real one, which `--network-bytes-per-s` tells, will not reach.
"""

from __future__ import annotations

import mmap
import os
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from resilience.errors import CommandError
from resilience.foresight.costs import Bandwidths
from resilience.runtime.clock import Clock

__all__ = ["BUFFER_BYTES", "Measured", "measure_node"]

BUFFER_BYTES = 64 << 20
_LEFT_FREE = 4  # a place must have so many times the buffer to spare
_PIECE = 1 << 20
_PEER_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Measured:
    """Bytes per second; `mount`: writing new pages of the shared-memory mount, which only a first save does."""

    memory: float
    mount: float
    hash: float
    disk: float
    loopback: float

    def bandwidths(self, network: float | None, shared: float | None, assumed: Bandwidths) -> Bandwidths:
        """What is known of the network and the shared storage goes before what loopback says, and what is assumed."""
        return Bandwidths(self.memory, self.hash, self.disk, network or self.loopback, shared or assumed.shared)


def measure_node(memory: Path, disk: Path, clock: Clock, *, seconds: float = 1.0) -> Measured:
    """`memory` and `disk`: existing directories on the mounts to measure. Takes about 5 × `seconds` at most.

    Raises CommandError where a place has no room to spare, before anything is written there.
    """
    for place in (memory, disk):
        _check_room(place)
    source = np.arange(BUFFER_BYTES // 8, dtype=np.uint64)

    def rate(work: Callable[[], object]) -> float:
        return _rate(work, BUFFER_BYTES, seconds, clock)

    hashed = rate(lambda: xxhash.xxh3_128_digest(source.data))
    with _scratch(memory) as folder:
        copied, fresh = _into_mount(folder / "buffer", source, rate)
    with _scratch(disk) as folder:
        written = rate(lambda: _write(folder / "buffer", source))
    return Measured(copied, fresh, hashed, written, _loopback(source, seconds, clock))


def _rate(work: Callable[[], object], nbytes: int, seconds: float, clock: Clock) -> float:
    best, until = 0.0, clock.now() + seconds
    while best == 0.0 or clock.now() < until:
        began = clock.now()
        work()
        best = max(best, nbytes / max(clock.now() - began, 1e-9))
    return best


def _check_room(place: Path) -> None:
    try:
        found = os.statvfs(place)
    except OSError as error:
        raise CommandError(f"{place} cannot be measured: {error.strerror}.", status=2) from error
    free = found.f_bavail * found.f_frsize
    if free < _LEFT_FREE * BUFFER_BYTES:
        raise CommandError(
            f"{place} has {free} bytes free; a measurement wants {_LEFT_FREE * BUFFER_BYTES}, to do no harm.", status=3
        )


@contextmanager
def _scratch(place: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=".resilience-measure-", dir=place) as folder:
        yield Path(folder)


def _into_mount(path: Path, source: np.ndarray, rate: Callable[[Callable[[], object]], float]) -> tuple[float, float]:
    """Into warm pages, and into new ones."""

    def anew() -> None:
        path.unlink(missing_ok=True)
        _map_and_fill(path, source)

    fresh = rate(anew)
    with path.open("r+b") as stream, mmap.mmap(stream.fileno(), BUFFER_BYTES) as mapped:
        _fill(mapped, source)
        warm = rate(lambda: _fill(mapped, source))
    return warm, fresh


def _map_and_fill(path: Path, source: np.ndarray) -> None:
    with path.open("w+b") as stream:
        os.posix_fallocate(stream.fileno(), 0, BUFFER_BYTES)
        with mmap.mmap(stream.fileno(), BUFFER_BYTES) as mapped:
            _fill(mapped, source)


def _fill(mapped: mmap.mmap, source: np.ndarray) -> None:
    np.copyto(np.frombuffer(mapped, dtype=source.dtype), source)  # no view stays: a mapping with one cannot be closed


def _write(path: Path, source: np.ndarray) -> None:
    with path.open("wb") as stream:
        stream.write(source.data)
        stream.flush()
        os.fsync(stream.fileno())


def _loopback(source: np.ndarray, seconds: float, clock: Clock) -> float:
    """Through one TCP connection to ourselves, in one direction."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(_PEER_TIMEOUT_S)
        with socket.create_connection(server.getsockname(), _PEER_TIMEOUT_S) as sender:
            receiver, _ = server.accept()
            receiver.settimeout(_PEER_TIMEOUT_S)
            drain = threading.Thread(target=_drain, args=(receiver,), name="resilience-measure")
            drain.start()
            try:
                best = _rate(lambda: sender.sendall(source.data.cast("B")), BUFFER_BYTES, seconds, clock)
                sender.shutdown(socket.SHUT_WR)
            finally:
                sender.close()
                drain.join(_PEER_TIMEOUT_S)
    return best


def _drain(receiver: socket.socket) -> None:
    room = bytearray(_PIECE)
    with receiver:
        try:
            while receiver.recv_into(room):
                pass
        except OSError:
            return  # the sender gave up, and says so itself
