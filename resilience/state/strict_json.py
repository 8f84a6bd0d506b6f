"""JSON as `encode` writes it: no NaN, no infinity, no number that no float has, which `json` would all let pass."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

from resilience.errors import CorruptCopyError, in_short

__all__ = ["json_of", "not_parsed"]


def json_of(values: bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """`pairs` makes an object of its entries, as `json.loads` takes it. CorruptCopyError, whatever is wrong."""
    try:
        return json.loads(values, object_pairs_hook=pairs, parse_constant=_no_constant, parse_float=_finite)
    except CorruptCopyError:
        raise
    except (ValueError, RecursionError) as error:
        raise not_parsed(error) from error


def not_parsed(error: Exception) -> CorruptCopyError:
    return CorruptCopyError(f"The values of a save do not parse ({in_short(error)}).")


def _no_constant(name: str) -> Any:
    raise CorruptCopyError(f"The values of a save hold {name}, which is not JSON.")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise CorruptCopyError(f"The values of a save hold the number {text[:80]}, which no float has.")
    return number
