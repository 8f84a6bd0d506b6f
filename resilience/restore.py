"""The order of events at a start: take stock, elect, fetch and verify, agree, load, agree.

No live tensor changes before every rank holds verified bytes of all that it needs. Whatever fails before that strikes a
copy off, on all ranks, and elects again; a structural mismatch (another model) is raised at once on all ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import xxhash

from resilience import errors
from resilience.errors import CorruptCopyError, DivergedRanksError, LayoutMismatchError, ResilienceError
from resilience.job import Job
from resilience.planning.decision import Candidate, ElectionPolicy, Strike
from resilience.planning.inventory import Inventory, SaveId, Tier
from resilience.planning.kept import without_copies
from resilience.planning.restore_plan import Plan, needed_owners, plan_restore
from resilience.planning.retrieval import RetrievalPlan
from resilience.planning.topology import Topology
from resilience.planning.typed_json import from_json
from resilience.planning.wire import inventories_from_json, inventories_to_json, to_json
from resilience.replication.assembling import BadCopiesError
from resilience.replication.communicator import Agreements
from resilience.replication.gathering import ShardGatherer
from resilience.reports import Resume
from resilience.restore_assembly import AssemblyLoader
from resilience.restore_shared import SharedLoader
from resilience.runtime.clock import Clock
from resilience.snapshot.loader import plan_shard_load
from resilience.state.training_state import TrainingState
from resilience.stores.node_reader import NodeReader

__all__ = ["Plan", "Restorer", "needed_owners", "plan_restore"]

_RETRY_UNKNOWN_S = 20.0
_MAX_ROUNDS = 10_000  # a round strikes off at least one copy
_REFUSED = b'{"refused"'

#: The copies that failed here, and what loads once all ranks have what they need.
_Obtained = tuple[Sequence[Strike], Callable[[TrainingState], Callable[[], Resume]] | None]


@dataclass(frozen=True)
class _Refusal:
    """Instead of a plan: the class in `errors` and the words that all ranks raise."""

    refused: tuple[str, str]


@dataclass(frozen=True)
class _Loaded:
    """How a rank's load went: bytes and copies it retrieved (of its own, of replicas, rebuilt), or why it failed."""

    counts: tuple[int, int, int, int] = (0, 0, 0, 0)
    failed: str = ""


@dataclass(frozen=True)
class _Tried:
    """How a rank's try to obtain or to plan went: what failed, what kept it from trying, that it does not fit.

    `loose`: owners whose shards lie in its buffers alone, since the node's directory refused them, and where.
    """

    failed: tuple[Strike, ...] = ()
    problem: str = ""
    unfit: bool = False
    loose: tuple[tuple[int, str], ...] = ()


_Word = TypeVar("_Word", _Loaded, _Tried)


@dataclass
class Restorer:
    """One start's restore. `run` is collective over all ranks."""

    job: Job
    setup: Agreements
    run_id: str
    attempt: str  # drawn by the leader; equal on all ranks
    readers: tuple[NodeReader, ...]  # of this node's directories
    gatherer: ShardGatherer | None
    shared: SharedLoader
    topology: Topology
    policy: ElectionPolicy
    clock: Clock
    tell: Callable[..., None]
    assembler: AssemblyLoader | None = None  # of saves of another world size on nodes; where there are node stores
    _loose: dict[int, tuple[tuple[int, str], ...]] = field(default_factory=dict, init=False)  # by rank, of all ranks

    def run(self, state: TrainingState) -> tuple[Plan, Resume | None]:
        """Elect, retrieve and load. Returns the plan and, unless this is a fresh start, what was resumed from."""
        began = self.clock.now()
        strikes: set[Strike] = set()
        for round_number in range(_MAX_ROUNDS):
            plan = self._decide(frozenset(strikes))
            plan.decision.raise_if_error()
            chosen = plan.decision.chosen
            if chosen is None:
                return plan, None
            failed, resume = self._try(plan, state, round_number, strikes)
            if resume is not None:
                seconds = self.clock.now() - began
                plan = replace(plan, standing=without_copies(plan.standing, self.topology, self._loose))
                return plan, replace(resume, seconds=seconds, passed_over=plan.decision.passed_over)
            strikes |= failed
        raise DivergedRanksError(f"no save could be loaded in {_MAX_ROUNDS} rounds")

    def close(self) -> None:
        """Free what was only mapped or fetched for the load. Local; after the last agreement."""
        for each in (self.gatherer, self.assembler):
            if each is not None:
                each.close()

    def _decide(self, strikes: frozenset[Strike]) -> Plan:
        """Ask every source until all answer, for a bound; then go on with those that do, if that is safe."""
        deadline = self.clock.now() + _RETRY_UNKNOWN_S
        while True:
            plan = self._ask(strikes, final=self.clock.now() >= deadline)
            if not plan.decision.retry:
                return plan
            self.tell("warning", what=plan.decision.reason, advice="Trying again.")
            self.clock.sleep(1.0)

    def _ask(self, strikes: frozenset[Strike], *, final: bool) -> Plan:
        gathered = self.setup.collect(self._look())
        answer: bytes | None = None
        if self.job.rank == 0:
            refusals = [payload for payload in gathered if payload.startswith(_REFUSED)]
            answer = refusals[0] if refusals else self._answer(gathered, strikes, final)
        received = self.setup.broadcast(answer)
        self._raise_refusal(received)
        mark = int.from_bytes(xxhash.xxh3_128_digest(received)[:8], "little") >> 1
        highest, lowest = self.setup.maximum([mark, -mark])
        if highest != -lowest:
            raise DivergedRanksError("ranks received different decisions about what to resume from.")
        return _plan_from_json(received)

    def _look(self) -> bytes:
        """What this rank has to tell of, or the error that it must not be alone with."""
        inventories: list[Inventory] = []
        try:
            if self.job.leads_node:
                inventories += [reader.inventory() for reader in self.readers]
            if self.job.rank == 0:
                inventories += self.shared.inventories(self.run_id)
            return inventories_to_json(inventories)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others wait for this rank's answer
            return _refusal(error)

    def _answer(self, gathered: Sequence[bytes], strikes: frozenset[Strike], final: bool) -> bytes:
        """The leader's decision, or the error that it must not be alone with."""
        try:
            told = [each for payload in gathered for each in inventories_from_json(payload)]
            nodes = [each for each in told if each.source in self.job.domains]
            shared = [each for each in told if each.source not in self.job.domains]
            plan = self._plan([*nodes, *shared], strikes, final)
            decided = plan.decision
            healable = decided.error is not None and not decided.unknown  # what cannot be read cannot be healed
            if healable and (after := self.shared.inventories_after_heal(self.run_id)):
                # an interrupted commit may hide the only save: this start fails only if healing would not help
                hidden = self._plan([*nodes, *after], strikes, final)
                plan = plan if hidden.decision.error is not None else hidden
            # not while a source is out of sight: it may know of a higher generation, or be the one to claim
            # and not by a start that fails: it would evict a job that lives
            blind = plan.decision.retry or plan.decision.error is not None
            if not blind and self.shared.claim(self.run_id, self.attempt, plan.decision.next_generation):
                plan = self._plan([*nodes, *self.shared.inventories(self.run_id)], strikes, final)
        except Exception as error:  # noqa: BLE001 - whatever it is, the others wait for the broadcast
            return _refusal(error)
        return to_json(plan)

    def _plan(self, inventories: list[Inventory], strikes: frozenset[Strike], final: bool) -> Plan:
        return plan_restore(
            inventories,
            run_id=self.run_id,
            nodes=self.job.nodes,
            coordinates=self.job.coordinates,
            topology=self.topology,
            strikes=strikes,
            policy=replace(self.policy, unknown_final=final),
        )

    def _raise_refusal(self, answer: bytes) -> None:
        if answer.startswith(_REFUSED):
            raise errors.error_like(*from_json(_Refusal, answer, "the leader's answer").refused)

    def _try(
        self, plan: Plan, state: TrainingState, round_number: int, struck_before: Collection[Strike]
    ) -> tuple[set[Strike], Resume | None]:
        """Obtain, agree, load, agree. Returns the copies that failed on any rank, or what was resumed from."""
        chosen = plan.decision.chosen
        if chosen is None:
            raise ValueError("nothing was chosen")
        load: Callable[[TrainingState], Callable[[], Resume]] | None = None
        problem: Exception | None = None
        self._loose = {}
        for step in self._steps(plan, state, round_number):
            failed: Sequence[Strike] = ()
            try:
                failed, load = step()
            except Exception as error:  # noqa: BLE001  (no room for what it fetches, or anything else: the others wait)
                problem = error
            loose = () if self.gatherer is None else self.gatherer.loose(chosen.save)
            struck = self._agree_strikes(failed, problem, loose=loose)
            if struck:
                return struck, None
        if load is None:
            return set(), None  # shards of another world's save were rebuilt: now they are copies, and are planned with
        unfit: Exception | None = None
        copy: Callable[[], Resume] | None = None
        bad: list[Strike] = []
        try:
            self._borrow(chosen.save)
            copy = load(state)
        except (CorruptCopyError, OSError) as error:  # no bad copy is the end: the next candidate
            if chosen.kind == "node" and not isinstance(error, CorruptCopyError):
                problem = error  # its digests were proved: this node's trouble, and no copy's
            else:
                bad = [Strike(where, tier, chosen.save) for where, tier in _places(plan)]
                bad = list(error.strikes) if isinstance(error, BadCopiesError) else bad
                self.tell("warning", what=f"iteration {chosen.save.iteration} cannot be read: {error}", advice="")
        except Exception as error:  # noqa: BLE001  (the user's objects are looked at here, and the others wait)
            unfit = error
        struck = self._agree_strikes(bad, problem, unfit)
        if struck:
            return struck, None
        if copy is None:
            raise ValueError("agreed on a load that is not there")
        resume = self._load(copy)
        if self.gatherer is not None:
            # only now: until the election is over, the record of a bad primary still says what its owner's digest was
            self.gatherer.drop_bad_copies(struck_before)
        return set(), resume

    def _borrow(self, save: SaveId) -> None:
        """What other ranks of this node hold in buffers alone, since the node's directory did not take it."""
        if self.gatherer is not None:
            for rank in self.job.node_ranks:
                self.gatherer.borrow(save, self._loose.get(rank, ()))

    def _assembler(self) -> AssemblyLoader:
        if self.assembler is None:
            raise ValueError("a save on nodes was elected where no node store is configured")
        return self.assembler

    def _steps(self, plan: Plan, state: TrainingState, round_number: int) -> list[Callable[[], _Obtained]]:
        """What brings the elected save's bytes together, in steps after each of which all ranks agree."""
        chosen, retrieval = plan.decision.chosen, plan.retrieval
        if chosen is None:
            raise ValueError("nothing was chosen")
        if chosen.kind == "shared":
            return [lambda: self.shared.obtain(chosen, state)]
        assembly = plan.assembly
        if assembly is not None:
            return [lambda: self._assembler().obtain(chosen, assembly)]
        if chosen.world_size not in (None, self.job.world_size):
            return [lambda: self._rebuild_foreign(chosen, retrieval, round_number)]
        if self.gatherer is None:
            raise ValueError("a save on nodes was elected where no node store is configured")
        gatherer, load = self.gatherer, self._loader(chosen.save, plan)
        # who rebuilds waits for those that read for it: not before all have what they fetched
        stages = [("fetch", gatherer.obtain)]
        stages += [("rebuild", gatherer.rebuild)] if retrieval.rebuilds else []
        stages += [("spread", gatherer.spread)] if retrieval.spread else []

        def step(name: str, run: Callable[[SaveId, RetrievalPlan, bool, str], list[Strike]]) -> _Obtained:
            return run(chosen.save, retrieval, plan.split, f"{name}/{round_number}"), load

        return [partial(step, *stage) for stage in stages]

    def _rebuild_foreign(self, chosen: Candidate, retrieval: RetrievalPlan, round_number: int) -> _Obtained:
        if self.gatherer is None or chosen.world_size is None:
            raise ValueError("a save on nodes was elected where no node store is configured")
        name = f"rebuild/{round_number}"
        return self.gatherer.rebuild_foreign(chosen.save, retrieval, chosen.world_size, name), None

    def _loader(self, save: SaveId, plan: Plan) -> Callable[[TrainingState], Callable[[], Resume]]:
        """What loads the elected save once its shards are on this node."""
        gatherer, chosen = self.gatherer, plan.decision.chosen
        if gatherer is None or chosen is None:
            raise ValueError("a save on nodes was elected where no node store is configured")
        tier = chosen.tier

        def load(state: TrainingState) -> Callable[[], Resume]:
            owners = self.job.data_parallel() if plan.split else (self.job.rank,)
            copy = plan_shard_load(state, gatherer.shards(save, plan.retrieval, owners), self.job.rank)

            def finish() -> Resume:
                copy()
                fetched = gatherer.roles.count("fetched")
                return Resume(
                    save.iteration, save.generation, tier, 0.0, gatherer.retrieved_bytes,
                    own_copies=len(gatherer.roles) - fetched, replica_copies=fetched,
                )  # fmt: skip

            return finish

        return load

    def _load(self, copy: Callable[[], Resume]) -> Resume:
        """The live state changes here; and the last agreement: every rank has loaded, or none goes on.

        A rank whose objects refuse what they are given (`load_state_dict`) raises that, all others that it did. What
        was moved and found is summed over all ranks.
        """
        problem: Exception | None = None
        try:
            resume = self._with_rebuilt(copy())
            mine = _Loaded(counts=(resume.retrieved_bytes, resume.own_copies, resume.replica_copies, resume.rebuilt))
        except Exception as error:  # noqa: BLE001  (the others must not go on without this rank)
            problem, mine = error, _Loaded(failed=_in_words(error))
        everyone = self._told(_Loaded, mine)
        if problem is not None:
            raise problem
        for rank, told in enumerate(everyone):
            if told.failed:
                raise ResilienceError(
                    f"rank {rank} failed while it loaded, so that no rank can go on: {told.failed}",
                    advice="Nothing was saved since. Mend the cause and start again.",
                )
        counts = zip(*(each.counts for each in everyone), strict=True)
        retrieved, own, replicas, rebuilt = (sum(column) for column in counts)
        return replace(resume, retrieved_bytes=retrieved, own_copies=own, replica_copies=replicas, rebuilt=rebuilt)

    def _with_rebuilt(self, resume: Resume) -> Resume:
        """With what this rank made from parity, whatever it was for."""
        made = self.gatherer
        if made is None:
            return resume
        return replace(resume, rebuilt=made.rebuilt, retrieved_bytes=resume.retrieved_bytes + made.rebuilding_bytes)

    def _agree_strikes(
        self,
        failed: Sequence[Strike],
        problem: Exception | None,
        unfit: Exception | None = None,
        loose: tuple[tuple[int, str], ...] = (),
    ) -> set[Strike]:
        """The copies that failed on any rank. What kept a rank from trying (`problem`) is raised on all.

        So is that one rank cannot take the save in (`unfit`), whatever else went wrong elsewhere.
        """
        mine = _Tried(tuple(failed), "" if problem is None else _in_words(problem), unfit is not None, loose)
        everyone = self._told(_Tried, mine)
        self._loose |= {rank: told.loose for rank, told in enumerate(everyone) if told.loose}
        if unfit is not None:
            raise unfit
        if any(told.unfit for told in everyone):
            raise LayoutMismatchError("another rank cannot load the elected save.", advice="See that rank's log.")
        if problem is not None:
            raise problem
        for rank, told in enumerate(everyone):
            if told.problem:
                raise ResilienceError(f"rank {rank} could not obtain what it needs: {told.problem}")
        return {strike for told in everyone for strike in told.failed}

    def _told(self, kind: type[_Word], mine: _Word) -> list[_Word]:
        """Every rank's `kind`, in rank order. Collective."""
        gathered = self.setup.gather(to_json(mine))
        return [from_json(kind, payload, f"what rank {rank} told") for rank, payload in enumerate(gathered)]


def _in_words(error: Exception) -> str:
    """Never empty."""
    kind = "" if isinstance(error, ResilienceError | OSError) and str(error) else f"{type(error).__name__}: "
    return f"{kind}{error}"[:2000]


def _refusal(error: Exception) -> bytes:
    """What makes all ranks raise it alike."""
    if isinstance(error, ResilienceError):
        return json.dumps({"refused": [type(error).__name__, str(error)]}).encode()
    if isinstance(error, OSError):
        return json.dumps({"refused": ["StoreError", str(error)]}).encode()
    return json.dumps({"refused": ["ResilienceError", f"{type(error).__name__}: {error}"]}).encode()


def _places(plan: Plan) -> set[tuple[str, Tier]]:
    """Where the elected save's bytes came from."""
    chosen = plan.decision.chosen
    if chosen is not None and chosen.kind == "shared":
        return {(chosen.source, chosen.tier)}
    own = {(copy.node_dir, copy.tier) for copy in plan.retrieval.local}
    if plan.assembly is not None:
        own |= {(copy.node_dir, copy.tier) for copy in plan.assembly.local}
    return own | {(fetch.from_dir, fetch.tier) for fetch in plan.retrieval.fetches}


def _plan_from_json(content: bytes) -> Plan:
    return from_json(Plan, content, "the plan of the restart")
