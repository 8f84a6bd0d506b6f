"""Numbers as options of the command line: what is allowed, and what is said of anything else."""

from __future__ import annotations

import argparse
import math

__all__ = ["above_zero", "from_zero", "share_of_all"]


def from_zero(text: str) -> float:
    number = float(text)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 on")
    return number


def above_zero(text: str) -> float:
    number = float(text)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def share_of_all(text: str) -> float:
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{text} is no share between 0 and 1")
    return number


for _kind in (from_zero, above_zero, share_of_all):
    _kind.__name__ = "number"  # argparse says "invalid number value: 'x'"
