"""Figures: what this package costs, held against what the machine can do and what users would otherwise use.

`python -m benchmarks --out bench-out` (or `make bench`). Everything is measured with real processes on one state, ours
and the others in turn, and told as ratios of one round, because absolute figures drift by half from run to run.
"""
