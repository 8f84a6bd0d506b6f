"""`LocalCheckpointManager`: the interface of NVIDIA's Resiliency Extension, over this package's own core.

Users (Megatron's training loops among them) call four things: `find_latest`, `load`, `save` and `local_ckpt_dir`. What
is underneath differs: a checkpoint counts once every rank has committed digests of its shards, a copy is compared with
its digest before it is loaded, what fails fails on all ranks, and a save leaves the training thread with a copy into
memory. docs/trainers.md has the list.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, overload

from torch import distributed as dist

from resilience.errors import CorruptCopyError, PeerLostError, ResilienceError, in_short
from resilience.integrations.nvrx.background import Background, SaveJob
from resilience.integrations.nvrx.choice import Choice, Copy, Read, View, choose
from resilience.integrations.nvrx.cliques import members_of
from resilience.integrations.nvrx.directory import RankDirectory, Session, Shard, file_name, parse_name
from resilience.integrations.nvrx.names import AsyncRequest, LocalCheckpointError
from resilience.integrations.nvrx.packing import Packer, unpack
from resilience.integrations.nvrx.trust import Trust
from resilience.integrations.nvrx.waiting import wait_until_written
from resilience.job import make_communicator
from resilience.planning.patience import STALL_BOUNDS
from resilience.planning.retrieval import Fetch
from resilience.planning.typed_json import from_json
from resilience.planning.wire import to_json
from resilience.replication.communicator import Agreements, Communicator
from resilience.replication.retrieval import Fetched, run_fetches
from resilience.snapshot.arena import Arena
from resilience.stores.digest import algorithm_of, digest_of
from resilience.stores.filesystem import PosixFileSystem

__all__ = ["CkptID", "LocalCheckpointManager"]

_LOG = logging.getLogger(__name__)
_CLOSE_S: Final = 5.0

#: Iteration, rank and session.
CkptID = tuple[int, int, str]


@dataclass
class _World:
    """This rank in one world of torch.distributed. `calls`: all ranks, of the training thread."""

    group: Any
    communicator: Communicator
    calls: Agreements
    saves: Agreements
    nodes: tuple[str, ...]
    members: tuple[int, ...]
    session: Session
    directory: RankDirectory
    background: Background

    @property
    def rank(self) -> int:
        return self.communicator.rank

    @property
    def node_ranks(self) -> tuple[int, ...]:
        return tuple(rank for rank, node in enumerate(self.nodes) if node == self.nodes[self.rank])

    def close(self) -> None:
        self.background.close(_CLOSE_S)
        for group in (self.calls, self.saves):
            group.close()
        self.communicator.close()
        self.directory.close()


@dataclass
class _Elected:
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


class LocalCheckpointManager:
    """Local checkpoints of all ranks' states, in `<root>/<session>/<rank>` on each node.

    Every method but the constructor and the paths is collective: all ranks call it, in the same order. What fails
    raises `LocalCheckpointError` (a `CheckpointingException`) on all of them.
    """

    def __init__(
        self,
        root_local_ckpt_dir: str | os.PathLike[str],
        session_id: str = "",
        repl_strategy: Any = None,
        *,
        keep: int = 1,
        trusted_classes: Iterable[type | str] = (),
        timeout_s: float = 120.0,
    ) -> None:
        """Local; makes no directory, and leaves torch.distributed alone.

        `repl_strategy`: `CliqueReplicationStrategy` (NVRx's too) or the lazy one; None: shards stay on their nodes.
        `keep`: complete checkpoints that are kept (NVRx: one). `trusted_classes`: classes, or their full names, that a
        state may hold beside those that `trust.py` lists. `timeout_s`: bound of any wait for a peer, without progress.
        """
        if keep < 1:
            raise LocalCheckpointError(f"keep={keep}: at least one checkpoint is kept.")
        self.latest_iteration = -1
        self.session_id = session_id
        self.repl_strategy = repl_strategy
        self.globally_available_ids: Mapping[int, Sequence[CkptID]] = {}
        self._root = Path(root_local_ckpt_dir)
        self._keep = keep
        self._trust = Trust(trusted_classes)
        self._packer = Packer(self._trust)
        self._timeout_s = timeout_s
        self._fs = PosixFileSystem()
        self._world_now: _World | None = None
        self._elected: _Elected | None = None
        self._complete: list[int] = []  # iterations of which all ranks know, ascending
        self._number = 0  # of saves and loads, equal on all ranks
        atexit.register(_close_at_exit, weakref.ref(self), os.getpid())

    @property
    def rank(self) -> int:
        """This rank's number now: it may change where a job restarts within its processes."""
        if dist.is_available() and dist.is_initialized():
            return int(dist.get_rank())
        _LOG.warning("torch.distributed is not initialised: this is taken for the only rank.")
        return 0

    @property
    def local_ckpt_dir(self) -> Path:
        """This rank's directory. There after the first `find_latest` or `save`."""
        return self._root / self.session_id / str(self.rank)

    def find_latest(self) -> int:
        """The newest iteration of which every rank's shard is there and matches its digest; -1 if there is none.

        The answer is kept until the next save, or until `latest_iteration` is set to -1.
        """
        world = self._world()
        if self.latest_iteration < 0:
            self._elect(world)
        return self.latest_iteration

    def load(self) -> tuple[Any, CkptID]:
        """This rank's state of the iteration that `find_latest` answered, its tensors where they were, and its id.

        What is missing here is fetched from whoever has it, and kept; copies that the clique lacks are made again in
        the background. May be called again.
        """
        world = self._world()
        if self.latest_iteration < 0:
            raise LocalCheckpointError("there is nothing to load.", advice="Call find_latest() first; it says what is.")
        wanted = self.latest_iteration
        if self._elected is None:
            self._elect(world)
        elected = self._elected
        if elected is None or elected.choice.iteration != wanted:
            raise LocalCheckpointError(f"iteration {wanted} cannot be loaded any more.", advice="Call find_latest().")
        arena = self._retrieve(world, elected)
        state = self._unpacked(world, elected.choice.iteration, arena)
        self._protect_again(world, elected)
        return state, self._ckpt_id(elected.choice.iteration)

    @overload
    def save(self, state_dict: Any, iteration: int, is_async: Literal[False] = False) -> None: ...
    @overload
    def save(self, state_dict: Any, iteration: int, is_async: bool) -> AsyncRequest | None: ...
    def save(self, state_dict: Any, iteration: int, is_async: bool = False) -> AsyncRequest | None:
        """Copy the state into memory of this node's directory, then hash, replicate and commit it.

        `is_async`: returns once it is copied, with a request whose `finalize_fns` are to be called on all ranks when
        its `async_fn`, which waits, has returned (`execute_sync`, or a queue of NVRx's or Megatron's does both). The
        state's tensors are in host memory afterwards, as with NVRx; unlike there it is not hollow.
        """
        world = self._world()
        if iteration < 0 or iteration <= self.latest_iteration:
            raise LocalCheckpointError(
                f"iteration {iteration} cannot be saved: "
                + (f"iteration {self.latest_iteration} is there." if iteration >= 0 else "it is negative."),
                advice="Iterations grow from save to save.",
            )
        self.latest_iteration = -1
        self._forget()
        job = self._snapshot(world, state_dict, iteration)
        unfinished = "" if job.arena is None else str(job.arena.mapped.path)
        world.background.save(job)

        def finalize_fn() -> None:
            self._finalize(world, job, inline=not is_async)

        if not is_async:
            job.done.wait(self._bound_s)
            finalize_fn()
            return None
        arguments = (unfinished, os.getpid(), self._bound_s)
        return AsyncRequest(wait_until_written, arguments, [finalize_fn], {})

    def close(self) -> None:
        """Local. What is under way is waited for a little; checkpoints stay. A closed manager can be used again."""
        self._forget()
        world, self._world_now = self._world_now, None
        if world is not None:
            world.close()

    @property
    def _bound_s(self) -> float:
        return STALL_BOUNDS * self._timeout_s

    def _world(self) -> _World:
        """Made at the first collective call, and anew where torch.distributed was initialised anew."""
        group = dist.distributed_c10d._get_default_group() if dist.is_available() and dist.is_initialized() else None
        if self._world_now is not None and self._world_now.group is not group:
            self.close()
            self.latest_iteration = -1
        if self._world_now is None:
            self._world_now = self._join(group)
        return self._world_now

    def _join(self, group: Any) -> _World:
        communicator = make_communicator(self._timeout_s)
        rank = communicator.rank
        calls, saves = communicator.agreements("local/calls"), communicator.agreements("local/saves")
        session = Session(self._root, self.session_id, self._fs)
        directory = session.rank(rank)
        node, problem = "", ""
        members: tuple[int, ...] = (rank,)
        try:
            members = members_of(self.repl_strategy, rank)
            node = session.node()
            directory.make()
        except (ResilienceError, OSError, ValueError) as error:
            problem = in_short(error)
        nodes = tuple(
            from_json(View, each, f"rank {other}'s node").node
            for other, each in enumerate(self._agreed(calls, to_json(View(node, (), problem)), problem))
        )
        at_home = [other for other in members if other != rank and nodes[other] == nodes[rank]]
        if at_home:
            _LOG.warning("ranks %s and %s keep each other's shards on one node: a lost node takes both", rank, at_home)
        background = Background(communicator, saves, directory, members, self._write)
        return _World(group, communicator, calls, saves, nodes, tuple(members), session, directory, background)

    def _agreed(self, calls: Agreements, payload: bytes, problem: str) -> list[bytes]:
        """Everybody's payload; LocalCheckpointError on all ranks if one has a problem."""
        told = [json.loads(each) for each in calls.gather(json.dumps([problem, payload.decode()]).encode())]
        problems = [f"rank {rank}: {each[0]}" for rank, each in enumerate(told) if each[0]]
        if problems:
            raise LocalCheckpointError("; ".join(problems[:4]))
        return [each[1].encode() for each in told]

    def _forget(self) -> None:
        elected, self._elected = self._elected, None
        if elected is not None:
            elected.close()

    def _elect(self, world: _World) -> None:
        self._forget()
        world.background.wait(self._bound_s)  # what is under way writes where we look
        elected = _Elected(Choice(-1), self._views(world))
        self._settle(world, elected)
        choice = elected.choice
        if world.rank == 0:
            for why in choice.passed_over:
                _LOG.warning("passed over: %s", why)
        self.globally_available_ids = {
            rank: tuple(
                (found.iteration, found.owner, self.session_id)
                for view in elected.views
                if view.node == node
                for found in view.found
            )
            for rank, node in enumerate(world.nodes)
        }
        self._elected = elected
        self.latest_iteration = choice.iteration
        if choice.iteration >= 0:
            self._know(choice.iteration)

    def _views(self, world: _World) -> tuple[View, ...]:
        view, problem = View(world.nodes[world.rank]), ""
        try:
            if world.rank == world.node_ranks[0]:
                view = View(view.node, tuple(world.session.found()))
        except OSError as error:
            problem = in_short(error)  # could not look: that is not "nothing there"
        told = self._agreed(world.calls, to_json(view), problem)
        return tuple(from_json(View, each, f"what rank {rank} found") for rank, each in enumerate(told))

    def _settle(self, world: _World, elected: _Elected) -> None:
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

    def _retrieve(self, world: _World, elected: _Elected) -> Arena:
        """This rank's shard, from here or from a peer. Collective; LocalCheckpointError on all ranks."""
        while True:
            choice = elected.choice
            self._number += 1
            fetched, problem = None, ""
            try:
                fetched = self._fetch(world, elected)
            except (ResilienceError, OSError) as error:
                problem = in_short(error)
            bad = fetched is not None and bool(fetched.problem)
            told = self._agreed(world.calls, json.dumps(bad).encode(), problem)
            if not any(json.loads(each) for each in told):
                break
            elected.struck |= {choice.reads[rank].copy for rank, each in enumerate(told) if json.loads(each)}
            if fetched is not None and fetched.arena is not None:
                world.directory.discard(fetched.arena)
            self._settle(world, elected)
            if elected.choice.iteration != choice.iteration:
                raise LocalCheckpointError(
                    f"iteration {choice.iteration} cannot be loaded: {'; '.join(elected.choice.passed_over[:4])}.",
                    advice="Call find_latest() for the one before it.",
                )
        own = choice.reads[world.rank].copy
        if fetched is not None and fetched.arena is not None:
            self._keep_fetched(world, choice, own, fetched.arena)
            elected.fetched = fetched.arena
        here = tuple(Read(rank, rank, read.copy) for rank, read in enumerate(choice.reads))
        kept = tuple(Copy(world.nodes[read.rank], read.copy.found) for read in choice.reads)
        elected.choice = Choice(choice.iteration, choice.save, here, choice.passed_over, (*choice.copies, *kept))
        return elected.fetched or elected.opened[own]

    def _fetch(self, world: _World, elected: _Elected) -> Fetched | None:
        choice = elected.choice
        fetches = [_as_fetch(world.nodes, read) for read in choice.reads if read.reader != read.rank]
        if not fetches:
            return None
        arrived = run_fetches(
            fetches,
            world.communicator,
            f"local/load/{self._number}",
            read=lambda fetch: elected.opened[choice.reads[fetch.owner].copy],
            land=lambda fetch: world.directory.begin(choice.iteration, fetch.owner, fetch.nbytes),
            reserve=lambda arena, stop, wanted: None,  # it has its room
            meanwhile=lambda: None,
        )
        return arrived[0] if arrived else None

    def _keep_fetched(self, world: _World, choice: Choice, own: Copy, arena: Arena) -> None:
        """What was fetched is this rank's copy from now on. A node that cannot keep it has loaded it all the same."""
        try:
            world.directory.prepare(choice.iteration, choice.save)
            world.directory.finish(arena, choice.iteration, world.rank)
            shard = Shard(own.found.nbytes, own.found.digest)
            world.directory.extend(choice.iteration, choice.save, len(world.nodes), {world.rank: shard})
        except OSError as error:
            _LOG.warning("iteration %d was fetched and is not kept here: %s", choice.iteration, error)

    def _unpacked(self, world: _World, iteration: int, arena: Arena) -> Any:
        state, problem = None, ""
        what = f"the local checkpoint of iteration {iteration}"
        try:
            header, state = unpack(arena.content, arena.mapped.view, self._trust, what)
            found, expected = (header.save.iteration, header.owner), (iteration, world.rank)
            if found != expected:
                raise CorruptCopyError(f"{what} is of iteration and rank {found}, not of {expected}.")
            state.restore_tensor_device(non_blocking=False)
        except (ResilienceError, OSError, RuntimeError, TypeError, AttributeError) as error:
            problem = in_short(error)
        self._agreed(world.calls, b"", problem)
        return state

    def _protect_again(self, world: _World, elected: _Elected) -> None:
        choice, rank = elected.choice, world.rank
        holders = {owner: choice.holders(owner) for owner in world.members}
        if all(world.nodes[member] in holders[owner] for member in world.members for owner in world.members):
            return
        found = choice.reads[rank].copy.found
        folder = str(rank) if elected.fetched is not None else found.folder
        open_own = partial(world.session.rank(folder).open, found)  # a mapping of its own: ours goes with the next save
        world.background.protect_again(choice.iteration, choice.save, self._number, open_own, found.digest)
        everywhere = tuple(
            Copy(world.nodes[member], choice.reads[owner].copy.found)
            for member in world.members
            for owner in world.members
        )
        elected.choice = Choice(
            choice.iteration, choice.save, choice.reads, choice.passed_over, choice.copies + everywhere
        )

    def _snapshot(self, world: _World, state: Any, iteration: int) -> SaveJob:
        """Copy the state. What goes wrong is the save's, so that the other ranks hear of it."""
        self._number += 1
        job = SaveJob(iteration, self._number, None)
        try:
            state.copy_tensors_to_cpu(non_blocking=False)
            packed = self._packer.pack(state)
            arena = world.directory.begin(iteration, world.rank, packed.layout.nbytes)
            job.begun[world.rank] = arena
            packed.fill(arena, iteration, world.rank, len(world.nodes))
            job.arena = arena
        except Exception as error:  # noqa: BLE001 - whatever a caller's state does, all ranks fail this save together
            job.error = f"{type(error).__name__}: {error}"
        return job

    def _finalize(self, world: _World, job: SaveJob, *, inline: bool) -> None:
        began = time.perf_counter()
        if not job.done.wait(self._bound_s):
            job.given_up = True
            job.error = job.error or f"its background work is not done after {self._bound_s:g} s"
        try:
            self._agreed(world.calls, b"", job.error)
        except (LocalCheckpointError, PeerLostError) as error:
            self._take_back(world, job)
            raise LocalCheckpointError(f"iteration {job.iteration} could not be saved: {error}") from error
        if job.unprotected:
            _LOG.warning("iteration %d has too few copies: %s", job.iteration, job.unprotected)
        self.latest_iteration = max(self.latest_iteration, job.iteration)
        self._know(job.iteration)
        self._prune(world, job.iteration, inline=inline)
        _LOG.debug("finalize_fn took %.5fs", time.perf_counter() - began)

    def _take_back(self, world: _World, job: SaveJob) -> None:
        """Remove what a save that failed has left in this rank's directory."""
        try:
            world.directory.remove([job.iteration])()
        except OSError as error:
            _LOG.warning("iteration %d, which failed, could not be removed: %s", job.iteration, error)

    def _know(self, iteration: int) -> None:
        self._complete = sorted({*self._complete, iteration})[-self._keep :]

    def _prune(self, world: _World, iteration: int, *, inline: bool) -> None:
        """Older iterations go, but for those that are kept. Their names at once, their memory in the background."""
        oldest = min(self._complete)
        try:
            doomed = [each for each in world.directory.iterations() if each < iteration and each not in self._complete]
            free = world.directory.remove(doomed)
        except OSError as error:
            _LOG.warning("older checkpoints could not be removed: %s", error)
            return
        tidies = world.rank == world.node_ranks[0]

        def rest() -> None:
            free()
            if tidies:
                world.session.tidy(world.node_ranks, oldest)

        if inline:
            rest()
        else:
            world.background.later("removal of older checkpoints", rest)

    def _write(self, arena: Arena, iteration: int, owner: int) -> None:
        self._save(arena, (iteration, owner, self.session_id))

    # What follows has the names under which tests of NVRx's users call it.

    def _save(self, shard: Arena, ckpt_id: CkptID) -> None:
        """Give a shard that is whole its name in this rank's directory. StoreError."""
        world = self._world_now
        if world is None:
            raise LocalCheckpointError("this manager is closed.")
        world.directory.finish(shard, ckpt_id[0], ckpt_id[1])

    def _ckpt_id(self, iteration: int) -> CkptID:
        if iteration < 0:
            raise LocalCheckpointError(f"iteration {iteration} is negative.")
        return iteration, self.rank, self.session_id

    def _my_ckpt_ids(self) -> list[CkptID]:
        """Of the shards in this rank's directory that are committed."""
        directory = Session(self._root, self.session_id, self._fs).rank(self.rank)
        return [(found.iteration, found.owner, self.session_id) for found in directory.found()]

    def _local_ckpt_path_from_id(self, ckpt_id: CkptID, is_dirty: bool = False) -> Path:
        """Where a shard is, or (`is_dirty`) what the name of an unfinished one begins with and ends in."""
        return self.local_ckpt_dir / file_name(ckpt_id[0], ckpt_id[1], ".dirty" if is_dirty else "")

    @staticmethod
    def _filename_from_template(iteration: int | str, rank: int | str, suffix: str = "") -> str:
        return file_name(iteration, rank, suffix)

    def _filename_to_id(self, filename: str) -> CkptID:
        parsed = parse_name(Path(filename).name)
        if parsed is None:
            raise LocalCheckpointError(f"{filename} is no name of a local checkpoint's file.")
        return parsed[0], parsed[1], self.session_id


def _prove(world: _World, elected: _Elected, read: Read) -> bool:
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


def _close_at_exit(manager: Callable[[], LocalCheckpointManager | None], pid: int) -> None:
    """Spare memory must not outlive the process. Not in a process that was forked from it."""
    alive = manager()
    if alive is not None and os.getpid() == pid:
        alive.close()
