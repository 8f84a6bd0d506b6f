"""What a launcher that watches its workers is told of one: that it lives, and which part of its work it is in.

A launcher learns of a process that ended by itself. One that stands still (a collective that waits for ever, a device
that does not answer) it can only notice by its silence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from resilience.runtime.clock import Clock

__all__ = ["Channel", "LauncherReports", "Unheard"]

#: Between two reports of steps: a report is a round trip to another process, about a millisecond.
_EVERY_S = 1.0


class Channel(Protocol):
    """The launcher's side. Any of these may raise whatever it likes, and may take as long as the launcher takes."""

    def heartbeat(self) -> None: ...
    def begin(self, section: str) -> None: ...
    def end(self, section: str) -> None: ...
    def close(self) -> None: ...


class Unheard:
    """Of a job that no launcher listens to."""

    def heartbeat(self) -> None: ...
    def begin(self, section: str) -> None: ...
    def end(self, section: str) -> None: ...
    def close(self) -> None: ...


class LauncherReports:
    """One rank's. Used by the training thread; never raises: what cannot be told ends the reports, and that is said.

    Always in one of three sections: `setup` until the first step, `checkpointing` while a save is taken or waited for,
    `step` in between; from the last save to the end in none. A section is as long as a step, or a second.
    """

    def __init__(self, channel: Channel, clock: Clock, tell: Callable[..., None]) -> None:
        self._channel = channel
        self._clock = clock
        self._tell = tell
        self._section = ""
        self._at = clock.now()
        self._enter("setup")

    def step(self) -> None:
        """A step begins."""
        if self._section != "step" or self._clock.now() - self._at >= _EVERY_S:
            self._enter("step")

    def saving(self) -> None:
        """A save is taken or waited for."""
        if self._section != "checkpointing":
            self._enter("checkpointing")

    def close(self) -> None:
        """No more is to come, and no silence means anything."""
        self._try(self._leave)
        self._try(self._channel.close)
        self._channel = Unheard()

    def _enter(self, section: str) -> None:
        def change() -> None:
            self._leave()
            self._channel.begin(section)
            self._section, self._at = section, self._clock.now()
            self._channel.heartbeat()

        self._try(change)

    def _leave(self) -> None:
        section, self._section = self._section, ""
        if section:
            self._channel.end(section)

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except Exception as error:  # noqa: BLE001 - whatever it is, training does not depend on it
            self._channel = Unheard()
            self._tell(
                "warning", what=f"the launcher hears of this rank no more: {type(error).__name__}: {error}", advice=""
            )
