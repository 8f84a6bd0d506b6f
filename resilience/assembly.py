"""What a start is made of: communicator, job, directories and their locks, groups, restorer.

Everything that the controller works with is put together here, so that the controller itself only knows the order of
events.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from resilience.config import CheckpointConfig, ResiliencyConfig
from resilience.errors import AnotherJobError, ConfigError, ResilienceError, error_like
from resilience.formats.registry import foreign_problem
from resilience.job import Job, join_job, resolve_run_id, start_id
from resilience.planning.decision import ElectionPolicy
from resilience.planning.inventory import Tier
from resilience.planning.schemes import SCHEMES, Scheme
from resilience.planning.topology import Topology
from resilience.planning.typed_json import from_plain, parsed
from resilience.replication.assembling import ShardBringer
from resilience.replication.authenticated import agree_on_key
from resilience.replication.communicator import Agreements, Communicator
from resilience.replication.gathering import ShardGatherer
from resilience.restore import Restorer
from resilience.restore_assembly import AssemblyLoader
from resilience.restore_shared import SharedLoader
from resilience.restore_staging import Peers
from resilience.runtime.bounded_calls import BoundedCalls
from resilience.runtime.clock import Clock
from resilience.runtime.memory import available_bytes
from resilience.runtime.threads import SYSTEM_THREADS, Threads
from resilience.state.parallel_layout import ParallelLayout
from resilience.stores.authentication import Seal, key_of
from resilience.stores.filesystem import TEMPORARY_PREFIX, FileSystem, Lock
from resilience.stores.keeper import ShardKeeper
from resilience.stores.node_store import NodeStore
from resilience.stores.shared_store import SharedStore

__all__ = ["Start", "agree_all", "assemble", "memory_directory"]

_LOCK_WAIT_S = 20.0
_STEP = "how a rank's step of the start went"
_NONCE = ".nonce-"

#: Draws a name of so many random bytes, in hexadecimal.
Draw = Callable[[int], str]


@dataclass
class Start:
    """One start of the run on this rank. `stores`: this node's directories, the one that new saves go to first."""

    job: Job
    communicator: Communicator
    setup: Agreements
    run_id: str
    attempt: str
    stores: tuple[NodeStore, ...]
    locks: tuple[Lock, ...]
    keeper: ShardKeeper | None
    scheme: Scheme
    topology: Topology
    refusal: ConfigError | None  # why this topology would not do at a first start
    restorer: Restorer
    shared: SharedLoader
    threads: Threads

    def release(self, *, keep_locks: bool = False) -> None:
        """Give up locks and groups. Local. `keep_locks`: a thread of this start may still write."""
        for lock in () if keep_locks else self.locks:
            lock.release()
        self.setup.close()
        self.communicator.close()


def assemble(
    checkpoint: CheckpointConfig,
    resiliency: ResiliencyConfig,
    layout: ParallelLayout | None,
    communicator: Communicator,
    clock: Clock,
    fs: FileSystem,
    tell: Callable[..., None],
    env: Mapping[str, str] = os.environ,
    threads: Threads = SYSTEM_THREADS,
    draw: Draw = secrets.token_hex,
) -> Start:
    """Collective over all ranks. Whatever one rank finds wrong is raised on all of them, and nothing stays locked."""
    setup = communicator.agreements("setup")
    locks: list[Lock] = []
    try:
        return _assemble(
            checkpoint, resiliency, layout, communicator, setup, locks, clock, fs, tell, env, threads, draw
        )
    except BaseException:
        for lock in locks:
            lock.release()
        setup.close()
        communicator.close()
        raise


def _assemble(
    checkpoint: CheckpointConfig,
    resiliency: ResiliencyConfig,
    layout: ParallelLayout | None,
    communicator: Communicator,
    setup: Agreements,
    locks: list[Lock],
    clock: Clock,
    fs: FileSystem,
    tell: Callable[..., None],
    env: Mapping[str, str],
    threads: Threads,
    draw: Draw,
) -> Start:
    """`locks` takes those that were acquired."""
    place = (layout or ParallelLayout()).resolve(communicator.rank, communicator.world_size)
    seal, session = agree_on_key(setup, lambda: key_of(resiliency.secret_env, env), draw)
    communicator.authenticate(session)
    setup = session.agreements(setup, "setup")
    job = join_job(communicator, setup, place, resiliency, _common_settings(checkpoint, resiliency), env)
    calls = BoundedCalls(threads, resiliency.exchange_timeout_s)
    shared = SharedLoader(
        checkpoint, fs, job.rank, job.world_size, resiliency.verify_load == "digest", tell, calls,
        _loading_peers(communicator, setup, job, place),
    )  # fmt: skip
    run_id = _agree_run_id(setup, job, checkpoint, resiliency, fs, env, draw, calls)
    attempt = setup.broadcast(draw(16).encode() if job.rank == 0 else None).decode()
    stores = _node_stores(checkpoint, resiliency, run_id, job, fs, env, seal)
    agree_all(setup, lambda: _take_locks(stores, job, clock, locks))
    _refuse_shared_directories(stores, job, setup, draw)
    if job.leads_node:
        _sweep(stores, tell)
    setup.barrier()
    keeper = _keeper(stores, fs, job, clock, threads)
    scheme = SCHEMES[resiliency.redundancy]
    topology, refusal = _topology(checkpoint, scheme, job)
    gatherer = None if keeper is None else ShardGatherer(job, communicator, stores, keeper, topology, tell, threads)
    policy = ElectionPolicy(
        ckpt_step=checkpoint.ckpt_step,
        fork_id=resiliency.fork_id or start_id(env) or attempt[:16],
        on_no_usable_save=resiliency.on_no_usable_save,
        max_restarts_without_progress=resiliency.max_restarts_without_progress,
        exit_on_missing=checkpoint.exit_on_missing_checkpoint,
        pretrained=checkpoint.pretrained_checkpoint is not None,
        elastic=resiliency.elastic,
    )
    assembler = _assembler(checkpoint, job, communicator, setup, stores, keeper, shared.peers, fs, tell, threads)
    readers = tuple(store.reader for store in stores)
    restorer = Restorer(
        job, setup, run_id, attempt, readers, gatherer, shared, topology, policy, clock, tell, assembler
    )  # fmt: skip
    return Start(
        job,
        communicator,
        setup,
        run_id,
        attempt,
        stores,
        tuple(locks),
        keeper,
        scheme,
        topology,
        refusal,
        restorer,
        shared,
        threads,
    )


def _assembler(
    checkpoint: CheckpointConfig,
    job: Job,
    communicator: Communicator,
    setup: Agreements,
    stores: tuple[NodeStore, ...],
    keeper: ShardKeeper | None,
    peers: Peers,
    fs: FileSystem,
    tell: Callable[..., None],
    threads: Threads,
) -> AssemblyLoader | None:
    if keeper is None:
        return None
    bringer = ShardBringer(
        job, communicator, setup, [store.reader for store in stores], keeper,
        lambda: available_bytes(keeper.arena_dir, keeper.store.base, fs), tell, threads,
    )  # fmt: skip
    return AssemblyLoader(job, setup, bringer, checkpoint, peers, keeper.store, fs, tell)


def _loading_peers(communicator: Communicator, setup: Agreements, job: Job, place: ParallelLayout) -> Peers:
    members, turns = job.data_parallel(), itertools.count()
    return Peers(
        setup, lambda: communicator.agreements(f"load/{members[0]}/{next(turns)}", members), place.dp_rank or 0,
        place.dp or 1,
    )  # fmt: skip


def agree_all(setup: Agreements, step: Callable[[], None]) -> None:
    """Run `step` on every rank; if it raised on one, all raise: their own error, or one of that kind that names it."""
    problem: Exception | None = None
    try:
        step()
    except (ResilienceError, OSError) as error:
        problem = error
    mine = json.dumps(None if problem is None else [type(problem).__name__, str(problem)[:2000]])
    heard = setup.gather(mine.encode())
    told = [from_plain(tuple[str, str] | None, parsed(each, _STEP), _STEP) for each in heard]
    if problem is not None:
        raise problem
    for rank, failed in enumerate(told):
        if failed is not None:
            raise error_like(failed[0], f"rank {rank} could not start: {failed[1]}")


def memory_directory(
    checkpoint: CheckpointConfig, resiliency: ResiliencyConfig, fs: FileSystem, env: Mapping[str, str]
) -> Path:
    """Where arenas and in-memory saves live on this node."""
    given = resiliency.memory_dir or env.get("RESILIENCE_MEMORY_DIR")
    if given:
        return Path(given)
    local = checkpoint.non_persistent_local_ckpt_dir
    if local and fs.is_memory_backed(Path(local)):
        return Path(local)
    return Path(f"/dev/shm/resilience-{os.geteuid()}")


def _common_settings(checkpoint: CheckpointConfig, resiliency: ResiliencyConfig) -> dict[str, Any]:
    """The fields that must be equal on all ranks; where a node keeps its files is its own affair."""
    own = {"non_persistent_local_ckpt_dir", "memory_dir", "node_id", "failure_domain", "events", "metrics"}
    return {
        field.name: getattr(config, field.name)
        for config in (checkpoint, resiliency)
        for field in fields(config)
        if field.name not in own
    }


def _agree_run_id(
    setup: Agreements,
    job: Job,
    checkpoint: CheckpointConfig,
    resiliency: ResiliencyConfig,
    fs: FileSystem,
    env: Mapping[str, str],
    draw_name: Draw,
    calls: BoundedCalls,
) -> str:
    """The leader finds the name, all hear it."""
    found: list[str] = [""]

    def find() -> None:
        if job.rank != 0:
            return
        kept = None
        if checkpoint.save is not None and resiliency.run_id is None:
            store = SharedStore(Path(checkpoint.save), fs, source="save", foreign_problem=foreign_problem)
            owner = calls.call(str(store.root), store.owner)
            kept = owner.run_id if owner is not None else None
        draw = checkpoint.save is not None or checkpoint.non_persistent_ckpt_type is None
        found[0] = resolve_run_id(resiliency, kept, draw=draw_name if draw else None, env=env)

    agree_all(setup, find)
    return setup.broadcast(found[0].encode() if job.rank == 0 else None).decode()


def _node_stores(
    checkpoint: CheckpointConfig,
    resiliency: ResiliencyConfig,
    run_id: str,
    job: Job,
    fs: FileSystem,
    env: Mapping[str, str],
    seal: Seal,
) -> tuple[NodeStore, ...]:
    """This node's directories of the run: both tiers are read whatever the type is now; new saves go to the first."""
    kind = checkpoint.non_persistent_ckpt_type
    if kind is None and checkpoint.save is None:
        return ()
    memory = memory_directory(checkpoint, resiliency, fs, env)
    places: list[tuple[Path, Tier]] = [(memory, "in_memory")]
    if checkpoint.non_persistent_local_ckpt_dir is not None:
        places.insert(0 if kind == "local" else 1, (Path(checkpoint.non_persistent_local_ckpt_dir), "local"))
    stores: dict[Path, NodeStore] = {}
    for place, tier in places:
        base = Path(os.path.abspath(place))
        stores.setdefault(base, NodeStore(base, run_id, job.node_id, tier, fs, seal))
    return tuple(stores.values())


def _take_locks(stores: Sequence[NodeStore], job: Job, clock: Clock, locks: list[Lock]) -> None:
    """This rank's byte of each directory's lock, into `locks`; waits a little for a predecessor that is still dying."""
    for store in stores:
        store.prepare()
        lock = store.fs.lock(store.root, job.node_ranks.index(job.rank))
        deadline = clock.now() + _LOCK_WAIT_S
        while True:
            try:
                lock.acquire()
                break
            except AnotherJobError:
                if clock.now() >= deadline:
                    raise
                clock.sleep(0.1)
        locks.append(lock)


def _sweep(stores: Sequence[NodeStore], tell: Callable[..., None]) -> None:
    """Remove what an earlier start left unfinished. A directory that cannot be read is the inventory's to judge."""
    for store in stores:
        try:
            store.remover.sweep()
        except OSError as error:
            tell("warning", what=f"{store.root} could not be swept: {error}", advice="")


def _refuse_shared_directories(stores: Sequence[NodeStore], job: Job, setup: Agreements, draw: Draw) -> None:
    """Two nodes that see one directory would take each other's copies for their own, and lose both at once."""
    mine = _NONCE + draw(8)
    told = setup.gather(mine.encode() if job.leads_node else b"")
    others = {payload.decode() for rank, payload in enumerate(told) if payload and job.nodes[rank] != job.node_id}

    def leave_marks() -> None:
        for store in stores:
            if job.leads_node:
                store.fs.write_atomic(store.base / store.run_id / mine, b"", durable=False)

    def look_for_others() -> None:
        for store in stores:
            if others & set(store.fs.list_dir(store.base / store.run_id)):
                raise ConfigError(
                    f"{store.base} is seen by more than one node: it is shared storage, not local.",
                    advice="Give each node a directory of its own (node-local disk or /dev/shm).",
                )

    try:
        agree_all(setup, leave_marks)
        agree_all(setup, look_for_others)
    finally:
        if job.leads_node:
            _remove_marks(stores, others)


def _remove_marks(stores: Sequence[NodeStore], others: set[str]) -> None:
    """This node's, and what starts that were killed left. One that stays does no harm: the next start removes it."""
    for store in stores:
        with contextlib.suppress(OSError):
            for name in store.fs.list_dir(store.base / store.run_id):
                unfinished = name.startswith(TEMPORARY_PREFIX) and _NONCE in name  # all that are alive have theirs
                if unfinished or (name.startswith(_NONCE) and name not in others):
                    store.fs.unlink(store.base / store.run_id / name)


def _keeper(
    stores: Sequence[NodeStore], fs: FileSystem, job: Job, clock: Clock, threads: Threads
) -> ShardKeeper | None:
    if not stores:
        return None
    own = stores[0]
    memory = next((store for store in stores if store.memory_backed), own)
    return ShardKeeper(own, memory.arenas, fs, job.rank, job.world_size, clock.wall, threads)


def _topology(checkpoint: CheckpointConfig, scheme: Scheme, job: Job) -> tuple[Topology, ConfigError | None]:
    jump, factor = checkpoint.replication_jump, checkpoint.replication_factor
    if not checkpoint.replication:
        scheme, factor = SCHEMES["replica"], 1

    def make(*, restart: bool) -> Topology:
        return scheme.place(job.nodes, jump=jump, factor=factor, domains=job.domains, restart=restart)

    try:
        return make(restart=False), None
    except ConfigError as error:
        return make(restart=True), error  # raised later if this turns out to be a first start
