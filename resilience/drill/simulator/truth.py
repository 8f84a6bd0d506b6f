"""What is true of a simulated run, kept outside of the code under test, and which promises it breaks.

Known here: the exact state of every rank at every boundary of every start, what each owner's sealed bytes were, which
saves were said to be complete, protected or persistent, and what each fault took. Copies are looked for on the
simulated disks by a reader of this file's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from resilience.drill.simulator.evidence import Evidence, Key, generation_of, key_of, read_record
from resilience.drill.simulator.schedule import Scheduler
from resilience.drill.simulator.storage import Mount
from resilience.reports import Resume

__all__ = ["Save", "StartObserver", "StartTruth", "Truth"]

WRONG_STATE: Final = "1 never resume from a wrong state"
LOST_SAVE: Final = "2 never lose the last good save"
REPLICA: Final = "3 a replica is the owner's bytes"
STOPPED: Final = "5 a failed save does not stop training"
ALIKE: Final = "6 all ranks decide alike, nobody hangs"
NO_MISTAKE: Final = "no mistake of ours"
FENCED: Final = "10 two live jobs never write one run"


@dataclass(eq=False)
class Save:
    """One save, as it really is. `bytes_of`: digest of each owner's sealed bytes."""

    key: Key
    start: int
    began_at: float
    bytes_of: dict[int, str] = field(default_factory=dict)
    void: str = ""  # why it must never be complete
    complete: bool = False
    protected: set[int] = field(default_factory=set)  # ranks that say so
    shared: dict[str, dict[str, str]] = field(default_factory=dict)  # by directory: digests of its files
    deleted: bool = False  # the job decided to


@dataclass(eq=False)
class StartTruth:
    """One start. `nodes`: of each rank. `demand`: nothing older than this may be resumed from."""

    number: int
    nodes: tuple[str, ...]
    attempt: str = ""
    base: Key | None = None
    resumed: dict[int, tuple[Key, int] | None] = field(default_factory=dict)
    rollback: int | None = None
    demand: tuple[Key, str] | None = None
    available: tuple[Key, ...] = ()
    impaired: set[str] = field(default_factory=set)  # faults because of which it may resume from an older save
    hindered: set[str] = field(default_factory=set)  # faults that struck while it restored
    disturbed: set[str] = field(default_factory=set)  # all faults that struck it
    loads: dict[int, int] = field(default_factory=dict)
    beside: list[StartTruth] = field(default_factory=list)  # starts that were alive when it began
    over: bool = False
    may_fail: bool = False  # it said in words why it cannot go on, and was right


@dataclass(frozen=True)
class _Loss:
    node: str
    at: float
    save: Key | None  # None: of everything there


class Truth:
    """All that is known of one history."""

    def __init__(self, scheduler: Scheduler, mounts: Mapping[str, Mapping[str, Mount]], tier: str, copies: int) -> None:
        """`mounts`: of each node by name. `tier`: where saves on nodes lie, `copies`: how many there are to be."""
        self._scheduler = scheduler
        self.evidence = Evidence(mounts, "disk" if tier == "local" else "mem")
        self._copies = copies
        self.saves: dict[Key, Save] = {}
        self.starts: list[StartTruth] = []
        self.story: list[str] = []
        self.shared_spoiled = False  # a fault altered what lies on shared storage
        self._initial: dict[int, str] = {}
        self._states: dict[tuple[int, int, str], tuple[Key, int]] = {}  # by rank, iteration, digest: and which start
        self._losses: list[_Loss] = []

    # -- what happens -------------------------------------------------------------------------------------------------

    def tell(self, what: str) -> None:
        self.story.append(f"{self._scheduler.now:9.3f} {what}")

    def lost(self, node: str, save: Key | None = None) -> None:
        """A fault took what this node held (or its copy of one save)."""
        self._losses.append(_Loss(node, self._scheduler.now, save))

    def begins(self, start: StartTruth) -> None:
        """Just before a start: what it must find."""
        self.starts.append(start)
        here = set(start.nodes)
        on_nodes = {key for key in self.saves if self._complete_on(self.saves[key], here)}
        in_shared = {
            key
            for key, save in self.saves.items()
            if any(self.evidence.shared_files(root) == files for root, files in save.shared.items())
        }
        usable = sorted(key for key in on_nodes | in_shared if not self._left_behind(key) and not self.saves[key].void)
        start.available = tuple(usable)
        if usable:
            start.demand = usable[-1], "its copies are there"
        persistent = [key for key, save in self.saves.items() if save.shared]
        for key in sorted(self.saves, reverse=True):
            if self._left_behind(key) or self.saves[key].void or (start.demand and key <= start.demand[0]):
                continue
            why = self._promised(self.saves[key], here)
            if key == max(persistent, default=None) and not self.shared_spoiled:
                why = "it is the newest persistent one"
            if why:
                start.demand = key, why
                break

    def boundary(self, start: StartTruth, rank: int, iteration: int, digest: str) -> None:
        self._states[rank, iteration, digest] = (iteration, start.attempt), start.number

    def loading(self, start: StartTruth, rank: int) -> None:
        start.loads[rank] = start.loads.get(rank, 0) + 1
        if start.loads[rank] > 1:
            self._scheduler.fail(WRONG_STATE, f"rank {rank} took in a state before every rank had verified bytes")

    def resumed(
        self, start: StartTruth, rank: int, attempt: str, resume: Resume | None, iteration: int, digest: str
    ) -> None:
        """A rank came out of its restore."""
        start.attempt = attempt
        start.resumed[rank] = found = self._judge_state(rank, resume, iteration, digest)
        if len(set(start.resumed.values())) > 1:
            self._scheduler.fail(ALIKE, f"start {start.number}: ranks resumed from {start.resumed}")
        if len(start.resumed) > 1:
            return
        start.base = key = None if found is None else found[0]
        for other in start.beside:
            if not other.over and set(other.nodes) & set(start.nodes):
                what = f"start {start.number} runs on nodes where start {other.number} is alive"
                self._scheduler.fail(FENCED, what)
        self.tell(f"start {start.number} ({attempt}) resumes from {_said(key)}")
        self._judge_choice(start, key)

    def void(self, start: StartTruth, iteration: int, why: str) -> None:
        """The save of this iteration must never be complete."""
        if start.attempt:
            self._save((iteration, start.attempt), start).void = why

    def committed(self, start: StartTruth, node: str, path: Path, mount: Mount) -> None:
        """A record appeared at `path`: a shard counts from now on."""
        key, record, shard = (
            key_of(path),
            mount.find(path.parts[2:]),
            mount.find(path.with_suffix(".safetensors").parts[2:]),
        )
        read = read_record(key, record, shard)
        if key is None or read is None:
            return
        owner, digest = read
        self.evidence.spoiled -= {each.number for each in (record, shard) if each is not None}
        save = self._save(key, start)
        true = save.bytes_of.setdefault(owner, digest) if key[1] == start.attempt else save.bytes_of.get(owner, digest)
        if digest != true:
            self._scheduler.fail(REPLICA, f"{node} committed other bytes than rank {owner}'s for {_said(key)}: {path}")

    def uncommitted(self, start: StartTruth, node: str, path: Path) -> None:
        """A live job removed a record."""
        key = key_of(path)
        newest_complete, newest_protected = self._untouchable(start)
        if key is None or key not in (newest_complete, newest_protected):
            return
        save, here = self.saves[key], set(start.nodes)
        there = self.evidence.holders(save.key, save.bytes_of)
        gone = [owner for owner in save.bytes_of if not there.get(owner)]
        if gone and not self._lost_since(save, here) and not start.impaired:
            what = "newest complete" if key == newest_complete else "newest protected"
            self._scheduler.fail(
                LOST_SAVE, f"{node} removed the last copy of rank {gone[0]}'s shard of the {what} save {_said(key)}"
            )

    def told(self, start: StartTruth, rank: int, event: str, fields: Mapping[str, Any]) -> None:
        """An event of a rank."""
        self._scheduler.note(f"{event} {fields.get('iteration', '')}")
        iteration, tier = fields.get("iteration"), fields.get("tier")
        what = str(fields.get("what"))
        if fields.get("advice") == "Please report this.":
            self._scheduler.fail(NO_MISTAKE, f"rank {rank}: {what}")
        if event == "warning" and any(part in what for part in _STRIKES):
            start.impaired |= start.disturbed & _CANNOT_READ
        if event in _STORY:
            said = ", ".join(f"{name}={value}" for name, value in fields.items() if name in _FIELDS)
            self.tell(f"  start {start.number} rank {rank}: {event} {said}")
        if iteration is None or not start.attempt:
            return
        key = (int(iteration), start.attempt)
        if event == "snapshot":
            self._save(key, start)
        elif event == "protected" and key in self.saves and fields["generation"] == generation_of(start.attempt):
            self.saves[key].protected.add(rank)
            self._check_protected(self.saves[key], start)
        elif event == "complete" and tier in ("local", "in_memory"):
            self._check_complete(self._save(key, start), start)
        elif event == "complete":
            self._check_shared(self._save(key, start), start, str(tier))
        elif event == "pruned":
            self._pruned(int(iteration), int(fields["generation"]))

    # -- judging ------------------------------------------------------------------------------------------------------

    def _judge_state(self, rank: int, resume: Resume | None, iteration: int, digest: str) -> tuple[Key, int] | None:
        """Which save's state it is, and of which start."""
        if resume is None:
            if iteration != 0 or digest != self._initial.setdefault(rank, digest):
                self._scheduler.fail(WRONG_STATE, f"rank {rank} begins afresh in another state than the first")
            return None
        found = self._states.get((rank, iteration, digest))
        if found is None or iteration != resume.iteration:
            what = f"rank {rank} resumed iteration {resume.iteration} in a state that never was"
            self._scheduler.fail(WRONG_STATE, what)
        return found

    def _judge_choice(self, start: StartTruth, key: Key | None) -> None:
        if key is not None:
            save = self._save(key, start)
            if save.void:
                self._scheduler.fail(WRONG_STATE, f"start {start.number} resumed from {_said(key)}, but {save.void}")
            if start.rollback is None and self._left_behind(key, certain=True, seen_by=start):
                self._scheduler.fail(
                    WRONG_STATE, f"start {start.number} resumed from {_said(key)}, which was abandoned"
                )
        if start.rollback is not None:
            if key is None or key[0] != start.rollback:
                self._scheduler.fail(WRONG_STATE, f"ckpt_step={start.rollback} led to {_said(key)}")
            return
        if start.demand is None or start.impaired:
            return
        wanted, why = start.demand
        if key is None or key < wanted:
            self._scheduler.fail(
                LOST_SAVE, f"start {start.number} resumed from {_said(key)}, not {_said(wanted)}: {why}"
            )

    def refused(self, start: StartTruth, error: str) -> None:
        """The start says that it has nothing to resume from."""
        if start.demand is not None and not start.impaired and start.rollback is None:
            wanted, why = start.demand
            self._scheduler.fail(LOST_SAVE, f"start {start.number} found nothing ({error}), but {_said(wanted)}: {why}")

    def _check_complete(self, save: Save, start: StartTruth) -> None:
        if save.complete:
            return
        save.complete = True
        if save.void:
            self._scheduler.fail(WRONG_STATE, f"{_said(save.key)} is said to be complete, but {save.void}")
        there, here = self.evidence.holders(save.key, save.bytes_of), set(start.nodes)
        lacking = [owner for owner in range(len(start.nodes)) if not there.get(owner)]
        if lacking and not self._lost_since(save, here) and not save.deleted:
            self._scheduler.fail(
                LOST_SAVE, f"{_said(save.key)} is said to be complete without rank {lacking[0]}'s shard"
            )

    def _check_protected(self, save: Save, start: StartTruth) -> None:
        if len(save.protected) < len(start.nodes) or save.deleted:
            return
        there, here = self.evidence.holders(save.key, save.bytes_of), set(start.nodes)
        wanted = min(self._copies, len(here))
        few = [owner for owner in range(len(start.nodes)) if len(there.get(owner, ())) < wanted]
        if few and not self._lost_since(save, here) and save.key[1] == start.attempt:
            what = f"{_said(save.key)} is said to be protected, but rank {few[0]}'s shard lies on {there.get(few[0])}"
            self._scheduler.fail(REPLICA, what)

    def _check_shared(self, save: Save, start: StartTruth, tier: str) -> None:
        if save.void:
            self._scheduler.fail(WRONG_STATE, f"{_said(save.key)} is said to be persistent, but {save.void}")
        for root in ("save", "save/non_persistent"):
            if (tier == "global") != (root != "save"):
                continue
            folder = f"{root}/iter_{save.key[0]:07d}"
            files = self.evidence.shared_files(folder)
            if not files:
                self._scheduler.fail(LOST_SAVE, f"{_said(save.key)} is said to be in {root}, and {folder} is not there")
            if files:
                save.shared.setdefault(folder, files)  # as the first rank found it: then a bit may flip

    def _promised(self, save: Save, here: set[str]) -> str:
        """Why a start on these nodes must find this save, or a newer one; "" if nothing promises it."""
        if not save.complete or save.deleted or not save.bytes_of:
            return ""
        holders = {node for start in self.starts if start.number == save.start for node in start.nodes}
        lost = {loss.node for loss in self._losses if loss.at >= save.began_at and loss.save in (None, save.key)}
        lost |= holders - here
        lost &= holders
        world = len(self.starts[save.start].nodes)
        bearable = min(self._copies, len(holders)) - 1 if len(save.protected) >= world else 0
        if len(lost) > bearable:
            return ""
        return f"it was {'protected' if bearable else 'complete'}, and only {sorted(lost) or 'nothing'} was lost since"

    def _left_behind(self, key: Key, *, certain: bool = False, seen_by: StartTruth | None = None) -> bool:
        """Whether a later attempt abandoned it. `certain`: and that attempt's log is in sight of `seen_by`."""
        generation = generation_of(key[1])
        for start in self.starts:
            if not certain and self._went_back_unheard(start, key):
                return True
            if not start.attempt or generation_of(start.attempt) <= generation or start is seen_by:
                continue
            if start.base is not None and start.base >= key:
                continue
            completed = any(
                save.complete or save.shared for save in self.saves.values() if save.key[1] == start.attempt
            )
            if start.rollback is None and not completed:
                continue
            if not certain:
                return True
            if start.rollback is not None and seen_by is not None and self._log_is_seen(start, seen_by):
                return True
        return False

    def _went_back_unheard(self, start: StartTruth, key: Key) -> bool:
        """Whether a start that was sent back to before this save died in its restore: it may have noted so, or not."""
        if start.attempt or start.rollback is None or start is self.starts[-1]:
            return False
        return start.number > self.saves[key].start and start.rollback < key[0]

    def _log_is_seen(self, start: StartTruth, by: StartTruth) -> bool:
        nodes = set(start.nodes) & set(by.nodes)
        intact = nodes - {loss.node for loss in self._losses if loss.save is None}
        return bool(intact) or self.evidence.has_shared_log(start.attempt)

    def _lost_since(self, save: Save, nodes: set[str]) -> bool:
        return any(
            loss.node in nodes and loss.at >= save.began_at and loss.save in (None, save.key) for loss in self._losses
        )

    def _untouchable(self, start: StartTruth) -> tuple[Key | None, Key | None]:
        own = [save for save in self.saves.values() if save.key[1] == start.attempt and not save.void]
        complete = [save.key for save in own if save.complete]
        protected = [save.key for save in own if len(save.protected) >= len(start.nodes)]
        base = [start.base] if start.base is not None and start.base in self.saves else []
        return max(complete or base, default=None), max(protected, default=None)

    def _save(self, key: Key, start: StartTruth) -> Save:
        return self.saves.setdefault(key, Save(key, start.number, self._scheduler.now))

    def _pruned(self, iteration: int, generation: int) -> None:
        for key, save in self.saves.items():
            if key[0] == iteration and generation_of(key[1]) == generation:
                save.deleted = True

    def _complete_on(self, save: Save, nodes: set[str]) -> bool:
        there = self.evidence.holders(save.key, save.bytes_of)
        return all(there.get(owner, set()) & nodes for owner in range(len(self.starts[save.start].nodes)))


class StartObserver:
    """The truth, as one start's ranks tell it."""

    def __init__(self, truth: Truth, start: StartTruth) -> None:
        self._truth = truth
        self._start = start

    def told(self, rank: int, event: str, fields: Mapping[str, Any]) -> None:
        self._truth.told(self._start, rank, event, fields)

    def loading(self, rank: int) -> None:
        self._truth.loading(self._start, rank)

    def resumed(self, rank: int, attempt: str, resume: Resume | None, iteration: int, digest: str) -> None:
        self._truth.resumed(self._start, rank, attempt, resume, iteration, digest)

    def boundary(self, rank: int, attempt: str, iteration: int, digest: str) -> None:
        self._truth.boundary(self._start, rank, iteration, digest)


def _said(key: Key | None) -> str:
    return "nothing" if key is None else f"iteration {key[0]} of {key[1]}"


_STRIKES: Final = ("struck off", "cannot be read", "'s shard from", "checkpoint of iteration")
_CANNOT_READ: Final = {"io_error", "shared_io_error"}
_STORY: Final = {
    "fresh", "resume", "complete", "protected", "save_failed", "save_skipped", "pruned", "replication_down", "epoch",
    "stopped", "finished", "warning",
}  # fmt: skip
_FIELDS: Final = {"iteration", "tier", "error", "what", "reason", "epoch", "code", "retrieved_bytes"}
