"""How a pickle that somebody else wrote is read without running anything in it.

Every class and function that a stream names becomes a stand-in of ours that only notes what it was called with and what
state was set on it. Names that are not on the caller's list are refused, so that a malicious stream ends here; the
caller then validates the notes and builds its own values from them. Nothing of torch is imported or called.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Collection, Iterable
from typing import Any, ClassVar, Self

from resilience.errors import CorruptCopyError
from resilience.stores.pickle_bounds import bounds_of

__all__ = ["Inert", "load_inert", "shown"]

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


_MOST_IN_A_KEY = 10_000


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


class _Names:
    """What both unpicklers make of names."""

    def __init__(self, content: bytes, allowed: Collection[str]) -> None:
        super().__init__(io.BytesIO(content))  # type: ignore[call-arg]  # the unpickler's
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


class _Unpickler(_Names, pickle.Unpickler):
    """Python's own, in C."""


_PurePython: Any = pickle._Unpickler  # the type stubs take it for the other one


class _CarefulUnpickler(_Names, _PurePython):  # type: ignore[misc]
    """Looks at what is about to be hashed: a tuple may have been put into itself so often that it would never end."""

    dispatch: ClassVar[dict[int, Any]] = dict(_PurePython.dispatch)

    def _look(self, hashed: Iterable[Any]) -> None:
        known: dict[int, int] = {}
        if any(_unfolded(each, known) > _MOST_IN_A_KEY for each in hashed):
            raise pickle.UnpicklingError("it has a key that unfolds to more values than any key has")

    def _set_item(self) -> None:
        self._look(self.stack[-2:-1])
        super().load_setitem()

    def _set_items(self) -> None:
        self._look(self.stack[::2])
        super().load_setitems()

    def _dict(self) -> None:
        self._look(self.stack[::2])
        super().load_dict()

    def _members(self) -> None:
        self._look(self.stack)
        super().load_additems()

    def _frozen(self) -> None:
        self._look(self.stack)
        super().load_frozenset()

    dispatch |= {
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.DICT[0]: _dict,
        pickle.ADDITEMS[0]: _members,
        pickle.FROZENSET[0]: _frozen,
    }


def _unfolded(value: Any, known: dict[int, int]) -> int:
    """How many values hashing it would visit. Tuples in tuples; `known` by identity, for those that live meanwhile."""
    if type(value) is not tuple:
        return 1
    if id(value) not in known:
        known[id(value)] = 1 + sum(_unfolded(each, known) for each in value)
    return known[id(value)]


def load_inert(content: bytes, allowed: Collection[str], what: str) -> Any:
    """The object in `content`: plain containers and scalars, and `Inert` for everything else.

    `allowed` holds full names ("torch.Size"). CorruptCopyError that names `what` if the stream is broken or names
    anything else, or asks for more memory than its own length justifies.
    """
    bounds = bounds_of(content)
    try:
        if bounds.problem:
            raise pickle.UnpicklingError(bounds.problem)
        return (_CarefulUnpickler if bounds.careful else _Unpickler)(content, allowed).load()
    except _BROKEN_STREAM as error:
        raise CorruptCopyError(
            f"{what} is refused: {error or type(error).__name__}.", advice="It is damaged, or not what it claims to be."
        ) from error


def shown(value: object) -> str:
    """A few characters of a value out of a pickle, for an error.

    A few bytes of a stream can name one list again and again, so that its text would never end; and the text of an
    integer may be refused by Python.
    """
    if isinstance(value, int) and abs(value) < 1 << 64:
        return str(value)
    return repr(value[:80]) if isinstance(value, str | bytes) else f"{type(value).__name__}"
