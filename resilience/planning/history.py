"""What the attempt logs, certificates and folders tell of the run: what was completed, abandoned, tried in vain."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from resilience.planning.inventory import AttemptLog, Inventory, SaveId

#: Stands for the base of a fresh start: older than every save.
_NOTHING = SaveId(-1, -1, "")


@dataclass(frozen=True)
class History:
    """The run as its sources tell it.

    `attempts`: one merged log each, oldest first. `completed`: saves known to have been complete once, whether they are
    usable now or not. `highest_generation` counts unfinished attempts and incomplete saves too.
    """

    attempts: tuple[AttemptLog, ...]
    completed: frozenset[SaveId]
    highest_generation: int

    def fork_is_logged(self, ckpt_step: int, fork_id: str) -> bool:
        """Whether this start with `ckpt_step` is an automatic restart of one that has begun already."""
        return any(log.fork == (ckpt_step, fork_id) for log in self.attempts)


def read_history(inventories: Sequence[Inventory], run_id: str) -> History:
    """Merge what all sources answered. Other runs' records say nothing about this one."""
    logs = [log for inventory in inventories for log in inventory.attempts if log.run_id == run_id]
    completed = _completed_saves(inventories, logs, run_id)
    generations = [log.generation for log in logs]
    generations += [save.generation for save in completed]
    generations += [
        each.save.generation for inventory in inventories for each in inventory.node_saves if each.run_id == run_id
    ]
    newest: dict[str, SaveId] = {}
    for save in sorted(completed):
        newest[save.attempt] = save
    merged = [dataclasses.replace(log, completed=newest.get(log.attempt)) for log in _merge_logs(logs)]
    return History(tuple(merged), completed, max(generations, default=0))


def _completed_saves(inventories: Sequence[Inventory], logs: Sequence[AttemptLog], run_id: str) -> frozenset[SaveId]:
    shared = [each for inventory in inventories for each in inventory.shared_saves]
    completed = {log.completed for log in logs if log.completed is not None}
    completed |= {save for inventory in inventories for save in inventory.certificates}
    completed |= {
        each.save
        for inventory in inventories
        for each in inventory.node_saves
        if each.certified and each.run_id == run_id
    }
    completed |= {each.save for each in shared if each.run_id == run_id}
    # Whoever resumed from a save of this run proves that it was complete; a base may also be another run's checkpoint,
    # or another program's, which names no attempt.
    foreign = {each.save for each in shared if each.run_id != run_id}
    completed |= {log.base for log in logs if log.base is not None and log.base.attempt and log.base not in foreign}
    return frozenset(completed)


def _merge_logs(logs: Iterable[AttemptLog]) -> list[AttemptLog]:
    """One log per attempt, oldest first. Copies of a log differ in how far they were kept up to date.

    An attempt that had to elect again (a copy failed to verify) did so to an older base: the oldest one is its last.
    """
    merged: dict[str, AttemptLog] = {}
    for log in logs:
        known = merged.setdefault(log.attempt, log)
        ended = max(known, log, key=lambda each: (each.end != "", each.end_iteration or -1, each.end))
        merged[log.attempt] = dataclasses.replace(
            min(known, log, key=lambda each: (each.base or _NOTHING, each.fork or (-1, ""))),
            end=ended.end,
            end_iteration=ended.end_iteration,
        )
    return sorted(merged.values(), key=lambda log: (log.generation, log.attempt))


def abandonments(saves: Iterable[SaveId], attempts: Iterable[AttemptLog]) -> dict[SaveId, AttemptLog]:
    """The abandoned ones of `saves`, each with the attempt that left it behind.

    A save is abandoned when a later attempt started from an older base and was a fork or has itself completed a save.
    Later than the save, or, if a user forked to it since, than that fork: what was left behind can be taken up again.
    Linear but for sorting: of all later attempts the one with the oldest base is enough to know.
    """
    logs = list(attempts)
    used_in = {log.base: log.generation for log in sorted(logs, key=lambda log: log.generation) if log.fork is not None}
    leavers = [log for log in logs if log.fork is not None or log.completed is not None]
    leavers.sort(key=lambda log: (log.generation, log.attempt), reverse=True)
    in_use = sorted(((max(save.generation, used_in.get(save, 0)), save) for save in set(saves)), reverse=True)
    abandoned: dict[SaveId, AttemptLog] = {}
    oldest: AttemptLog | None = None
    passed = 0
    for generation, save in in_use:
        while passed < len(leavers) and leavers[passed].generation > generation:
            if oldest is None or (leavers[passed].base or _NOTHING) <= (oldest.base or _NOTHING):
                oldest = leavers[passed]
            passed += 1
        if oldest is not None and (oldest.base or _NOTHING) < save:
            abandoned[save] = oldest
    return abandoned


def abandoned_saves(saves: Iterable[SaveId], attempts: Iterable[AttemptLog]) -> set[SaveId]:
    """Those of `saves` that a later attempt left behind; they are never resumed from and count for nothing."""
    return set(abandonments(saves, attempts))


def abandoned_checkpoints(inventories: Sequence[Inventory], run_id: str) -> set[SaveId]:
    """This run's checkpoints on shared storage that a later attempt left behind."""
    saves = {each.save for inventory in inventories for each in inventory.shared_saves if each.run_id == run_id}
    return abandoned_saves(saves, read_history(inventories, run_id).attempts)


def fruitless_bases(attempts: Sequence[AttemptLog], limit: int) -> dict[SaveId | None, int]:
    """Bases from which at least `limit` restarts, since the run last got further, completed no newer save.

    `attempts` are in order, oldest first. A restart gets further if it completes a higher iteration than the run ever
    did. A fork begins a new count, since a user has intervened; the first start is no restart, and one that was stopped
    on request did not fail. None stands for fresh starts.
    """
    furthest = -1
    in_vain: list[AttemptLog] = []
    first_generation = attempts[0].generation if attempts else 0
    for log in attempts:
        if log.fork is not None:
            furthest = log.fork[0]
            in_vain = []
        if log.completed is not None and log.completed.iteration > furthest:
            furthest = log.completed.iteration
            in_vain = []
        elif log.fork is None and log.generation > first_generation and log.end not in ("stopped", "finished"):
            in_vain.append(log)
    counts = Counter(log.base for log in in_vain)
    return {base: count for base, count in counts.items() if count >= max(limit, 1)}
