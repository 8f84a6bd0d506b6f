"""How a pickle that somebody else wrote is read without running anything in it.

Every class and function that a stream names becomes a stand-in of ours that only notes what it was called with and what
state was set on it. Names that are not on the caller's list are refused, so that a malicious stream ends here; the
caller then validates the notes and builds its own values from them. Nothing of torch is imported or called.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection
from typing import Any, Self

from resilience.errors import CorruptCopyError

__all__ = ["Inert", "load_inert"]

_BROKEN_STREAM = (
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)


class Inert:
    """Stands for an object in a pickle: the name of its class, the arguments it was made with, the state set on it."""

    __slots__ = ("arguments", "state")
    arguments: tuple[Any, ...]
    state: Any
    pickled_name = ""

    def __new__(cls, *arguments: Any) -> Self:
        stand_in = super().__new__(cls)
        stand_in.arguments = arguments
        stand_in.state = None
        return stand_in

    def __setstate__(self, state: Any) -> None:
        self.state = state


class PersistentId(Inert):
    """Stands for bytes kept outside the stream; its only argument is the id, unlooked at."""

    __slots__ = ()


class _Unpickler(pickle.Unpickler):
    def __init__(self, content: bytes, allowed: Collection[str]) -> None:
        super().__init__(io.BytesIO(content))
        self._allowed = allowed
        self._stand_ins: dict[str, type[Inert]] = {}

    def find_class(self, module: str, name: str) -> type[Inert]:
        full = f"{module}.{name}"
        if full not in self._allowed:
            raise pickle.UnpicklingError(f"it names {full}, which does not belong into such a file")
        if full not in self._stand_ins:
            # New ones for every stream: a stream can set nothing on them that outlives it.
            self._stand_ins[full] = type(name, (Inert,), {"__slots__": (), "pickled_name": full})
        return self._stand_ins[full]

    def persistent_load(self, pid: Any) -> Inert:
        return PersistentId(pid)


def load_inert(content: bytes, allowed: Collection[str], what: str) -> Any:
    """The object in `content`: plain containers and scalars, and `Inert` for everything else.

    `allowed` holds full names ("torch.Size"). CorruptCopyError that names `what` if the stream is broken or names
    anything else.
    """
    try:
        return _Unpickler(content, allowed).load()
    except _BROKEN_STREAM as error:
        raise CorruptCopyError(
            f"{what} is refused: {error or type(error).__name__}.", advice="It is damaged, or not what it claims to be."
        ) from error
