"""Where a value lies on a logarithmic axis."""

from __future__ import annotations

import math

__all__ = ["share"]


def share(value: float, low: float, high: float) -> float:
    """Between 0 (at `low`) and 1 (at `high`); what lies outside is drawn at the edge."""
    return math.log(min(max(value, low), high) / low) / math.log(high / low)
