"""`LocalCheckpointManager`: the interface of NVIDIA's Resiliency Extension, over this package's own core.

Users (Megatron's training loops among them) call four things: `find_latest`, `load`, `save` and `local_ckpt_dir`. What
is underneath differs: a checkpoint counts once every rank has committed digests of its shards, a copy is compared with
its digest before it is loaded, what fails fails on all ranks, and a save leaves the training thread with a copy into
memory. docs/trainers.md has the list.
"""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, overload

from torch import distributed as dist

from resilience.errors import CorruptCopyError, PeerLostError, ResilienceError, in_short
from resilience.integrations.nvrx.background import SaveJob
from resilience.integrations.nvrx.choice import Choice
from resilience.integrations.nvrx.directory import Session, file_name, parse_name
from resilience.integrations.nvrx.names import AsyncRequest, LocalCheckpointError
from resilience.integrations.nvrx.packing import Packer, unpack
from resilience.integrations.nvrx.retrieval import Elected, look, protect_again, retrieve, settle
from resilience.integrations.nvrx.trust import Trust
from resilience.integrations.nvrx.waiting import wait_until_written
from resilience.integrations.nvrx.world import World, agreed, join
from resilience.planning.patience import STALL_BOUNDS
from resilience.runtime.threads import SYSTEM_THREADS
from resilience.snapshot.arena import Arena
from resilience.stores.filesystem import PosixFileSystem

__all__ = ["CkptID", "LocalCheckpointManager"]

_LOG = logging.getLogger(__name__)

#: Iteration, rank and session.
CkptID = tuple[int, int, str]


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
        self._world_now: World | None = None
        self._elected: Elected | None = None
        self._complete: list[int] = []  # iterations of which all ranks know, ascending
        SYSTEM_THREADS.at_exit(partial(_close_if_alive, weakref.ref(self)))

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
        arena = retrieve(world, elected)
        state = self._unpacked(world, elected.choice.iteration, arena)
        protect_again(world, elected)
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

    def _world(self) -> World:
        """Made at the first collective call, and anew where torch.distributed was initialised anew."""
        group = dist.distributed_c10d._get_default_group() if dist.is_available() and dist.is_initialized() else None
        if self._world_now is not None and self._world_now.group is not group:
            self.close()
            self.latest_iteration = -1
        if self._world_now is None:
            session = Session(self._root, self.session_id, self._fs)
            self._world_now = join(group, session, self.repl_strategy, self._write, self._timeout_s)
        return self._world_now

    def _forget(self) -> None:
        elected, self._elected = self._elected, None
        if elected is not None:
            elected.close()

    def _elect(self, world: World) -> None:
        self._forget()
        world.background.wait(self._bound_s)  # what is under way writes where we look
        elected = Elected(Choice(-1), look(world))
        settle(world, elected)
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

    def _unpacked(self, world: World, iteration: int, arena: Arena) -> Any:
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
        agreed(world.calls, b"", problem)
        return state

    def _snapshot(self, world: World, state: Any, iteration: int) -> SaveJob:
        """Copy the state. What goes wrong is the save's, so that the other ranks hear of it."""
        job = SaveJob(iteration, next(world.numbers), None)
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

    def _finalize(self, world: World, job: SaveJob, *, inline: bool) -> None:
        began = time.perf_counter()
        if not job.done.wait(self._bound_s):
            job.given_up = True
            job.error = job.error or f"its background work is not done after {self._bound_s:g} s"
        try:
            agreed(world.calls, b"", job.error)
        except (LocalCheckpointError, PeerLostError) as error:
            self._take_back(world, job)
            raise LocalCheckpointError(f"iteration {job.iteration} could not be saved: {error}") from error
        if job.unprotected:
            _LOG.warning("iteration %d has too few copies: %s", job.iteration, job.unprotected)
        self.latest_iteration = max(self.latest_iteration, job.iteration)
        self._know(job.iteration)
        self._prune(world, job.iteration, inline=inline)
        _LOG.debug("finalize_fn took %.5fs", time.perf_counter() - began)

    def _take_back(self, world: World, job: SaveJob) -> None:
        """Remove what a save that failed has left in this rank's directory."""
        try:
            world.directory.remove([job.iteration])()
        except OSError as error:
            _LOG.warning("iteration %d, which failed, could not be removed: %s", job.iteration, error)

    def _know(self, iteration: int) -> None:
        self._complete = sorted({*self._complete, iteration})[-self._keep :]

    def _prune(self, world: World, iteration: int, *, inline: bool) -> None:
        """Older iterations go, but for those that are kept. Their names at once, their memory in the background."""
        oldest = min(self._complete)
        try:
            doomed = [each for each in world.directory.iterations() if each < iteration and each not in self._complete]
            free = world.directory.remove(doomed)
        except OSError as error:
            _LOG.warning("older checkpoints could not be removed: %s", error)
            return
        tidies = world.rank == world.neighbours[0]

        def rest() -> None:
            free()
            if tidies:
                world.session.tidy(world.neighbours, oldest)

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


def _close_if_alive(manager: Callable[[], LocalCheckpointManager | None]) -> None:
    """Spare memory must not outlive the process."""
    alive = manager()
    if alive is not None:
        alive.close()
