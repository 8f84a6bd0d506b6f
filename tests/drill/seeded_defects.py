"""Mistakes that somebody could make, as patches to the source: each must be caught by the simulator.

A patch names text that is there today; a test fails when it is not there any more, so that the list stays true. `focus`
are the faults under which the mistake shows, `first` a seed from which on it shows soon.
"""

from __future__ import annotations

from dataclasses import dataclass

from resilience.drill.simulator.history import Fault, FaultKind, History, StartPlan

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
    focus: tuple[FaultKind, ...] = ()
    first: int = 0
    history: History | None = None  # where drawn ones would hardly ever come to it


def _kill(start: int, point: int = 320) -> Fault:
    return Fault("kill", start, "train", 0, point)


#: Two starts that cannot see each other number themselves alike, and save the same iterations.
_TWO_OF_ONE_GENERATION = History(
    1, steps=40, interval=1, replication=False,
    starts=(StartPlan(), StartPlan(away=(1,)), StartPlan(away=(0,)), StartPlan()),
    faults=(_kill(0, 20), _kill(1), _kill(2)),
)  # fmt: skip

#: A person goes back to an older checkpoint, and that start dies before it has saved anything.
_ROLLED_BACK = History(
    5, steps=40, interval=2, persist_every=2, starts=(StartPlan(), StartPlan(rollback=True), StartPlan()),
    faults=(_kill(0, 500), _kill(1, 12)),
)  # fmt: skip

DEFECTS = (
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
        ("flip", "kill"),
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
        ("wire", "lose"),
    ),
    Defect(
        "a checkpoint on shared storage is loaded without looking at its digests",
        (Patch("restore_shared.py", "            if self.verify:\n", "            if not self.verify:\n"),),
        ("flip_shared", "lose"),
    ),
    Defect(
        "the directories of a committed shard are not fsynced",
        (Patch("stores/node_store.py", "        if self._durable:\n            self.fs.fsync_dir(path.parent)", "        if False:\n            self.fs.fsync_dir(path.parent)"),),
        ("crash", "blackout"),
    ),
    Defect(
        "a record is written without fsync",
        (
            Patch(
                "stores/node_store.py",
                "encode_record(record), durable=self._durable)",
                "encode_record(record), durable=False)",
            ),
        ),
        ("crash", "blackout"),
    ),
    Defect(
        "the run's own directories are not fsynced at a start",
        (Patch("stores/node_store.py", "            for folder in (base, self.root.parent, self.root):\n", "            for folder in ():\n"),),
        ("blackout",),
    ),
    Defect(
        "the folder of a persistent checkpoint is renamed without fsync of its directory",
        (
            Patch(
                "stores/shared_store.py",
                "self._fs.rename(self.root / source, self.root / target))\n        self._fs.fsync_dir(self.root)\n",
                "self._fs.rename(self.root / source, self.root / target))\n",
            ),
            Patch("stores/shared_store.py", "        self._fs.unlink(self.root / note.note_name)\n        self._fs.fsync_dir(self.root)\n", "        self._fs.unlink(self.root / note.note_name)\n"),
        ),
        ("blackout",),
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
            Patch("planning/inventory.py", 'return f"g{self.generation:04d}-{self.attempt[:8]}"', 'return f"g{self.generation:04d}-00000000"'),
            Patch("planning/copies.py", "found.setdefault(copies.save, [])", 'found.setdefault(SaveId(copies.save.iteration, copies.save.generation, "0" * 32), [])'),
            Patch("stores/node_store.py", "        if location.record.save != save:\n", "        if location.record.save.iteration != save.iteration:\n"),
        ),
        history=_TWO_OF_ONE_GENERATION,
    ),
    Defect(
        "abandoned saves are elected",
        (Patch("planning/ballot.py", "        abandonments(own, history.attempts),\n", "        {},\n"),),
        history=_ROLLED_BACK,
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
                "        struck = self._agree_strikes(failed, problem)\n        if struck:\n            return struck, None\n        if load is None:",
                "        if load is not None and not failed:\n            load(state)()\n        struck = self._agree_strikes(failed, problem)\n        if struck:\n            return struck, None\n        if load is None:",
            ),
        ),
        ("flip", "kill"),
    ),
    Defect(
        "a directory that cannot be read counts as empty",
        (Patch("stores/node_store.py", "return Inventory(source=self.node_id, unknown=str(error))", "return Inventory(source=self.node_id)"),),
        ("io_error", "kill"),
    ),
    Defect(
        "a start goes on while a source does not answer",
        (Patch("planning/election.py", "    if ballot.unknown and not policy.unknown_final:\n", "    if ballot.unknown and policy.unknown_final is None:\n"),
         Patch("planning/election.py", "        if newest is not None and newest > candidate.save:\n", "        if newest is not None and newest < candidate.save:\n"),
         Patch("planning/election.py", "    if ballot.unknown:\n        return _unavailable(ballot, \"A start", "    if ballot.unknown is None:\n        return _unavailable(ballot, \"A start")),
        ("io_error", "kill"),
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
        ("twin",),
    ),
    Defect(
        "a node's directory is written without taking its lock",
        (Patch("assembly.py", "                lock.acquire()\n                break\n", "                break\n"),),
        ("twin",),
    ),
    Defect(
        "an arena is given to the next save while it is being read",
        (
            Patch("stores/keeper.py", "            left = self._pins.get(id(arena), 0) - 1\n", "            left = 0\n"),
        ),
        ("slow_shared", "kill", "lose"),
    ),
    Defect(
        "pruning on shared storage keeps the oldest",
        (Patch("stores/shared_store.py", "kept = {*good[:keep],", "kept = {*good[-keep:],"),
         Patch("stores/shared_store.py", "*(save.save for save in complete if save.save.iteration == tracked)}", "}")),
        ("lose", "kill"),
    ),
    Defect(
        "a sweep at a start removes shards that have a record",
        (Patch("stores/node_store.py", '''orphan = name.endswith(".safetensors") and name.removesuffix(".safetensors") + ".json" not in names''', '''orphan = name.endswith(".safetensors")'''),),
        ("kill",),
    ),
    Defect(
        "the attempt log forgets what the start resumed from",
        (Patch("controller.py", "decision.next_generation, base=decision.base, fork=decision.fork", "decision.next_generation, base=None, fork=decision.fork"),),
        ("kill", "lose", "crash"),
    ),
    Defect(
        "a rank acts on what it was asked, not on what all agreed",
        (Patch("ledger.py", "        self._requests -= requests\n", "        self.heard |= requests\n        self._requests -= requests\n"),),
        ("stop",),
    ),
    Defect(
        "a rank whose snapshot failed is silent in the exchange",
        (Patch("saving/saving.py", "        if wish.on_nodes and self.replicas is not None:\n            job = (", "        if wish.on_nodes and self.replicas is not None and snapshot is not None:\n            job = ("),),
        ("full_disk",),
    ),
)  # fmt: skip
