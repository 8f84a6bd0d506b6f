"""How often to save: the interval that loses least time, from the cost of a save and the rate of failures.

Young (1974) balances the time spent saving against the work lost at a failure; Daly (2006) adds the terms that matter
when failures are frequent. `expected_goodput` is Daly's complete model, so that other intervals can be compared.

J. W. Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974; J. T. Daly, "A higher
order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006
(DOI 10.1016/j.future.2004.11.016).
"""

from __future__ import annotations

import math


def best_interval(
    *, save_s: float, step_s: float, mtbf_s: float, shortest_steps: int = 1, longest_steps: int = 1_000_000
) -> int:
    """Steps between saves, within the bounds.

    `save_s`: seconds that a save costs the training thread; `step_s`: seconds of a step; `mtbf_s`: mean seconds
    between failures of the whole job.
    """
    assert 1 <= shortest_steps <= longest_steps, "bounds of the interval"
    if step_s <= 0 or mtbf_s <= 0:  # nothing measured yet: lose as little as the bounds allow
        return shortest_steps
    steps = round(_daly_s(max(save_s, 0.0), mtbf_s) / step_s)
    return min(max(steps, shortest_steps), longest_steps)


def young_s(save_s: float, mtbf_s: float) -> float:
    """Young's first-order optimum: seconds of work between saves."""
    return math.sqrt(2 * save_s * mtbf_s)


def _daly_s(save_s: float, mtbf_s: float) -> float:
    if save_s >= 2 * mtbf_s:
        return mtbf_s
    ratio = save_s / (2 * mtbf_s)
    return young_s(save_s, mtbf_s) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - save_s


def expected_goodput(
    interval_steps: int, *, save_s: float, step_s: float, mtbf_s: float, restart_s: float = 0.0
) -> float:
    """Share of wall time that ends up as kept training steps, between 0 and 1."""
    work_s = interval_steps * step_s
    exponent = (work_s + save_s) / mtbf_s
    if exponent + restart_s / mtbf_s > 700:  # beyond the largest double: nothing is ever finished
        return 0.0
    wall_s = mtbf_s * math.exp(restart_s / mtbf_s) * math.expm1(exponent)
    return min(1.0, work_s / wall_s) if wall_s > 0 else 1.0
