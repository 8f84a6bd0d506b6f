"""What protecting one sealed shard costs by scheme: the exchange of a clique of four nodes over gloo, and the commit.

The schemes take turns over the same four processes. Replicas of factor 2 go around pairs, of factor 3 around a ring of
four; parity covers all four. `lanes` is the arithmetic of `rs` alone, on one stripe.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from benchmarks.rank import Place, timed
from resilience.planning.erasure import Code
from resilience.planning.inventory import SaveId
from resilience.planning.schemes import SCHEMES
from resilience.replication.clique import Offer
from resilience.replication.gloo import TorchCommunicator
from resilience.replication.lanes import add, double
from resilience.replication.pace import Pace
from resilience.replication.redundancy import REDUNDANCIES, Redundancy
from resilience.stores.digest import digest_of
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.keeper import ShardKeeper
from resilience.stores.node_store import NodeStore

__all__ = ["make"]

_BOUND_S: Final = 120.0
_PIECE_BYTES: Final = 4 << 20
_ATTEMPT: Final = "b" * 32
_SCHEMES: Final = {
    "replica_2": ("replica", 2), "replica_3": ("replica", 3), "xor_4": ("xor", 4), "rs_4": ("rs", 4),
}  # fmt: skip


class _RedundancyBench:
    def __init__(self, place: Place) -> None:
        fs = PosixFileSystem()
        store = NodeStore(place.node_directory, "redundancy", f"node{place.rank}", "local", fs)
        store.prepare()
        self._keeper = ShardKeeper(store, store.arenas, fs, place.rank, place.size, time.time)
        self._communicator = TorchCommunicator(_BOUND_S)
        nbytes = place.settings.shard_bytes // 4
        self._arena = self._keeper.take_arena(nbytes, 2, _BOUND_S)
        self._arena.mapped.view[:] = np.random.default_rng(place.rank).bytes(nbytes)
        self._digest = digest_of(self._arena.mapped.view)
        self._iteration = 0
        self._exchanges = {name: self._exchange(place, name) for name in _SCHEMES}
        self._lane_bytes = Code(place.size, 2).stripe_bytes(nbytes)

    def _exchange(self, place: Place, name: str) -> Redundancy:
        scheme, factor = _SCHEMES[name]
        nodes = [f"node{rank}" for rank in range(place.size)]
        topology = SCHEMES[scheme].place(nodes, jump=None, factor=factor, domains=None, restart=True)
        clique = topology.clique_of(place.rank)
        links = self._communicator.links(f"{name}/{clique[0]}", clique)
        pace = Pace(None, time.monotonic, time.sleep)
        return REDUNDANCIES[scheme](links, place.rank, topology, pace, self._keeper, None)

    def measures(self) -> dict[str, Callable[..., dict[str, Any]]]:
        found: dict[str, Callable[..., dict[str, Any]]] = {
            name: lambda name=name: {"seconds": self._protect(name)} for name in _SCHEMES
        }
        return found | {"lanes": lambda: {"seconds": self._add_up(), "nbytes": self._lane_bytes}}

    def _protect(self, name: str) -> float:
        """Seconds until this rank has committed what it keeps; its buffers are warm from the round before."""
        self._iteration += 1
        save = SaveId(self._iteration, 1, _ATTEMPT)
        offer = Offer(save, self._arena, lambda: self._digest)
        problems: list[str] = []
        seconds = timed(lambda: problems.extend(self._exchanges[name].protect(offer, lambda kept: True, split=False)))
        if problems:
            raise RuntimeError(f"{name}: {problems}")
        self._keeper.delete(save)
        return seconds

    def _add_up(self) -> float:
        """Seconds in which one hop's stripe is added to a P and to a doubled Q."""
        parity, second, stripe = (np.ones(self._lane_bytes, dtype=np.uint8) for _ in range(3))
        scratch = np.ones(_PIECE_BYTES, dtype=np.uint8)
        began = time.perf_counter()
        for start in range(0, self._lane_bytes, _PIECE_BYTES):
            piece = slice(start, start + _PIECE_BYTES)
            double(second[piece], scratch)
            add(parity[piece], stripe[piece])
            add(second[piece], stripe[piece])
        return time.perf_counter() - began

    def close(self) -> None:
        for exchange in self._exchanges.values():
            exchange.close()
        self._keeper.close()
        self._communicator.close()


def make(place: Place) -> _RedundancyBench:
    return _RedundancyBench(place)
