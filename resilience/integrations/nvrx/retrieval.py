"""From what lies on the nodes to this rank's shard, proved: look, choose, prove, fetch, and have the copies made again.

Each step is collective and ends alike on all ranks; what is chosen is decided in `choice.py`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from resilience.errors import CorruptCopyError, ResilienceError, in_short
from resilience.integrations.nvrx.choice import Choice, Copy, Read, View, choose
from resilience.integrations.nvrx.directory import Shard, file_name
from resilience.integrations.nvrx.names import LocalCheckpointError
from resilience.integrations.nvrx.world import World, agreed
from resilience.planning.retrieval import Fetch
from resilience.planning.typed_json import from_json
from resilience.planning.wire import to_json
from resilience.replication.retrieval import Fetched, run_fetches
from resilience.snapshot.arena import Arena
from resilience.stores.digest import algorithm_of, digest_of

__all__ = ["Elected", "look", "protect_again", "retrieve", "settle"]

_LOG = logging.getLogger(__name__)


@dataclass
class Elected:
    """What `find_latest` found. `opened`: copies that this rank has proved, and holds."""

    choice: Choice
    views: tuple[View, ...]
    struck: set[Copy] = field(default_factory=set)
    opened: dict[Copy, Arena] = field(default_factory=dict)
    fetched: Arena | None = None  # this rank's own shard, which had to come from elsewhere

    def close(self) -> None:
        for arena in self.opened.values():
            arena.close()
        self.opened.clear()


def look(world: World) -> tuple[View, ...]:
    view, problem = View(world.nodes[world.rank]), ""
    try:
        if world.rank == world.node_ranks[0]:
            view = View(view.node, tuple(world.session.found()))
    except OSError as error:
        problem = in_short(error)  # could not look: that is not "nothing there"
    told = agreed(world.calls, to_json(view), problem)
    return tuple(from_json(View, each, f"what rank {rank} found") for rank, each in enumerate(told))


def settle(world: World, elected: Elected) -> None:
    """Choose, have every copy that is to be read proved by its reader, and choose again without the bad ones."""
    while True:
        elected.choice = choose(elected.views, elected.struck)
        bad = [
            number
            for number, read in enumerate(elected.choice.reads)
            if read.reader == world.rank and not _prove(world, elected, read)
        ]
        struck = [json.loads(each) for each in world.calls.gather(json.dumps(bad).encode())]
        if not any(struck):
            return
        elected.struck |= {elected.choice.reads[number].copy for each in struck for number in each}


def retrieve(world: World, elected: Elected) -> Arena:
    """This rank's shard, from here or from a peer. Collective; LocalCheckpointError on all ranks."""
    while True:
        choice = elected.choice
        fetched, problem = None, ""
        try:
            fetched = _fetch(world, elected, next(world.numbers))
        except (ResilienceError, OSError) as error:
            problem = in_short(error)
        bad = fetched is not None and bool(fetched.problem)
        told = agreed(world.calls, json.dumps(bad).encode(), problem)
        if not any(json.loads(each) for each in told):
            break
        elected.struck |= {choice.reads[rank].copy for rank, each in enumerate(told) if json.loads(each)}
        if fetched is not None and fetched.arena is not None:
            world.directory.discard(fetched.arena)
        settle(world, elected)
        if elected.choice.iteration != choice.iteration:
            raise LocalCheckpointError(
                f"iteration {choice.iteration} cannot be loaded: {'; '.join(elected.choice.passed_over[:4])}.",
                advice="Call find_latest() for the one before it.",
            )
    own = choice.reads[world.rank].copy
    if fetched is not None and fetched.arena is not None:
        _keep_fetched(world, choice, own, fetched.arena)
        elected.fetched = fetched.arena
    here = tuple(Read(rank, rank, read.copy) for rank, read in enumerate(choice.reads))
    kept = tuple(Copy(world.nodes[read.rank], read.copy.found) for read in choice.reads)
    elected.choice = Choice(choice.iteration, choice.save, here, choice.passed_over, (*choice.copies, *kept))
    return elected.fetched or elected.opened[own]


def _fetch(world: World, elected: Elected, number: int) -> Fetched | None:
    choice = elected.choice
    fetches = [_as_fetch(world.nodes, read) for read in choice.reads if read.reader != read.rank]
    if not fetches:
        return None
    arrived = run_fetches(
        fetches,
        world.communicator,
        f"local/load/{number}",
        read=lambda fetch: elected.opened[choice.reads[fetch.owner].copy],
        land=lambda fetch: world.directory.begin(choice.iteration, fetch.owner, fetch.nbytes),
        reserve=lambda arena, stop, wanted: None,  # it has its room
        meanwhile=lambda: None,
    )
    return arrived[0] if arrived else None


def _keep_fetched(world: World, choice: Choice, own: Copy, arena: Arena) -> None:
    """What was fetched is this rank's copy from now on. A node that cannot keep it has loaded it all the same."""
    try:
        world.directory.prepare(choice.iteration, choice.save)
        world.directory.finish(arena, choice.iteration, world.rank)
        shard = Shard(own.found.nbytes, own.found.digest)
        world.directory.extend(choice.iteration, choice.save, len(world.nodes), {world.rank: shard})
    except OSError as error:
        _LOG.warning("iteration %d was fetched and is not kept here: %s", choice.iteration, error)


def protect_again(world: World, elected: Elected) -> None:
    """Where a node of this rank's clique lacks a copy of what was loaded, have all its members exchange theirs.

    In the background, before the next save's work.
    """
    choice, rank = elected.choice, world.rank
    holders = {owner: choice.holders(owner) for owner in world.members}
    if all(world.nodes[member] in holders[owner] for member in world.members for owner in world.members):
        return
    found = choice.reads[rank].copy.found
    folder = str(rank) if elected.fetched is not None else found.folder
    open_own = partial(world.session.rank(folder).open, found)  # a mapping of its own: ours goes with the next save
    world.background.protect_again(choice.iteration, choice.save, next(world.numbers), open_own, found.digest)
    everywhere = tuple(
        Copy(world.nodes[member], choice.reads[owner].copy.found) for member in world.members for owner in world.members
    )
    elected.choice = Choice(choice.iteration, choice.save, choice.reads, choice.passed_over, choice.copies + everywhere)


def _prove(world: World, elected: Elected, read: Read) -> bool:
    """Whether the copy's bytes have their digest; if so it is held from now on."""
    if read.copy in elected.opened:
        return True
    found = read.copy.found
    try:
        arena = world.session.rank(found.folder).open(found)
        if arena.nbytes == found.nbytes and digest_of(arena.mapped.view, algorithm_of(found.digest)) == found.digest:
            elected.opened[read.copy] = arena
            return True
        arena.close()
        problem = "its bytes do not match their digest"
    except (OSError, CorruptCopyError) as error:
        problem = in_short(error)
    _LOG.warning("%s is not used: %s", file_name(found.iteration, found.owner), problem)
    return False


def _as_fetch(nodes: Sequence[str], read: Read) -> Fetch:
    found = read.copy.found
    return Fetch(
        owner=read.rank, from_node=read.copy.node, from_dir=found.folder, tier="local", from_rank=read.reader,
        to_node=nodes[read.rank], to_rank=read.rank, nbytes=found.nbytes, digest=found.digest,
    )  # fmt: skip
