"""What an election works on: the inputs, what was derived from them once, and what was passed over so far.

Here it is also decided which checkpoints belong to this run, which a run without a save may be started from, and which
can never be elected.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from resilience.planning import reasons
from resilience.planning.copies import Holding, holdings_of, world_sizes
from resilience.planning.decision import Candidate, Decision, ElectionPolicy, ErrorKind, PassedOver, Strike
from resilience.planning.history import History, abandonments, fruitless_bases, read_history
from resilience.planning.inventory import TIERS, AttemptLog, Inventory, SaveId, SharedSave, Tier


@dataclass
class Ballot:
    """The inputs, what was derived from them, and the list of what was passed over so far.

    `holdings`: node saves that may be elected; `sizes`: how many ranks took each of them.
    """

    run_id: str
    world_size: int
    policy: ElectionPolicy
    history: History
    holdings: Mapping[SaveId, tuple[Holding, ...]]
    sizes: Mapping[SaveId, int]
    shared: tuple[SharedSave, ...]
    strikes: frozenset[Strike]
    unknown: tuple[str, ...]
    abandoned: Mapping[SaveId, AttemptLog]
    fruitless: Mapping[SaveId | None, int]
    unauthentic: int = 0  # files of this run that have no MAC of this job's key
    passed_over: list[PassedOver] = field(default_factory=list)

    def pass_over(self, save: SaveId, tier: Tier, reason: str) -> None:
        self.passed_over.append(PassedOver(save.iteration, save.generation, tier, reason))

    def reasons_above(self, chosen: Candidate | None) -> tuple[PassedOver, ...]:
        """What was passed over, newest first; what is older than the chosen save interests nobody."""
        least = (chosen.save.iteration, chosen.save.generation) if chosen else (-1, -1)
        kept = {each for each in self.passed_over if (each.iteration, each.generation) >= least}
        return tuple(
            sorted(kept, key=lambda each: (-each.iteration, -each.generation, TIERS.index(each.tier), each.reason))
        )

    def decide(self, reason: str, chosen: Candidate | None = None, *, fork: tuple[int, str] | None = None) -> Decision:
        return Decision(
            reason,
            self.history.highest_generation + 1,
            chosen,
            self.reasons_above(chosen),
            fresh=chosen is None,
            unknown=self.unknown,
            fork=fork,
        )

    def fail(self, kind: ErrorKind, message: str, advice: str) -> Decision:
        return Decision(
            message,
            self.history.highest_generation + 1,
            passed_over=self.reasons_above(None),
            unknown=self.unknown,
            error=(kind, message, advice),
        )

    def is_own(self, each: SharedSave) -> bool:
        """Of this run, or another run's checkpoint that it was forked to: that is part of its history from then on."""
        return each.run_id == self.run_id or self.is_fork_base(each.save)

    def is_fork_base(self, save: SaveId) -> bool:
        """Whether this start is an automatic restart of a fork to that save."""
        step = self.policy.ckpt_step
        return step is not None and any(
            log.fork == (step, self.policy.fork_id) and log.base == save for log in self.history.attempts
        )

    def may_start_from(self, each: SharedSave) -> bool:
        """Whether a run without a save may start from it: any under `load`; in `save` one that names no run at all.

        (Folders that name no run were written by others. With `ckpt_step` only that iteration counts.)
        """
        if each.run_id == self.run_id or each.tier != "persistent":
            return False
        asked = self.policy.ckpt_step is None or each.save.iteration == self.policy.ckpt_step
        return asked and (each.source == "load" or (each.source == "save" and each.run_id is None))


def open_ballot(
    inventories: Sequence[Inventory],
    *,
    run_id: str,
    world_size: int,
    strikes: frozenset[Strike],
    policy: ElectionPolicy,
) -> Ballot:
    """Read the run's history from the inventories and note what can never be elected."""
    history = read_history(inventories, run_id)
    sizes = {
        save: size for save, size in world_sizes(inventories, run_id).items() if policy.elastic or size == world_size
    }
    holdings: dict[SaveId, tuple[Holding, ...]] = {}
    for size in sorted(set(sizes.values())):
        found = holdings_of(inventories, run_id, size)
        holdings |= {save: held for save, held in found.items() if sizes.get(save) == size}
    shared = tuple({each: None for inventory in inventories for each in inventory.shared_saves})
    own = {*holdings, *history.completed}
    ballot = Ballot(
        run_id,
        world_size,
        policy,
        history,
        holdings,
        sizes,
        shared,
        strikes,
        tuple(sorted(f"{each.source}: {each.unknown}" for each in inventories if each.unknown)),
        abandonments(own, history.attempts),
        fruitless_bases(history.attempts, policy.max_restarts_without_progress),
        sum(each.unauthentic for each in inventories),
    )
    _pass_over_unfit(ballot, inventories)
    return ballot


def _pass_over_unfit(ballot: Ballot, inventories: Iterable[Inventory]) -> None:
    """Other runs' records, and node saves whose world size does not do, are named once each with the reason."""
    unfit: set[tuple[SaveId, Tier, str]] = set()
    for inventory in inventories:
        for copies in inventory.node_saves:
            if copies.run_id != ballot.run_id:
                unfit.add((copies.save, copies.tier, reasons.other_run(copies.run_id)))
            elif copies.save not in ballot.sizes:
                reason = reasons.other_world_size(copies.world_size, ballot.world_size)
                unfit.add((copies.save, copies.tier, reason))
    only_own = bool(ballot.history.completed) and ballot.policy.on_no_usable_save == "stop"
    for each in ballot.shared:
        if each.source == "pretrained" or ballot.is_own(each) or (ballot.may_start_from(each) and not only_own):
            continue
        unfit.add((each.save, each.tier, reasons.other_run(each.run_id)))
    for save, tier, reason in unfit:
        ballot.pass_over(save, tier, reason)
