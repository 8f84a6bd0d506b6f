"""Plans that are kept from save to save, by the digests of what each rank has.

A persistent directory and a non-persistent one may be saved in turn: so two are kept.
"""

from __future__ import annotations

from typing import Final, Generic, TypeVar

__all__ = ["Kept"]

_PLANS: Final = 2

PlanT = TypeVar("PlanT")


class Kept(Generic[PlanT]):
    """The last plans of one series of saves; for the same structures on all ranks."""

    def __init__(self) -> None:
        self._plans: dict[tuple[str, ...], PlanT] = {}

    def find(self, structures: tuple[str, ...]) -> PlanT | None:
        """The plan of such structures, in rank order, if it is known."""
        return self._plans.get(structures)

    def remember(self, structures: tuple[str, ...], plan: PlanT) -> None:
        """Keep a plan; the oldest one goes."""
        self._plans[structures] = plan
        while len(self._plans) > _PLANS:
            self._plans.pop(next(iter(self._plans)))
