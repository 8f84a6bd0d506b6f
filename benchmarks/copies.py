"""`python -m benchmarks.copies [--mb 256] [--processes 2]`: ways to copy tensors on the host into a warm mapping.

Each in turn in every round, by all processes at once, against torch's copy of as many bytes in one piece. Behind
docs/decisions/streaming-copies.md.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch

from resilience.snapshot import streaming
from resilience.snapshot.streaming import addresses, library_in, ways_of
from resilience.stores.filesystem import PosixFileSystem

_COUNTS: Final = (96, 5000)
_MUCH: Final = 64 << 20  # written between two copies, as a step would


def ways(count: int, place: Path, nbytes: int) -> dict[str, Callable[[], Any]]:
    """By name: what copies `count` tensors, which have `nbytes` in all."""
    mapped = PosixFileSystem().create_mapping(place, nbytes)
    place.unlink()  # the mapping stays
    arena = torch.frombuffer(mapped.view, dtype=torch.uint8)
    one, each = torch.ones(nbytes, dtype=torch.uint8), nbytes // count // 4
    sources = [torch.randn(each) for _ in range(count)]
    targets = [arena[4 * each * number : 4 * each * (number + 1)].view(torch.float32) for number in range(count)]
    memcpy = ctypes.CDLL(None).memcpy
    memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

    def one_by_one() -> None:
        for target, source in zip(targets, sources, strict=True):
            memcpy(target.data_ptr(), source.data_ptr(), source.nbytes)

    def together(way: Callable[..., None]) -> Callable[[], None]:
        into, sizes = addresses(map(torch.Tensor.data_ptr, targets)), addresses(source.nbytes for source in sources)
        return lambda: way(into, addresses(map(torch.Tensor.data_ptr, sources)), sizes)

    found: dict[str, Callable[[], Any]] = {
        "one piece": lambda: arena.copy_(one),
        "torch": lambda: torch._foreach_copy_(targets, sources),
        "memcpy": one_by_one,
    }
    library = library_in(Path(streaming.__file__).parent)
    if library is not None:
        around, through, _ = ways_of(library)
        found |= {"through the cache": together(through), "around the cache": together(around)}
    return found


def measure(barrier: Any, results: Any, directory: Path, nbytes: int, rounds: int) -> None:
    """One process: the median ratios to the copy in one piece, and its milliseconds, by count and way."""
    torch.set_num_threads(1)
    other = torch.ones(_MUCH, dtype=torch.uint8)
    told: dict[str, dict[str, float]] = {}
    for count in _COUNTS:
        found = ways(count, directory / f"{multiprocessing.current_process().name}-{count}", nbytes)
        taken: dict[str, list[float]] = defaultdict(list)
        for number in range(-1, rounds):
            for name, copy in found.items():
                other.add_(1)
                barrier.wait()
                began = time.perf_counter()
                copy()
                taken[name] += [time.perf_counter() - began] if number >= 0 else []
        told[str(count)] = {
            name: median(one / whole for one, whole in zip(each, taken["one piece"], strict=True))
            for name, each in taken.items()
        } | {"one piece, ms": median(taken["one piece"]) * 1e3}
    results.put(told)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.copies", description=__doc__)
    parser.add_argument("--mb", type=int, default=256)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    given = parser.parse_args(arguments)
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(given.processes, timeout=60), context.Queue()
    with tempfile.TemporaryDirectory(prefix="resilience-bench-", dir="/dev/shm") as directory:
        work = (barrier, results, Path(directory), given.mb << 20, given.rounds)
        workers = [context.Process(target=measure, args=work) for _ in range(given.processes)]
        for worker in workers:
            worker.start()
        told = [results.get(timeout=600) for _ in workers]
        for worker in workers:
            worker.join()
    slowest: Mapping[str, Mapping[str, float]] = {
        count: {name: round(max(each[count][name] for each in told), 2) for name in told[0][count]} for count in told[0]
    }
    print(json.dumps(slowest, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
