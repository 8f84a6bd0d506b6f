"""What each fault does to the machines: one function per kind, in one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from resilience.drill.simulator.evidence import save_folders
from resilience.drill.simulator.history import Fault, FaultKind
from resilience.drill.simulator.storage import Directory, Inode, Mount

if TYPE_CHECKING:
    from resilience.drill.simulator.cluster import Cluster, Rank, Start

__all__ = ["strike"]


def strike(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    """Let the fault happen now. Called in a thread of the rank, at one of its points."""
    _STRIKES[fault.kind](cluster, start, rank, fault)


def _kill(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    cluster.kill(start, rank)


def _crash(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    cluster.power_off(rank.node)


def _lose(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    cluster.power_off(rank.node)
    cluster.wipe(rank.node)
    if fault.seconds > 10 and rank.node in cluster.placed:  # a spare takes its place; else it comes back empty
        cluster.placed[cluster.placed.index(rank.node)] = cluster.add_node()


def _blackout(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    for node in list(cluster.nodes.values()):
        cluster.power_off(node)
    cluster.shared.fail_power(cluster.chance)


def _partition(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    cluster.network.cut = {rank.node.name}
    _later(cluster, fault, cluster.network.mend)


def _delay(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    slow, name = cluster.network.slow, rank.node.name
    slow[name] = min(fault.seconds, 5.0)

    def heal() -> None:
        slow.pop(name, None)

    _later(cluster, fault, heal)


def _disconnect(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    start.world.disconnect(rank.rank, cluster.chance)


def _slow_disk(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    for place in ("mem", "disk"):
        _slow(cluster, rank.node.mounts[place], fault)


def _full_disk(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    for place in ("mem", "disk"):
        _fill(cluster, rank.node.mounts[place], fault)


def _io_error(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    for place in ("mem", "disk"):
        rank.node.mounts[place].failing = int(fault.seconds) + 1


def _torn_write(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    for place in ("mem", "disk"):
        rank.node.mounts[place].tearing = int(fault.seconds) + 1


def _lying_fsync(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    rank.node.mounts["disk"].lies = True
    cluster.truth.lost(rank.node.name)


def _slow_shared(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    _slow(cluster, cluster.shared, fault)


def _full_shared(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    _fill(cluster, cluster.shared, fault)


def _shared_io_error(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    cluster.shared.failing = int(fault.seconds) + 1


def _flip(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    _flip_one(cluster, rank, ".safetensors")


def _flip_record(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    _flip_one(cluster, rank, ".json")


def _flip_one(cluster: Cluster, rank: Rank, ending: str) -> None:
    mount = rank.node.mounts[cluster.truth_place]
    found = [
        (key, entry)
        for key, folder in save_folders(mount)
        for name, entry in folder.names.items()
        if name.startswith("rank_") and name.endswith(ending) and name.removesuffix(ending) + ".json" in folder.names
    ]
    if found:
        newest = [(key, entry) for key, entry in found if key == max(found, key=lambda each: each[0])[0]]
        key, entry = cluster.chance.choice(newest if cluster.chance.random() < 0.7 else found)
        if isinstance(entry, Inode) and entry.content:
            _flip_bit(cluster, entry)
            cluster.truth.evidence.spoiled.add(entry.number)
            cluster.truth.lost(rank.node.name, key)


def _flip_shared(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    save = cluster.shared.find(("save",))
    folders = sorted(name for name in save.names if name.startswith("iter_")) if isinstance(save, Directory) else []
    folder = save.names[folders[-1]] if folders and isinstance(save, Directory) else None
    files = [each for _, each in sorted(folder.names.items())] if isinstance(folder, Directory) else []
    cluster.truth.shared_spoiled = True
    whole = [each for each in files if isinstance(each, Inode) and each.content]
    if whole:
        largest = max(whole, key=lambda each: len(each.content))
        _flip_bit(cluster, largest if cluster.chance.random() < 0.7 else cluster.chance.choice(whole))


def _flip_bit(cluster: Cluster, inode: Inode) -> None:
    place, bit = cluster.chance.randrange(len(inode.content)), cluster.chance.randrange(8)
    inode.content[place] ^= 1 << bit
    inode.durable = None if inode.durable is None else bytes(inode.content)


def _wire(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    cluster.network.flips = int(fault.seconds) + 1


def _clock(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    rank.node.clock_jump_s += cluster.chance.choice((-1e6, -3600.0, 3600.0, 1e6))


def _unhealthy(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    rank.unhealthy_until = cluster.scheduler.now + fault.seconds


def _stop(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    if rank.controller is not None:
        rank.controller.request("stop")


def _twin(cluster: Cluster, start: Start, rank: Rank, fault: Fault) -> None:
    cluster.take_for_dead(start)


def _slow(cluster: Cluster, mount: Mount, fault: Fault) -> None:
    mount.slow_s = min(fault.seconds, 3.0) / 10

    def heal() -> None:
        mount.slow_s = 0.0

    _later(cluster, fault, heal)


def _fill(cluster: Cluster, mount: Mount, fault: Fault) -> None:
    mount.full = True

    def heal() -> None:
        mount.full = False

    _later(cluster, fault, heal)


def _later(cluster: Cluster, fault: Fault, heal: Callable[[], None]) -> None:
    cluster.scheduler.at(cluster.scheduler.now + fault.seconds, heal)


_STRIKES: Final[dict[FaultKind, Callable[[Cluster, Start, Rank, Fault], None]]] = {
    "kill": _kill, "crash": _crash, "lose": _lose, "blackout": _blackout, "partition": _partition, "delay": _delay,
    "disconnect": _disconnect, "slow_disk": _slow_disk, "full_disk": _full_disk, "io_error": _io_error,
    "torn_write": _torn_write, "lying_fsync": _lying_fsync, "slow_shared": _slow_shared, "full_shared": _full_shared,
    "shared_io_error": _shared_io_error, "flip": _flip, "flip_record": _flip_record, "flip_shared": _flip_shared,
    "wire": _wire, "clock": _clock, "unhealthy": _unhealthy, "stop": _stop, "twin": _twin,
}  # fmt: skip
