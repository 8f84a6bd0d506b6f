"""Mistakes that somebody could make, as patches to the source: each must be caught by the simulator.

A patch names text that is there today; a test fails when it is not there any more, so that the list stays true. A mistake
shows in drawn histories with faults of the kinds in `focus`, or in those that `histories` makes of a seed where drawn ones
would hardly ever come to it. (They are given the module `history` of the package under test.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["DEFECTS", "Defect", "Patch"]


@dataclass(frozen=True)
class Patch:
    """In `file` of the package, `find` (which is there once) becomes `replace`."""

    file: str
    find: str
    replace: str


@dataclass(frozen=True)
class Defect:
    name: str
    patches: tuple[Patch, ...]
    focus: tuple[str, ...] = ()
    histories: Callable[[Any, int], Any] | None = None


def _two_of_one_generation(h: Any, seed: int) -> Any:
    """Two starts that cannot see each other number themselves alike, and save the same iterations."""
    starts = (h.StartPlan(), h.StartPlan(away=(1,)), h.StartPlan(away=(0,)), h.StartPlan())
    kills = tuple(h.Fault("kill", start, "train", 0, point) for start, point in enumerate((20, 320, 320)))
    return h.History(seed, steps=40, interval=1, replication=False, starts=starts, faults=kills)


def _rolled_back(h: Any, seed: int) -> Any:
    """A person goes back to an older checkpoint, and that start dies before it has saved anything."""
    starts = (h.StartPlan(), h.StartPlan(rollback=True), h.StartPlan())
    kills = (h.Fault("kill", 0, "train", 0, 500), h.Fault("kill", 1, "train", 0, 12))
    return h.History(seed, steps=40, interval=2, persist_every=2, starts=starts, faults=kills)


def _flipped(h: Any, seed: int) -> Any:
    """A bit of a copy of the newest save is altered right before the job dies."""
    point = 150 + 11 * seed
    faults = (h.Fault("flip", 0, "train", 0, point), h.Fault("kill", 0, "train", 0, point + 2))
    return h.History(seed, steps=60, interval=2, faults=faults)


def _altered_on_its_way(h: Any, seed: int) -> Any:
    """A node is lost, and what the one in its place fetches is altered on its way."""
    faults = (h.Fault("lose", 0, "train", 1, 250 + 7 * seed), h.Fault("wire", 1, "start", 0, 1, 60.0))
    return h.History(seed, steps=60, interval=2, faults=faults)


def _flipped_on_shared_storage(h: Any, seed: int) -> Any:
    point = 150 + 13 * seed
    faults = (h.Fault("flip_shared", 0, "train", 0, point), h.Fault("kill", 0, "train", 0, point + 2))
    return h.History(seed, steps=60, kind=None, persist_every=2, faults=faults)


def _unreadable(h: Any, seed: int) -> Any:
    """The disks of a node fail for a few calls while a start takes stock."""
    faults = (h.Fault("kill", 0, "train", 0, 700), h.Fault("io_error", 1, "start", 0, 50 + seed, 1.0))
    return h.History(seed, steps=60, interval=1, persist_every=4, replication=False, faults=faults)


def _power_failures(h: Any, seed: int) -> Any:
    """A node whose copies are the only ones loses power, and comes back with its disk."""
    fault = h.Fault("crash", 0, "train", 0, 60 + 7 * seed)
    return h.History(seed, steps=60, interval=2, replication=False, faults=(fault,))


def _lost_after_a_restart(h: Any, seed: int) -> Any:
    """A second start saves on its nodes, which are then lost: what the first one left on shared storage is the newest."""
    faults = (
        h.Fault("kill", 0, "train", 0, 700),
        h.Fault("lose", 1, "train", 0, 150 + 5 * seed),
        h.Fault("lose", 1, "train", 1, 150 + 5 * seed),
    )
    starts = (h.StartPlan(), h.StartPlan(grace_s=30.0), h.StartPlan())
    return h.History(seed, steps=60, interval=2, persist_every=8, starts=starts, faults=faults)


def _stopped(h: Any, seed: int) -> Any:
    """One rank is asked to stop."""
    return h.History(seed, steps=30, interval=2, faults=(h.Fault("stop", 0, "train", 1, 60 + 11 * seed),))


def _twins(h: Any, seed: int) -> Any:
    """A job that lives is taken for dead and started again."""
    fault = h.Fault("twin", 0, "train", 0, 200 + 7 * seed)
    return h.History(seed, steps=40, interval=2, persist_every=2, starts=(h.StartPlan(),) * 3, faults=(fault,))


def _slow_drains(h: Any, seed: int) -> Any:
    """A save is on its way to slow storage while others are taken; then all nodes are lost."""
    faults = (
        h.Fault("slow_shared", 0, "train", 0, 60 + 10 * seed, 60.0),
        h.Fault("lose", 0, "train", 0, 800 + 10 * seed),
        h.Fault("lose", 0, "train", 1, 800 + 10 * seed),
    )
    return h.History(
        seed, steps=80, interval=1, persist_every=3, checkpoint=(("async_save", True),), faults=faults,
        starts=(h.StartPlan(grace_s=30.0), h.StartPlan()),
    )  # fmt: skip


def _overlapped(h: Any, seed: int) -> Any:
    """Every save is copied while the next step is under way; then the job dies."""
    kill = h.Fault("kill", 0, "train", 0, 120 + 7 * seed)
    overlapped = (("snapshot_mode", "overlapped"),)
    return h.History(seed, steps=60, interval=1, eagerness=0.05, resiliency=overlapped, faults=(kill,))


def _thawed(h: Any, seed: int) -> Any:
    """A node is lost some saves after what was still for long has changed."""
    return h.History(seed, steps=90, interval=1, faults=(h.Fault("lose", 0, "train", 1, 1200 + 60 * seed),))


DEFECTS = (
    Defect(
        "what was still of late is taken for still, and a holder believes what it put together",
        (
            Patch("replication/still.py", "if there.get(number) == digest]", "if number in there and digest]"),
            Patch(
                "replication/clique.py",
                "announced is not None and announced == digest:",
                "announced is not None and (announced == digest or one.base):",
            ),
        ),
        histories=_thawed,
    ),
    Defect(
        "a receiver does not compare the digest of a replica",
        (Patch("replication/clique.py", "announced is not None and announced == digest:", "announced is not None:"),),
        ("wire",),
    ),
    Defect(
        "a copy on the node is loaded without comparing its digest",
        (
            Patch(
                "replication/gathering.py",
                "if not found == location.record.digest == copy.digest:",
                "if not found:",
            ),
        ),
        histories=_flipped,
    ),
    Defect(
        "a fetched shard is taken without comparing its digest",
        (
            Patch(
                "replication/retrieval.py",
                "if not self.problem and self.digest.value() != self.fetch.digest:",
                "if not self.problem and not self.digest.value():",
            ),
        ),
        histories=_altered_on_its_way,
    ),
    Defect(
        "a checkpoint on shared storage is loaded without looking at its digests",
        (Patch("restore_shared.py", "            if self.verify:\n", "            if not self.verify:\n"),),
        histories=_flipped_on_shared_storage,
    ),
    Defect(
        "the directories of a committed shard are not fsynced",
        (Patch("stores/node_store.py", "        if self._durable:\n            self.fs.fsync_dir(path.parent)", "        if False:\n            self.fs.fsync_dir(path.parent)"),),
        histories=_power_failures,
    ),
    Defect(
        "a record is written without fsync",
        (
            Patch(
                "stores/node_store.py",
                "encode_record(record, self.seal), durable=self._durable)",
                "encode_record(record, self.seal), durable=False)",
            ),
        ),
        histories=_power_failures,
    ),
    Defect(
        "the run's own directories are not fsynced at a start",
        (Patch("stores/node_store.py", "            for folder in (base, self.root.parent, self.root):\n", "            for folder in ():\n"),),
        histories=_power_failures,
    ),
    Defect(
        "older saves are deleted before the new one is committed",
        (
            Patch(
                "planning/retention.py",
                'protected = [state.save for state in counted if state.progress == "protected"]',
                'protected = [state.save for state in counted if state.progress in ("protected", "pending")]',
            ),
        ),
        ("kill", "crash", "unhealthy"),
    ),
    Defect(
        "saves are identified by iteration and generation only",
        (
            Patch("planning/inventory.py", 'name of its attempt."""\n        return attempt_name(self.generation, self.attempt)', 'name of its attempt."""\n        return attempt_name(self.generation, "00000000")'),
            Patch("planning/copies.py", "found.setdefault(copies.save, [])", 'found.setdefault(SaveId(copies.save.iteration, copies.save.generation, "0" * 32), [])'),
            Patch("stores/node_reader.py", "        if location.record.save != save:\n", "        if location.record.save.iteration != save.iteration:\n"),
        ),
        histories=_two_of_one_generation,
    ),
    Defect(
        "abandoned saves are elected",
        (Patch("planning/ballot.py", "        abandonments(own, history.attempts),\n", "        {},\n"),),
        histories=_rolled_back,
    ),
    Defect(
        "a failed save counts as kept",
        (
            Patch(
                "replication/protection.py",
                'self._board.report(SlotReport(job.save, "failed", failed=True, settled=True), error)',
                'self._board.report(SlotReport(job.save, "protected", settled=True), error)',
            ),
        ),
        ("full_disk", "torn_write", "io_error"),
    ),
    Defect(
        "ranks load before every rank holds verified bytes",
        (
            Patch(
                "restore.py",
                "            struck = self._agree_strikes(failed, problem, loose=loose)\n",
                "            if load is not None and not failed:\n                load(state)()\n            struck = self._agree_strikes(failed, problem, loose=loose)\n",
            ),
        ),
        ("flip", "kill"),
    ),
    Defect(
        "a directory that cannot be read counts as empty",
        (Patch("stores/node_reader.py", "return Inventory(source=self.node_id, unknown=str(error))", "return Inventory(source=self.node_id)"),),
        histories=_unreadable,
    ),
    Defect(
        "a start goes on while a source does not answer",
        (Patch("planning/election.py", "    if ballot.unknown and not policy.unknown_final:\n", "    if ballot.unknown and policy.unknown_final is None:\n"),
         Patch("planning/election.py", "        if newest is not None and newest > candidate.save:\n", "        if newest is not None and newest < candidate.save:\n"),
         Patch("planning/election.py", "    if ballot.unknown:\n        return _unavailable(ballot, \"A start", "    if ballot.unknown is None:\n        return _unavailable(ballot, \"A start")),
        histories=_unreadable,
    ),
    Defect(
        "a rank that is not healthy takes part in saves",
        (Patch("replication/protection.py", "        if any_failed:\n", "        if any_failed and not job.healthy and not problem:\n"),
         Patch("replication/protection.py", "        self._digest = None if problem else digest\n", "        self.error, self._digest = \"\", digest\n")),
        ("unhealthy",),
    ),
    Defect(
        "who lost the shared directory goes on to publish",
        (Patch("stores/shared_store.py", "        if current != mine:\n", "        if current is None:\n"),),
        histories=_twins,
    ),
    Defect(
        "a node's directory is written without taking its lock",
        (Patch("assembly.py", "                lock.acquire()\n                break\n", "                break\n"),),
        histories=_twins,
    ),
    Defect(
        "an arena is given to the next save while it is being read",
        (
            Patch("stores/keeper.py", "            left = self._pins.get(id(arena), 0) - 1\n", "            left = 0\n"),
        ),
        histories=_slow_drains,
    ),
    Defect(
        "pruning on shared storage keeps the oldest",
        (Patch("stores/shared_store.py", "kept = {*good[:keep],", "kept = {*good[-keep:],"),
         Patch("stores/shared_store.py", "*(save.save for save in complete if save.save.iteration == tracked)}", "}")),
        ("lose", "kill"),
    ),
    Defect(
        "a sweep at a start removes shards that have a record",
        (Patch("stores/node_remover.py", '''orphan = name.endswith(".safetensors") and name.removesuffix(".safetensors") + ".json" not in names''', '''orphan = name.endswith(".safetensors")'''),),
        ("kill",),
    ),
    Defect(
        "the attempt log forgets what the start resumed from",
        (Patch("controller.py", "decision.next_generation, base=decision.base, fork=decision.fork", "decision.next_generation, base=None, fork=decision.fork"),),
        histories=_lost_after_a_restart,
    ),
    Defect(
        "the optimizer does not wait for an overlapped copy, and nobody looks at what changed",
        (
            Patch("snapshot/overlap.py", "            return\n        self.join()\n", "            return\n"),
            Patch("snapshot/copying.py", "        return said or witness.agrees()\n", '        return ""\n'),
        ),
        histories=_overlapped,
    ),
    Defect(
        "a save is hashed and sent before its overlapped copy is over",
        (Patch("replication/protection.py", "spoiled = job.copy.wait()", 'spoiled = ""'),),
        histories=_overlapped,
    ),
    Defect(
        "a rank acts on what it was asked, not on what all agreed",
        (Patch(
                "ledger.py",
                "        heard, self.heard = self.heard, set()\n",
                "        heard, self.heard = self.heard | self._requests, set()\n",
            ),
        ),
        histories=_stopped,
    ),
)  # fmt: skip
