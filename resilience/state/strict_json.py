"""JSON as `encode` writes it: no NaN, no infinity, no number that no float has, which `json` would all let pass."""

from __future__ import annotations

import json
import math
from typing import Any

from resilience.errors import CorruptCopyError

__all__ = ["finite", "json_of", "no_constant"]


def json_of(values: bytes) -> Any:
    """CorruptCopyError, or ValueError and RecursionError as of `json.loads`."""
    return json.loads(values, parse_constant=no_constant, parse_float=finite)


def no_constant(name: str) -> Any:
    raise CorruptCopyError(f"The values of a save hold {name}, which is not JSON.")


def finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise CorruptCopyError(f"The values of a save hold the number {text[:80]}, which no float has.")
    return number
