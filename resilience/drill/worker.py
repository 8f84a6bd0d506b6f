"""Runs the drilled script as the main program, with every generator of random numbers at a fixed place to begin with.

    python -m resilience.drill.worker SCRIPT ARGS…

torch, NumPy and `random` draw their first seeds from the system. A script that sets none is drilled all the same, and
one that sets only torch's need not care for the others: two runs of it end in states that can be compared. Seeds that
the script sets itself come later and count.
"""

from __future__ import annotations

import os
import random
import runpy
import sys

import numpy
import torch


def main() -> None:
    rank = int(os.environ.get("RANK", "0"))
    random.seed(rank)
    numpy.random.seed(rank)
    torch.manual_seed(rank)
    script = sys.argv[1]
    sys.argv[:] = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
