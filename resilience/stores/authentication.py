"""Who wrote these bytes: the one primitive with which a job's ranks prove themselves to each other, and its absence.

With a key (`secret_env`) everything that a rank takes from a peer, or finds on a node, carries a MAC: keyed BLAKE2b
over what it is for and what it says. Bulk bytes are proved by a collision-resistant digest that stands in something
with a MAC. Without a key everything is believed that its checksum proves. Which of the two, `key_of` decides once.

docs/security.md says what that protects, and what it does not.
"""

from __future__ import annotations

import hmac
from collections.abc import Mapping
from hashlib import blake2b
from typing import Final, Protocol

from resilience.errors import ConfigError
from resilience.stores.digest import ALGORITHM, STRONG, algorithm_of

__all__ = ["MAC_BYTES", "UNSEALED", "Key", "Seal", "Unsealed", "key_of"]

MAC_BYTES: Final = 32
_FEWEST_BYTES: Final = 16  # of a secret: 128 bits, if they are random


class Seal(Protocol):
    """What small files and messages are sealed with. A `purpose` keeps one thing's MAC from being another's."""

    @property
    def keyed(self) -> bool:
        """Whether anything is proved at all."""
        ...

    @property
    def digest_algorithm(self) -> str:
        """Of the shards that this process takes."""
        ...

    def mac(self, purpose: str, *parts: bytes | memoryview) -> str:
        """In hexadecimal digits; "" without a key. The parts' lengths count."""
        ...

    def problem(self, mac: object, purpose: str, *parts: bytes | memoryview) -> str:
        """Why something with this MAC (None: it has none) is not believed; "" if it is."""
        ...

    def weakness(self, digest: str) -> str:
        """Why bytes are not proved by such a digest; "" if they are."""
        ...


class Unsealed:
    """No key: nothing carries a MAC, and one that is there is not looked at."""

    keyed = False
    digest_algorithm = ALGORITHM

    def mac(self, purpose: str, *parts: bytes | memoryview) -> str:
        return ""

    def problem(self, mac: object, purpose: str, *parts: bytes | memoryview) -> str:
        return ""

    def weakness(self, digest: str) -> str:
        return ""


UNSEALED: Final = Unsealed()


class Key:
    """Derived from a secret of any length. It is not shown, not compared with anything, and not pickled."""

    __slots__ = ("_key",)
    keyed = True
    digest_algorithm = STRONG

    def __init__(self, secret: bytes) -> None:
        self._key = blake2b(secret, digest_size=32, person=b"resilience-key").digest()

    def mac(self, purpose: str, *parts: bytes | memoryview) -> str:
        assert len(purpose) <= blake2b.PERSON_SIZE, purpose
        made = blake2b(key=self._key, digest_size=MAC_BYTES, person=purpose.encode("ascii"))
        for part in parts:
            made.update(len(part).to_bytes(8, "little"))
            made.update(part)
        return made.hexdigest()

    def problem(self, mac: object, purpose: str, *parts: bytes | memoryview) -> str:
        if mac is None or mac == "":
            return "it has no MAC"
        known = isinstance(mac, str) and mac.isascii() and hmac.compare_digest(mac, self.mac(purpose, *parts))
        return "" if known else "its MAC is not one of this job's key"

    def weakness(self, digest: str) -> str:
        found = algorithm_of(digest)
        return (
            "" if found == STRONG else f"its digest is {found}, for which other bytes can be found; expected {STRONG}"
        )

    def __repr__(self) -> str:
        return "Key(…)"

    def __reduce__(self) -> str | tuple[object, ...]:
        raise TypeError("a key does not leave its process")


def key_of(variable: str | None, env: Mapping[str, str], field: str = "resiliency.secret_env") -> Seal:
    """The seal for the secret in the environment's `variable`; without one the null seal.

    ConfigError, which names the variable and never its value, where it is not set, empty or short.
    """
    if variable is None:
        return UNSEALED
    secret = env.get(variable)
    if not secret:
        raise ConfigError(
            f"{field}: the environment variable {variable} is {'empty' if secret == '' else 'not set'} on this rank.",
            advice="Set it to the same secret on all ranks, for example the output of `openssl rand -hex 32`.",
        )
    content = secret.encode("utf-8", "surrogateescape")
    if len(content) < _FEWEST_BYTES:
        raise ConfigError(
            f"{field}: the secret in {variable} has {len(content)} bytes; at least {_FEWEST_BYTES} are needed.",
            advice="Draw one: `openssl rand -hex 32`.",
        )
    return Key(content)
