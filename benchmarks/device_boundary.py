"""`python -m benchmarks.device_boundary [--device cuda] [--mb 2136]`: a save's boundary alone, and where its time goes.

For one rank and both shapes of state that `device.py` has: the boundary's milliseconds in both modes, and for thousands
of small tensors a profile of the training thread.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import pstats
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.device import MODES, SHAPES, Job
from benchmarks.rank import Place
from benchmarks.settings import QUICK


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.device_boundary", description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--mb", type=int, default=2136, help="of the state: parameters and Adam's moments")
    given = parser.parse_args(arguments)
    place = Path(tempfile.mkdtemp(prefix="resilience-bench-", dir="/dev/shm"))
    try:
        for shape, count in SHAPES.items():
            for mode in MODES:
                where = Place(0, 1, place / f"{shape}-{mode}", QUICK, {"device": given.device})
                where.node_directory.mkdir(parents=True)
                job = Job(where, "boundary", mode, count, given.mb * 1_000_000 // 12 // count)
                _measure(job, f"{shape}, {mode}", profile=shape == "small")
                job.controller.close()
                del job
                shutil.rmtree(place / f"{shape}-{mode}")
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return 0


def _measure(job: Job, name: str, *, profile: bool) -> None:
    profiler = cProfile.Profile()
    seconds = []
    for number in range(-4, 14):
        if job.device.type == "cuda":
            torch.cuda.current_stream(job.device).synchronize()
        profiled = profile and number >= 8
        if profiled:
            profiler.enable()
        began = time.perf_counter()
        job.boundary()
        took = time.perf_counter() - began
        profiler.disable()
        seconds += [took] if 0 <= number < 8 else []
        time.sleep(0.1)
        job.optimizer.step()
        job.settle()
    print(f"{name}: {median(seconds) * 1e3:.1f} ms ({min(seconds) * 1e3:.1f} to {max(seconds) * 1e3:.1f})", flush=True)
    if profile:
        text = io.StringIO()
        pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(12)
        print("\n".join(text.getvalue().splitlines()[4:]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
