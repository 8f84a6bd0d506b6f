"""How JSON that a peer sent becomes frozen dataclasses again: every value has the type that its field is declared with.

What arrives may be altered, or of another version of this package. A field that is missing, unknown or of another type
is named in the error; nothing is converted but lists to tuples, as `dataclasses.asdict` and JSON made of them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from resilience.errors import DivergedRanksError

__all__ = ["from_json", "from_plain", "parsed"]

T = TypeVar("T")
_LARGEST = 1 << 63


def parsed(content: bytes | str, what: str) -> Any:
    """The JSON value in a peer's message; DivergedRanksError that names `what` if it is none."""
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _unlike(what, f"no JSON ({str(error)[:200]})") from error


def from_json(kind: type[T], content: bytes | str, what: str) -> T:
    """A peer's dataclass; DivergedRanksError that names `what` and the field that does not fit."""
    found: T = from_plain(kind, parsed(content, what), what)
    return found


def from_plain(kind: Any, value: Any, what: str) -> Any:
    """`value` as a `kind`: a dataclass, tuple, dict (of names or whole numbers), optional, literal or scalar."""
    if dataclasses.is_dataclass(kind):
        return _object(kind, value, what)
    origin, inner = get_origin(kind), get_args(kind)
    if origin is tuple:
        return _tuple(inner, value, what)
    if origin is dict:
        return _dictionary(inner, value, what)
    if origin in (Union, UnionType):
        others = [each for each in inner if each is not NoneType]
        return None if value is None and NoneType in inner else from_plain(others[0], value, what)
    if origin is Literal:
        if not isinstance(value, str) or value not in inner:
            raise _unlike(what, f"{_short(value)} instead of {', '.join(map(repr, inner))}")
        return value
    if type(value) is int and kind is float and abs(value) < _LARGEST:
        return float(value)
    if type(value) is not kind or (kind is int and abs(value) >= _LARGEST):
        raise _unlike(what, f"{_short(value)} instead of {kind.__name__}")
    return value


def _object(kind: Any, value: Any, what: str) -> Any:
    if not isinstance(value, dict):
        raise _unlike(what, f"{_short(value)} instead of an object")
    hints = _hints(kind)
    unknown = sorted(value.keys() - hints.keys())
    if unknown:
        raise _unlike(what, f"a field {_short(unknown[0])} that this version does not know")
    fields = {name: from_plain(hints[name], each, f"{what}, {name}") for name, each in value.items()}
    required = {
        field.name
        for field in dataclasses.fields(kind)
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    if required - fields.keys():
        raise _unlike(what, f"no {sorted(required - fields.keys())[0]}")
    return kind(**fields)


def _tuple(inner: tuple[Any, ...], value: Any, what: str) -> tuple[Any, ...]:
    if not isinstance(value, list):
        raise _unlike(what, f"{_short(value)} instead of a list")
    if len(inner) == 2 and inner[1] is Ellipsis:
        return tuple(from_plain(inner[0], each, what) for each in value)
    if len(value) != len(inner):
        raise _unlike(what, f"{len(value)} values instead of {len(inner)}")
    return tuple(from_plain(each, one, what) for each, one in zip(inner, value, strict=True))


def _dictionary(inner: tuple[Any, ...], value: Any, what: str) -> dict[Any, Any]:
    """JSON has names only; numbers are written as such."""
    if not isinstance(value, dict):
        raise _unlike(what, f"{_short(value)} instead of an object")
    if inner[0] is int and not all(name.isascii() and name.isdecimal() and len(name) < 19 for name in value):
        raise _unlike(what, "a name that is no whole number")
    return {inner[0](name): from_plain(inner[1], each, what) for name, each in value.items()}


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _short(value: object) -> str:
    return repr(value)[:80]


def _unlike(what: str, found: str) -> DivergedRanksError:
    return DivergedRanksError(
        f"{what}: {found}.",
        advice="Run one version of torch-resilience on all ranks; see whether a network alters bytes.",
    )
