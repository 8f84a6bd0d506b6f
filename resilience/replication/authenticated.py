"""What ranks say to each other, each word with a MAC: groups and links that believe nothing which has none.

At a start all ranks draw a nonce, and the hash of all of them names the *session*. It goes into every MAC, with the
group's name, who speaks to whom, and the number of the message: what was recorded in another start, another group or
an earlier exchange is refused like what was altered. Nobody but the ranks knows the key, so it does not matter
over how many hands a word came.

Bulk bytes (`PROVED_TAG`) are not hashed a second time here: the receiver proves them by a digest, and that came in a
message with a MAC. A group's element-wise maximum becomes an exchange of all members' vectors, since nobody could say
of a maximum whose words are in it.
"""

from __future__ import annotations

import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, Protocol

import torch

from resilience.errors import ConfigError, ForgedMessageError, ResilienceError, error_like
from resilience.planning.typed_json import from_json
from resilience.planning.wire import to_json
from resilience.replication.communicator import PROVED_TAG, Agreements, Links, Transfer
from resilience.stores.authentication import MAC_BYTES, UNSEALED, Seal

__all__ = ["OPEN", "KeyedSession", "OpenSession", "Session", "agree_on_key"]

_MESSAGE: Final = "message"
_MAC_TAG: Final = 100  # added to a message's own
_NONCE_BYTES: Final = 16


class Session(Protocol):
    """How the ranks of one start talk."""

    def agreements(self, group: Agreements, name: str) -> Agreements:
        """`group`, authenticated; `name` is the same on all members and no other group's."""
        ...

    def links(self, links: Links, name: str, rank: int) -> Links: ...


class OpenSession:
    """Without a key: everything as it comes."""

    def agreements(self, group: Agreements, name: str) -> Agreements:
        return group

    def links(self, links: Links, name: str, rank: int) -> Links:
        return links


OPEN: Final = OpenSession()


class KeyedSession:
    """With a key. `name`: of the session, the same on all ranks and of no other start."""

    def __init__(self, seal: Seal, name: bytes) -> None:
        self._seal = seal
        self._name = name

    def agreements(self, group: Agreements, name: str) -> Agreements:
        return _AuthenticatedAgreements(group, self, name)

    def links(self, links: Links, name: str, rank: int) -> Links:
        return _AuthenticatedLinks(links, self, name, rank)

    def mac(self, place: str, content: bytes | memoryview) -> bytes:
        return bytes.fromhex(self._seal.mac(_MESSAGE, self._name, place.encode(), content))

    def prove(self, mac: bytes, place: str, content: bytes | memoryview, sender: str, rank: int | None) -> None:
        """ForgedMessageError unless the MAC is that of this message at this place."""
        problem = self._seal.problem(mac.hex(), _MESSAGE, self._name, place.encode(), content)
        if problem:
            raise ForgedMessageError(
                f"what came from {sender} ({place}) is not authentic: {problem}",
                advice="Somebody alters what goes over the network, or a node's memory is damaged.",
                rank=rank,
            )


@dataclass(frozen=True)
class _Hello:
    """A rank's first word. `problem`: class and text of the error that it found instead of a key."""

    keyed: bool
    nonce: str
    problem: tuple[str, str] | None = None


def agree_on_key(
    setup: Agreements, find: Callable[[], Seal], draw: Callable[[int], str]
) -> tuple[Seal, KeyedSession | OpenSession]:
    """This rank's seal and the session of this start. Collective over all ranks, over a group as it comes.

    `find` gives this rank's seal or raises ConfigError; `draw` draws so many random bytes in hexadecimal digits. Raises
    ConfigError on all ranks if one has no key and others have, or another one: a MAC of the session's name is compared,
    never a key.
    """
    seal: Seal = UNSEALED
    problem: ResilienceError | None = None
    try:
        seal = find()
    except ConfigError as error:
        problem = error
    told = None if problem is None else (type(problem).__name__, str(problem))
    mine = _Hello(seal.keyed, draw(_NONCE_BYTES), told)
    heard = [
        from_json(_Hello, each, f"rank {rank}'s first word") for rank, each in enumerate(setup.gather(to_json(mine)))
    ]
    if problem is not None:
        raise problem
    if seal.keyed and heard[setup.rank] != mine:  # its nonce is what makes this session a new one
        raise ForgedMessageError("this rank's own first word came back altered", rank=setup.rank)
    for rank, hello in enumerate(heard):
        if hello.problem is not None:
            raise error_like(hello.problem[0], f"rank {rank}: {hello.problem[1]}")
    odd = next((rank for rank, hello in enumerate(heard) if hello.keyed != heard[0].keyed), None)
    if odd is not None:
        without, having = (odd, 0) if heard[0].keyed else (0, odd)
        raise ConfigError(
            f"resiliency.secret_env: rank {having} has a key and rank {without} has none.",
            advice="Set secret_env, and the variable that it names, on all ranks or on none.",
        )
    if not seal.keyed:
        return seal, OPEN
    name = blake2b("".join(f"{len(hello.nonce)}:{hello.nonce}" for hello in heard).encode(), digest_size=32).digest()
    macs = setup.gather(seal.mac("session", name).encode())
    odd = next((rank for rank, mac in enumerate(macs) if mac != macs[0]), None)
    if odd is not None:
        raise ConfigError(
            f"resiliency.secret_env: rank {odd} holds another key than rank 0 (or what one of them said was altered).",
            advice="Set the variable to the same secret on all ranks.",
        )
    return seal, KeyedSession(seal, name)


class _AuthenticatedAgreements:
    """`Agreements` whose members prove each of their words."""

    def __init__(self, group: Agreements, session: KeyedSession, name: str) -> None:
        self._group = group
        self._session = session
        self._name = name
        self._count = 0  # of collectives so far, equal on all members
        self.rank = group.rank
        self.size = group.size

    def gather(self, payload: bytes) -> list[bytes]:
        self._count += 1
        mac = self._session.mac(self._place(self.rank), payload)
        return [self._proved(word, member) for member, word in enumerate(self._group.gather(mac + payload))]

    def collect(self, payload: bytes) -> list[bytes]:
        self._count += 1
        mac = self._session.mac(self._place(self.rank), payload)
        return [self._proved(word, member) for member, word in enumerate(self._group.collect(mac + payload))]

    def broadcast(self, payload: bytes | None) -> bytes:
        self._count += 1
        word = None if payload is None else self._session.mac(self._place(0), payload) + payload
        return self._proved(self._group.broadcast(word), 0)

    def maximum(self, values: Sequence[int]) -> list[int]:
        form = struct.Struct(f"<{len(values)}q")
        words = self.gather(form.pack(*values))
        if any(len(word) != form.size for word in words):
            raise ForgedMessageError(f"the members of {self._name} do not tell of equally many numbers")
        return [max(column) for column in zip(*(form.unpack(word) for word in words), strict=True)]

    def barrier(self) -> None:
        self.gather(b"")

    def close(self) -> None:
        self._group.close()

    def _place(self, member: int) -> str:
        return f"group {self._name}, member {member} of {self.size}, word {self._count}"

    def _proved(self, word: bytes, member: int) -> bytes:
        mac, payload = word[:MAC_BYTES], word[MAC_BYTES:]
        self._session.prove(mac, self._place(member), payload, f"member {member} of the group {self._name}", None)
        return payload


@dataclass(frozen=True)
class _Sealed:
    """A message and its MAC under way; `place` of one that is received, else ""."""

    message: Transfer
    mac: Transfer
    content: torch.Tensor
    code: torch.Tensor
    peer: int
    place: str = ""


class _AuthenticatedLinks:
    """`Links` whose messages are each followed by their MAC, under a tag of its own. Used by one thread at a time."""

    def __init__(self, links: Links, session: KeyedSession, name: str, rank: int) -> None:
        self._links = links
        self._session = session
        self._name = name
        self._rank = rank
        self._sent: Counter[tuple[int, int]] = Counter()
        self._received: Counter[tuple[int, int]] = Counter()

    def send(self, content: torch.Tensor, peer: int, tag: int) -> Transfer:
        if tag == PROVED_TAG:
            return self._links.send(content, peer, tag)
        message = self._links.send(content, peer, tag)  # on its way while its MAC is computed
        self._sent[peer, tag] += 1
        place = self._place(self._rank, peer, tag, self._sent[peer, tag])
        code = torch.frombuffer(bytearray(self._session.mac(place, _bytes(content))), dtype=torch.uint8)
        return _Sealed(message, self._links.send(code, peer, tag + _MAC_TAG), content, code, peer)

    def receive(self, content: torch.Tensor, peer: int, tag: int) -> Transfer:
        if tag == PROVED_TAG:
            return self._links.receive(content, peer, tag)
        message = self._links.receive(content, peer, tag)
        self._received[peer, tag] += 1
        place = self._place(peer, self._rank, tag, self._received[peer, tag])
        code = torch.zeros(MAC_BYTES, dtype=torch.uint8)
        return _Sealed(message, self._links.receive(code, peer, tag + _MAC_TAG), content, code, peer, place)

    def wait(self, transfer: Transfer) -> None:
        if not isinstance(transfer, _Sealed):
            self._links.wait(transfer)
            return
        self._links.wait(transfer.message)
        self._links.wait(transfer.mac)
        if transfer.place:
            code, sender = transfer.code.numpy().tobytes(), f"rank {transfer.peer}"
            self._session.prove(code, transfer.place, _bytes(transfer.content), sender, transfer.peer)

    def close(self, *, failed: bool = False, linger_s: float = 10.0) -> None:
        self._links.close(failed=failed, linger_s=linger_s)

    def _place(self, sender: int, receiver: int, tag: int, number: int) -> str:
        return f"link {self._name}, from {sender} to {receiver}, message {number} under {tag}"


def _bytes(content: torch.Tensor) -> memoryview:
    return content.reshape(-1).view(torch.uint8).numpy().data
