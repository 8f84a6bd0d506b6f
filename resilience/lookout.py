"""Keeps an eye on how well the job is protected, and says so when that changes: cautions, and that they are over.

Fed by the ledger with what all ranks agreed on, so that all ranks come to the same; rank 0 speaks for them.
"""

from __future__ import annotations

from collections.abc import Callable

from resilience.planning.book import Change
from resilience.planning.caution import Standing, cautions
from resilience.planning.inventory import Tier

__all__ = ["Lookout"]


class Lookout:
    """Of one start. Used by the training thread; local."""

    def __init__(self, tell: Callable[..., None], *, begun: int, replicated: bool, mtbf_hours: float | None) -> None:
        """`begun`: the iteration resumed from. `replicated`: whether saves on nodes are to have replicas, or parity."""
        self._tell = tell
        self._begun = begun
        self._replicated = replicated
        self._mtbf_s = None if mtbf_hours is None else 3600 * mtbf_hours
        self._complete: int | None = None
        self._protected: int | None = None
        self._lacking = False
        self._in_force: set[str] = set()

    def note(self, change: Change, tier: Tier) -> None:
        """What became known of one save."""
        iteration = change.save.iteration
        if change.what in ("complete", "persistent"):
            self._complete = max(self._complete or 0, iteration)
        if change.what in ("protected", "persistent"):
            self._protected = max(self._protected or 0, iteration)
        if change.what in ("protected", "unprotected") and self._replicated:
            self._lacking = change.what == "unprotected"
            if change.what == "protected":
                self._tell("replicated", iteration=iteration, generation=change.save.generation, tier=tier)

    def look(self, iteration: int, interval: int | None, *, step_s: float, save_s: float) -> None:
        """Compare with the last time, and tell the difference. `step_s`, `save_s`: 0 where nothing was measured."""
        standing = Standing(
            iteration, self._begun, interval, self._replicated, self._complete, self._protected, self._lacking,
            step_s, save_s, self._mtbf_s,
        )  # fmt: skip
        found = {caution.kind: caution for caution in cautions(standing)}
        for kind, caution in found.items():
            if kind not in self._in_force:
                self._tell("caution", kind=kind, iteration=iteration, what=caution.what, advice=caution.advice)
        for over in sorted(self._in_force - set(found)):
            self._tell("caution_over", kind=over, iteration=iteration)
        self._in_force = set(found)
