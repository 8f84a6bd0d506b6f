"""Which saves are due at a boundary. Every input is agreed between the ranks, so that all of them decide alike."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Due:
    """What happens at this boundary. Both kinds due together means one snapshot, kept in both places."""

    non_persistent: bool
    persistent: bool
    stop: bool


_NOTHING = Due(non_persistent=False, persistent=False, stop=False)


def due_at(
    iteration: int,
    *,
    save_interval: int | None,
    non_persistent_interval: int | None,
    requested_non_persistent: bool,
    requested_persistent: bool,
    stop_requested: bool,
    last: bool,
    save_set: bool,
    non_persistent_set: bool,
) -> Due:
    """Decide from the interval, agreed requests, an agreed stop, and whether this is the last iteration.

    A stop causes a persistent save where `save` is set, else a non-persistent one. In the last iteration there is
    nothing left to stop: the run finishes, with a last persistent save where `save` is set.
    """
    persistent = save_set and (requested_persistent or last or stop_requested or _reached(iteration, save_interval))
    stop_without_save = stop_requested and not save_set
    non_persistent = non_persistent_set and (
        requested_non_persistent or stop_without_save or _reached(iteration, non_persistent_interval)
    )
    stop = stop_requested and not last
    return Due(non_persistent, persistent, stop) if non_persistent or persistent or stop else _NOTHING


def _reached(iteration: int, interval: int | None) -> bool:
    return interval is not None and interval > 0 and iteration > 0 and iteration % interval == 0


def shortest_interval(wished: int | None, cadence: str) -> int | None:
    """How closely non-persistent saves may follow each other, in steps: what memory must be there for.

    `wished` is the configured interval (None: only on request); with `cadence="auto"` what is measured may say 1.
    """
    return 1 if wished is not None and cadence == "auto" else wished
