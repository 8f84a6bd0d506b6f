"""A history that breaks a promise, made as small as it can be and still break it: what a person reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from resilience.drill.simulator.history import Fault, History, StartPlan

__all__ = ["shrink"]


def shrink(history: History, still_fails: Callable[[History], bool], tries: int = 400) -> History:
    """The smallest history that was found of which `still_fails` is true, as it is of `history`.

    One thing after the other is left out for as long as that helps, at most `tries` executions.
    """
    smaller = True
    while smaller and tries > 0:
        smaller = False
        for candidate in _smaller(history):
            tries -= 1
            if still_fails(candidate):
                history, smaller = candidate, True
                break
            if tries <= 0:
                break
    return history


def _smaller(history: History) -> Iterator[History]:
    """What could be left out, the most first."""
    if len(history.starts) > 1:
        yield replace(history, starts=history.starts[:-1], faults=_of_starts(history, len(history.starts) - 1))
    for fault in history.faults:
        yield replace(history, faults=tuple(each for each in history.faults if each is not fault))
    if history.nodes > 2:
        nodes = history.nodes - 1
        ranks = nodes * history.ranks_per_node
        yield replace(
            history, nodes=nodes, faults=tuple(replace(each, rank=each.rank % ranks) for each in history.faults)
        )
    if history.ranks_per_node > 1:
        ranks = history.nodes
        faults = tuple(replace(each, rank=each.rank % ranks) for each in history.faults)
        yield replace(history, ranks_per_node=1, faults=faults)
    for start in range(len(history.starts)):
        plain = StartPlan(grace_s=1.0)
        if history.starts[start] != plain:
            yield replace(history, starts=(*history.starts[:start], plain, *history.starts[start + 1 :]))
    if history.steps > 1:
        yield replace(history, steps=history.steps // 2)
        yield replace(history, steps=history.steps - 1)
    if history.persist_every is not None and history.kind in ("local", "in_memory"):
        yield replace(
            history, persist_every=None, checkpoint=tuple(e for e in history.checkpoint if e[0] != "async_save")
        )
    for option in history.checkpoint:
        yield replace(history, checkpoint=tuple(each for each in history.checkpoint if each is not option))
    for option in history.resiliency:
        yield replace(history, resiliency=tuple(each for each in history.resiliency if each is not option))
    if history.factor > 2:
        yield replace(history, factor=2)
    if history.replication:
        yield replace(history, replication=False)
    if history.eagerness > 0.01:
        yield replace(history, eagerness=0.01)
    for number, fault in enumerate(history.faults):
        if fault.point > 8:  # an earlier moment is easier to follow
            earlier = replace(fault, point=fault.point // 2)
            yield replace(history, faults=(*history.faults[:number], earlier, *history.faults[number + 1 :]))


def _of_starts(history: History, count: int) -> tuple[Fault, ...]:
    return tuple(fault for fault in history.faults if fault.start < count)
