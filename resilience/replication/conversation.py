"""The control exchange between two boundaries: started at one, heard at the next, never more than one under way."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from resilience.planning.control import ControlAgreement, ControlReport, decode, encode
from resilience.planning.inventory import SaveId
from resilience.replication.communicator import Control

__all__ = ["Conversation"]


class Conversation:
    """Every rank speaks and hears the same number of times, in the same order."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self._slots: tuple[SaveId, ...] | None = None  # what the exchange under way reports on

    @property
    def under_way(self) -> bool:
        return self._slots is not None

    def speak(self, report: ControlReport, slots: Sequence[SaveId]) -> None:
        """Start an exchange about `slots`, the saves in the making. Does not wait."""
        self._slots = tuple(slots)
        self._control.start(partial(encode, report, self._slots), decode)

    def hear(self) -> tuple[ControlAgreement, tuple[SaveId, ...]] | None:
        """What all ranks agreed in the exchange under way and what it was about; None if there is none.

        Raises DivergedRanksError on all ranks alike, PeerLostError if a rank is gone.
        """
        if self._slots is None:
            return None
        slots, self._slots = self._slots, None
        agreed: ControlAgreement = self._control.result()
        return agreed, slots

    def close(self) -> None:
        self._control.close()
