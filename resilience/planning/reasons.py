"""How the reasons of an election are put into words, for logs, `explain` and `Resume.passed_over`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from resilience.planning.copies import CopyTable
from resilience.planning.decision import Candidate, PassedOver, Strike
from resilience.planning.inventory import AttemptLog, SaveId


def other_world_size(saved: int, wanted: int) -> str:
    return f"it was saved by {saved} ranks, and this start has {wanted}; elastic=False takes no other world size"


def other_run(run_id: str | None) -> str:
    return f"it belongs to run {run_id!r}" if run_id is not None else "it does not say to which run it belongs"


def left_behind(by: AttemptLog) -> str:
    """Why a save is abandoned: by which attempt."""
    start = f"iteration {by.base.iteration}" if by.base else "the beginning"
    how = "was forked from" if by.fork else "went on from"
    return f"abandoned: attempt {by.name} {how} {start}"


def incomplete(table: CopyTable, strikes: Collection[Strike], completed: Collection[SaveId]) -> str:
    """Why a save on the nodes is not complete, and whether it ever was."""
    missing = table.missing
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    words = f"no usable copy of the shard of rank {missing[0]}{more}"
    if any(holding.copies.parity for holding in table.holdings):
        words += ", and too little that it could be rebuilt from"
    struck = sum(strike.save == table.save for strike in strikes)
    if struck:
        words += f"; {struck} {'copies' if struck > 1 else 'copy'} failed to read or verify"
    if table.conflicting:
        words += f"; records of rank {table.conflicting[0]} disagree on its digest"
    once = "it was complete once" if table.save in completed else "nothing shows that it was ever complete"
    return f"{words} ({once})"


def elected(candidate: Candidate, *, fork_base: bool) -> str:
    """Why this one."""
    where = f"in `{candidate.source}`" if candidate.kind == "shared" else f"on the nodes ({candidate.tier})"
    if candidate.weights_only:
        return "no save of this run exists: the pretrained weights are the start"
    if candidate.foreign and fork_base:
        return f"this run was forked to it, {where}, and has no newer save since"
    if candidate.foreign:
        return f"this run has no save yet: the newest checkpoint {where} is its start"
    return f"it is the newest save that is complete and usable, {where}"


def fruitless(counts: Mapping[SaveId | None, int]) -> str:
    """What was tried in vain, from where and how often."""
    beginning = SaveId(-1, -1, "")
    bases = sorted(counts, key=lambda base: base or beginning)
    tried = (f"{counts[base]} from {f'iteration {base.iteration}' if base else 'the beginning'}" for base in bases)
    return f"Restarts completed no newer save: {', '.join(tried)}."


def summary(passed_over: Sequence[PassedOver]) -> str:
    """The first few reasons in one line, for an error's message."""
    if not passed_over:
        return "nothing was found"
    told = "; ".join(f"iteration {each.iteration} ({each.tier}): {each.reason}" for each in passed_over[:3])
    more = f"; and {len(passed_over) - 3} more" if len(passed_over) > 3 else ""
    return told + more
