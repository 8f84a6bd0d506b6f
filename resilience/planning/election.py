"""Which save to resume from: the newest one that is complete and usable, over all tiers, with the reasons.

The order: unknown sources first ("could not look" is never "empty"), then a fork that the user asks for, then the saves
of this run from the newest to the oldest, then what a run without any save may start from (another run's checkpoint
under `load`, pretrained weights), and only then a fresh start. Pure and independent of the order of inventories, so
that every rank comes to the same decision. Linear in the number of records: completeness is only looked into until a
save is found.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from resilience.planning import reasons
from resilience.planning.ballot import Ballot, open_ballot
from resilience.planning.copies import Holding, copy_table
from resilience.planning.decision import Candidate, Decision, ElectionPolicy, PassedOver, Strike
from resilience.planning.history import abandoned_saves
from resilience.planning.inventory import TIERS, Inventory, SaveId, SharedSave, Tier

__all__ = [
    "Candidate",
    "Decision",
    "ElectionPolicy",
    "PassedOver",
    "Strike",
    "abandoned_saves",
    "elect",
]

_SOURCE_ORDER = ("save", "load", "global", "pretrained")


@dataclass(frozen=True)
class _Option:
    """One save in one place, before anybody looked whether it is usable."""

    save: SaveId
    tier: Tier
    shared: SharedSave | None = None

    def order(self) -> tuple[SaveId, int, int]:
        """For sorting with the best first (reversed): the election's order, then the cheapest tier."""
        source = _SOURCE_ORDER.index(self.shared.source) if self.shared else 0
        return self.save, -TIERS.index(self.tier), -source


def elect(
    inventories: Sequence[Inventory],
    *,
    run_id: str,
    world_size: int,
    strikes: frozenset[Strike],
    policy: ElectionPolicy,
) -> Decision:
    """Elect the save that all ranks resume from.

    `inventories`: one per source, node directories and shared ones alike, taken before this attempt wrote its own log;
    `strikes`: copies that failed so far. Errors are part of the answer. With unknown sources the answer is `retry`,
    until `policy.unknown_final`.
    """
    ballot = open_ballot(inventories, run_id=run_id, world_size=world_size, strikes=strikes, policy=policy)
    if ballot.unknown and not policy.unknown_final:
        return Decision(
            f"Not every source could be read: {'; '.join(ballot.unknown)}.",
            ballot.history.highest_generation + 1,
            retry=True,
            unknown=ballot.unknown,
        )
    step = policy.ckpt_step
    if step is not None and not ballot.history.fork_is_logged(step, policy.fork_id):
        return _fork(ballot, step, inventories)
    return _newest_of_this_run(ballot)


# --- A start with ckpt_step ------------------------------------------------------------------------------------------


def _fork(ballot: Ballot, step: int, inventories: Sequence[Inventory]) -> Decision:
    """Load exactly the persistent checkpoint that the user names, and leave everything newer behind."""
    place = "load" if any(each.source == "load" for each in inventories) else "save"
    folders = [each for each in ballot.shared if each.tier == "persistent" and each.source == place]
    named = sorted((each for each in folders if each.save.iteration == step), key=lambda each: each.save, reverse=True)
    blind = [each.unknown for each in inventories if each.source == place and each.unknown]
    if not named and blind:
        return _unavailable(ballot, f"ckpt_step={step} cannot be looked for: `{place}` cannot be read.")
    if not named:
        there = ", ".join(str(each) for each in sorted({each.save.iteration for each in folders}))
        return ballot.fail(
            "CheckpointNotFound",
            f"ckpt_step={step} is not in `{place}`; there {f'is {there}' if there else 'is no checkpoint'}.",
            "Give an iteration that is there, or leave ckpt_step out to take the newest.",
        )
    for each in named:
        reason = _why_not_shared(ballot, each, by_tracker=False)
        if not reason:
            _pass_over_newer(ballot, step)
            chosen = _shared_candidate(ballot, each)
            return ballot.decide(
                f"ckpt_step={step} asks for it (fork {ballot.policy.fork_id!r})",
                chosen,
                fork=(step, ballot.policy.fork_id),
            )
        ballot.pass_over(each.save, each.tier, reason)
    return ballot.fail(
        "NoUsableSave",
        f"ckpt_step={step} is in `{place}` but cannot be used: {ballot.passed_over[-1].reason}.",
        "Give another iteration, or leave ckpt_step out to take the newest.",
    )


def _pass_over_newer(ballot: Ballot, step: int) -> None:
    newer = {(save, _tier_of(held)) for save, held in ballot.holdings.items()}
    newer |= {(each.save, each.tier) for each in ballot.shared if ballot.is_own(each)}
    for save, tier in newer:
        if save.iteration > step:
            ballot.pass_over(save, tier, f"ckpt_step={step} asks for an older one")


# --- The newest save of this run -------------------------------------------------------------------------------------


def _newest_of_this_run(ballot: Ballot) -> Decision:
    options = [_Option(save, _tier_of(held)) for save, held in ballot.holdings.items()]
    options += [_Option(each.save, each.tier, each) for each in ballot.shared if ballot.is_own(each)]
    decision = _first_usable(ballot, options)
    if decision is not None:
        return decision
    if ballot.unauthentic and not ballot.history.completed and ballot.policy.on_no_usable_save == "stop":
        return ballot.fail(
            "NoUsableSave",
            f"Run {ballot.run_id!r} has {ballot.unauthentic} files on its nodes without a MAC of this job's key, and "
            "no save that has one: they were written without a key, with another one, or by somebody else.",
            'Start with the key that they were written with, or set on_no_usable_save="fresh" to start over.',
        )
    completed = ballot.history.completed
    if completed and ballot.policy.on_no_usable_save == "stop":
        newest = max(completed)
        if ballot.unknown:
            return _unavailable(ballot, f"No save of run {ballot.run_id!r} is usable among the sources that answer.")
        return ballot.fail(
            "NoUsableSave",
            f"Run {ballot.run_id!r} once completed iteration {newest.iteration} (attempt {newest.folder}), and none "
            f"of its saves is usable now: {reasons.summary(ballot.reasons_above(None))}.",
            'Bring back the missing nodes or storage, or set on_no_usable_save="fresh" to start over.',
        )
    return _without_own_save(ballot)


def _first_usable(ballot: Ballot, options: Iterable[_Option]) -> Decision | None:
    """Walk from the best option down. None: no option is usable, and no error follows from that alone.

    One save from which restarts got nowhere is passed over for the next older one; a second one ends the job.
    """
    in_vain = False
    for option in sorted(options, key=_Option.order, reverse=True):
        candidate = _candidate(ballot, option)
        if candidate is None:
            continue
        restarts = ballot.fruitless.get(option.save)
        if restarts is None:
            return _accept(ballot, candidate)
        if len(ballot.fruitless) > 1:
            return _no_progress(ballot)
        in_vain = True
        ballot.pass_over(option.save, option.tier, f"{restarts} restarts from it completed no newer save")
    return _no_progress(ballot) if in_vain else None


def _candidate(ballot: Ballot, option: _Option) -> Candidate | None:
    """The option as a candidate, or None after noting why it is passed over."""
    left_by = ballot.abandoned.get(option.save)
    if left_by is not None:
        ballot.pass_over(option.save, option.tier, reasons.left_behind(left_by))
        return None
    if option.shared is not None:
        reason = _why_not_shared(ballot, option.shared)
        if reason:
            ballot.pass_over(option.save, option.tier, reason)
            return None
        return _shared_candidate(ballot, option.shared)
    world_size = ballot.sizes[option.save]
    table = copy_table(option.save, ballot.holdings[option.save], world_size, ballot.strikes)
    if table.missing:
        ballot.pass_over(option.save, option.tier, reasons.incomplete(table, ballot.strikes, ballot.history.completed))
        return None
    return Candidate(option.save, table.tier(), "node", "", ballot.run_id, sum(table.nbytes), world_size=world_size)


def _accept(ballot: Ballot, candidate: Candidate) -> Decision:
    """With unknown sources only a save at least as new as anything known to have been complete is safe."""
    if ballot.unknown:
        ignored = ballot.abandoned.keys() | ballot.fruitless.keys()
        newest = max(ballot.history.completed - ignored, default=None)
        if newest is not None and newest > candidate.save:
            return _unavailable(
                ballot,
                f"Iteration {candidate.save.iteration} is usable, but iteration {newest.iteration} was complete once "
                "and may be out of sight.",
            )
    return ballot.decide(reasons.elected(candidate, fork_base=ballot.is_fork_base(candidate.save)), candidate)


def _why_not_shared(ballot: Ballot, each: SharedSave, *, by_tracker: bool = True) -> str:
    if each.problem:
        return each.problem
    if by_tracker and each.tracker is not None and each.save.iteration > each.tracker:
        return f"the tracker names {each.tracker}"
    if any(s.save == each.save and (s.where, s.tier) == (each.source, each.tier) for s in ballot.strikes):
        return "it failed to read or verify"
    size = each.world_size
    if not ballot.policy.elastic and each.source != "pretrained" and size not in (None, ballot.world_size):
        return reasons.other_world_size(size or 0, ballot.world_size)
    return ""


def _shared_candidate(ballot: Ballot, each: SharedSave) -> Candidate:
    return Candidate(
        each.save,
        each.tier,
        "shared",
        each.source,
        each.run_id,
        each.nbytes,
        foreign=each.run_id != ballot.run_id and each.source != "pretrained",
        weights_only=each.source == "pretrained",
        world_size=each.world_size,
    )


# --- A run without any save ------------------------------------------------------------------------------------------


def _without_own_save(ballot: Ballot) -> Decision:
    """Another run's checkpoint under `load`, else pretrained weights, else a fresh start; or why none of them."""
    if ballot.unknown:
        return _unavailable(ballot, "A start without a save of this run needs every source to answer.")
    others = [each for each in ballot.shared if ballot.may_start_from(each)]
    decision = _first_usable(ballot, [_Option(each.save, each.tier, each) for each in others])
    if decision is not None:
        return decision
    if others and ballot.policy.on_no_usable_save == "stop":
        return ballot.fail(
            "NoUsableSave",
            f"No checkpoint to start from is usable: {reasons.summary(ballot.reasons_above(None))}.",
            'Repair or change `load`, or set on_no_usable_save="fresh" to start without them.',
        )
    if None in ballot.fruitless:
        return _no_progress(ballot)
    if ballot.policy.pretrained:
        return _pretrained(ballot)
    if ballot.policy.exit_on_missing:
        return ballot.fail(
            "MissingCheckpointExit",
            "There is no checkpoint to load, and exit_on_missing_checkpoint is set.",
            "Look at `load` and `save`.",
        )
    if ballot.history.completed:
        return ballot.decide('no save is usable, and on_no_usable_save="fresh" asks to start over')
    return ballot.decide(f"every source answered, and none shows that run {ballot.run_id!r} ever completed a save")


def _pretrained(ballot: Ballot) -> Decision:
    weights = [_Option(each.save, each.tier, each) for each in ballot.shared if each.source == "pretrained"]
    decision = _first_usable(ballot, weights)
    if decision is not None:
        return decision
    return ballot.fail(
        "NoUsableSave" if weights else "CheckpointNotFound",
        f"pretrained_checkpoint holds no usable checkpoint: {reasons.summary(ballot.reasons_above(None))}.",
        "Give the base directory of a checkpoint (with iter_* folders and a tracker).",
    )


# --- Small parts -----------------------------------------------------------------------------------------------------


def _unavailable(ballot: Ballot, message: str) -> Decision:
    return ballot.fail(
        "SourceUnavailable",
        f"{message} Not readable: {'; '.join(ballot.unknown)}.",
        "Repair the source, or take it away for good (remove the directory from the configuration or the node).",
    )


def _no_progress(ballot: Ballot) -> Decision:
    return ballot.fail(
        "NoProgress",
        reasons.fruitless(ballot.fruitless),
        "Find out why training fails; ckpt_step starts a new count, max_restarts_without_progress allows more.",
    )


def _tier_of(held: Collection[Holding]) -> Tier:
    return min((holding.copies.tier for holding in held), key=TIERS.index)
