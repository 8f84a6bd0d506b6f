"""Which saves a person may delete from outside the job: the command line's own retention, more careful than the job's.

The job decides on agreed states; here only records are in sight. Never deleted are the newest complete save and the
newest one that has as many copies as any. Where something newer was complete once and is not in sight, or no save is
complete in sight (a node is missing), only abandoned saves go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resilience.planning.catalog import CatalogEntry
from resilience.planning.inventory import SaveId
from resilience.planning.retention import SaveState, deletable

__all__ = ["Verdict", "verdicts"]


@dataclass(frozen=True)
class Verdict:
    """What happens to one save and why."""

    entry: CatalogEntry
    delete: bool
    reason: str


def verdicts(
    entries: Sequence[CatalogEntry], *, known_complete: Sequence[SaveId], keep_last: int | None
) -> tuple[list[Verdict], str]:
    """Judge the saves of one run that lie on nodes, and say what held the judgement back ("" if nothing).

    `entries`: all saves of the run, shared ones too. `known_complete`: saves that some log or certificate calls
    complete. Without `keep_last` every complete save is kept.
    """
    on_nodes = [entry for entry in entries if entry.on_nodes]
    restraint = _restraint(entries, known_complete)
    counted = [entry for entry in on_nodes if entry.complete and not entry.abandoned]
    most = max((entry.copies for entry in counted), default=0)
    states = [SaveState(e.save, "protected" if e.copies == most else "primary", e.held_bytes) for e in counted]
    surplus = set() if keep_last is None or restraint else set(deletable(states, keep_last=keep_last))
    newest = max((entry.save for entry in counted), default=None)
    found: list[Verdict] = []
    for entry in on_nodes:
        if entry.abandoned:
            found.append(Verdict(entry, True, entry.abandoned))
        elif entry.save in surplus:
            found.append(Verdict(entry, True, f"not among the newest {keep_last}"))
        elif not entry.complete and newest is not None and entry.save < newest and not restraint:
            found.append(Verdict(entry, True, f"incomplete, and iteration {newest.iteration} is complete"))
        elif entry.complete:
            found.append(Verdict(entry, False, "the newest complete save" if entry.save == newest else "complete"))
        else:
            found.append(Verdict(entry, False, "incomplete here, but the rest may lie out of sight"))
    return found, restraint


def _restraint(entries: Sequence[CatalogEntry], known_complete: Sequence[SaveId]) -> str:
    """Why only abandoned saves may go."""
    abandoned = {entry.save for entry in entries if entry.abandoned}
    in_sight = [entry.save for entry in entries if entry.complete and not entry.abandoned]
    newest_known = max((save for save in known_complete if save not in abandoned), default=None)
    if not any(entry.on_nodes and entry.complete and not entry.abandoned for entry in entries):
        return "no save on the nodes is complete in sight: not all owners' copies are here"
    if newest_known is not None and newest_known > max(in_sight):
        return f"iteration {newest_known.iteration} was complete once and is not in sight"
    return ""
