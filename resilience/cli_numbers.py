"""Numbers as options of the command line: what is allowed, and what is said of anything else."""

from __future__ import annotations

import argparse
import math
import re

__all__ = ["above_zero", "byte_count", "from_zero", "share_of_all"]

_BYTES = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


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


def byte_count(text: str) -> int:
    """`80000000000`, `80e9`, `80GB` or `74.5GiB`: at least one byte."""
    number = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e\+?[0-9]{1,2})?"
    found = re.fullmatch(rf"({number})\s*([kmgt]i?)?b?", text.strip().lower())
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes, such as 80e9, 80GB or 75GiB")
    count = int(float(found[1]) * _BYTES[found[2] or ""])
    if count < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than one byte")
    return count


for _kind in (from_zero, above_zero, share_of_all):
    _kind.__name__ = "number"  # argparse says "invalid number value: 'x'"
