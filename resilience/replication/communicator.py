"""What the rest of the package may ask of the other ranks: agreements over small values, and groups for bulk bytes.

Everything that crosses a process is JSON or raw bytes; nothing is pickled. Every wait is bounded by time without
progress and ends in a `PeerLostError`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch

from resilience.errors import PeerLostError, ResilienceError

if TYPE_CHECKING:
    from resilience.replication.authenticated import Session

#: Of messages that the receiver proves by a digest which came in another message. All others carry a MAC of their own
#: where the ranks have a key.
PROVED_TAG: Final = 2

__all__ = [
    "PROVED_TAG",
    "Agreements",
    "Communicator",
    "Control",
    "GatheredAgreements",
    "Links",
    "PeerFailedError",
    "SoloAgreements",
    "SoloCommunicator",
    "SoloControl",
    "Transfer",
]


class PeerFailedError(ResilienceError):
    """Another rank failed in the same step; what it was, it raises itself."""


class Agreements(Protocol):
    """Small collectives over one group of ranks. Every member calls the same ones in the same order."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    def gather(self, payload: bytes) -> list[bytes]:
        """Every member's payload, in rank order, on every member (a few KiB each)."""
        ...

    def collect(self, payload: bytes) -> list[bytes]:
        """Every member's payload, in rank order, on member 0; nothing on the others, which may go on before."""
        ...

    def broadcast(self, payload: bytes | None) -> bytes:
        """The payload of member 0 on every member; the others pass None."""
        ...

    def maximum(self, values: Sequence[int]) -> list[int]:
        """Element-wise maximum over members (int64)."""
        ...

    def barrier(self) -> None: ...
    def close(self) -> None: ...


class Control(Protocol):
    """The one small reduction per boundary: element-wise maximum, started at one boundary and collected at the next."""

    def start(self, say: Callable[[], Sequence[int]], hear: Callable[[list[int]], Any] = list) -> None:
        """Does not wait. Every rank starts the same number of exchanges.

        `say` gives this rank's values, and `hear` makes of the maximum what `result` returns; in any thread. What they
        raise, `result` raises.
        """
        ...

    def result(self) -> Any:
        """Of the exchange started last; waits for it, for as long as the peers' heartbeats go on."""
        ...

    def close(self) -> None: ...


class Transfer(Protocol):
    """A message under way."""


class Links(Protocol):
    """Bulk bytes between the members of a small group. A failed group stays failed: rebuild it under a new name."""

    def send(self, content: torch.Tensor, peer: int, tag: int) -> Transfer:
        """Post `content` (contiguous, unchanged until waited for) to the global rank `peer`; does not wait."""
        ...

    def receive(self, content: torch.Tensor, peer: int, tag: int) -> Transfer:
        """Post a receive into `content`; messages of one peer and tag arrive in the order they were posted."""
        ...

    def wait(self, transfer: Transfer) -> None:
        """Until it is done. PeerLostError (with the `rank` that is given up, where it is known) if a member died, fell

        silent for the bound, or lives but moves nothing for `STALL_BOUNDS` times the bound.
        """
        ...

    def close(self, *, failed: bool = False, linger_s: float = 10.0) -> None: ...


class Communicator(Protocol):
    """One per process: says who we are and opens groups, named by purpose, for the ranks that ask for them."""

    @property
    def rank(self) -> int: ...
    @property
    def world_size(self) -> int: ...
    @property
    def local_rank(self) -> int: ...
    def authenticate(self, session: Session) -> None:
        """All groups and links that are opened from now on are those of `session`. Local."""
        ...

    def agreements(self, name: str, ranks: Sequence[int] | None = None) -> Agreements:
        """A group over `ranks` (default: all); collective over exactly those, `name` unique among groups."""
        ...

    def control(self, name: str, nodes: Sequence[str]) -> Control:
        """Collective over all ranks. `nodes`: of each rank; where there are many ranks, each talks to its node's."""
        ...

    def links(self, name: str, ranks: Sequence[int], wanted: Callable[[], bool] = lambda: True) -> Links:
        """Collective over exactly `ranks`; waits for those that live. PeerLostError as of `Links.wait`, and as soon as

        the links are no longer `wanted`.
        """
        ...

    def close(self) -> None: ...


class GatheredAgreements:
    """For ranks of one process: all that ranks agree on, by nothing but the gathering of what each has to say."""

    rank: int

    def gather(self, payload: bytes) -> list[bytes]:
        raise NotImplementedError

    def collect(self, payload: bytes) -> list[bytes]:
        told = self.gather(payload)
        return told if self.rank == 0 else []

    def broadcast(self, payload: bytes | None) -> bytes:
        return self.gather(payload or b"")[0]

    def maximum(self, values: Sequence[int]) -> list[int]:
        told = [json.loads(each) for each in self.gather(json.dumps(list(values)).encode())]
        return [max(column) for column in zip(*told, strict=True)]

    def barrier(self) -> None:
        self.gather(b"")


class SoloAgreements:
    """A group of one."""

    rank = 0
    size = 1

    def gather(self, payload: bytes) -> list[bytes]:
        return [payload]

    def collect(self, payload: bytes) -> list[bytes]:
        return [payload]

    def broadcast(self, payload: bytes | None) -> bytes:
        if payload is None:
            raise ValueError("the only member must give the payload")
        return payload

    def maximum(self, values: Sequence[int]) -> list[int]:
        return list(values)

    def barrier(self) -> None:
        return

    def close(self) -> None:
        return


class SoloCommunicator:
    """A process without torch.distributed: a world of one."""

    rank = 0
    world_size = 1
    local_rank = 0

    def authenticate(self, session: Session) -> None:
        return  # it has no peers

    def agreements(self, name: str, ranks: Sequence[int] | None = None) -> Agreements:
        return SoloAgreements()

    def control(self, name: str, nodes: Sequence[str]) -> Control:
        return SoloControl()

    def links(self, name: str, ranks: Sequence[int], wanted: Callable[[], bool] = lambda: True) -> Links:
        raise PeerLostError(f"a world of one has no peers to link to ({name}, {list(ranks)})")

    def close(self) -> None:
        return


class SoloControl:
    """The control exchange of one rank: what it says is what is agreed."""

    def __init__(self) -> None:
        self._latest: Callable[[], Any] = list

    def start(self, say: Callable[[], Sequence[int]], hear: Callable[[list[int]], Any] = list) -> None:
        self._latest = lambda: hear(list(say()))

    def result(self) -> Any:
        return self._latest()

    def close(self) -> None:
        return
