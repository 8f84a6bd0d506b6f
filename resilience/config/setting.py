"""How one field of a configuration is described, checked and read from text.

A field is declared once, with its type, default, unit, limit and meaning; validation, the loaders and
`docs/configuration.md` all read that declaration.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from resilience.errors import ConfigError

__all__ = ["Limit", "Rule", "Setting", "at_least", "check_all", "setting", "settings_of"]

T = TypeVar("T")

_TRUE = frozenset({"true", "1", "yes", "on"})
_FALSE = frozenset({"false", "0", "no", "off"})
_NULL = frozenset({"null", "none"})
_KIND_NAMES: dict[type, str] = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


@dataclass(frozen=True)
class Limit:
    """What a value of the right type must also satisfy, and how to say so ("at least 1")."""

    says: str
    holds: Callable[[Any], bool]


def at_least(lowest: int) -> Limit:
    return Limit(f"at least {lowest}", lambda value: value >= lowest)


ABOVE_ZERO = Limit("above 0", lambda value: value > 0)
#: Becomes a file name on every node, so nothing that could leave a directory or hide in it.
SAFE_NAME = Limit(
    "1 to 128 of the characters A-Z a-z 0-9 . _ -, not beginning with a dot",
    lambda value: re.fullmatch(r"(?!\.)[A-Za-z0-9._-]{1,128}", value) is not None,
)
VARIABLE_NAME = Limit(
    "the name of an environment variable (letters, digits and _, not beginning with a digit)",
    lambda value: re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", value) is not None,
)


@dataclass(frozen=True)
class Setting:
    """One field: where it stands, what it accepts, what it means."""

    section: str  # "checkpoint" or "resiliency"
    name: str
    kind: type  # bool, int, float or str
    choices: tuple[str, ...]  # of a Literal, else empty
    optional: bool
    default: object
    meaning: str
    unit: str
    limit: Limit | None
    path: bool  # an `os.PathLike` is accepted and kept as str

    @property
    def key(self) -> str:
        return f"{self.section}.{self.name}"

    @property
    def variable(self) -> str:
        return f"RESILIENCE_{self.section.upper()}__{self.name.upper()}"

    @property
    def allowed(self) -> str:
        """What may be given, in words: "a whole number, at least 1"."""
        if self.choices:
            says = "one of " + ", ".join(f'"{choice}"' for choice in self.choices)
        else:
            says = "a path" if self.path else _KIND_NAMES[self.kind]
            says += f", {self.limit.says}" if self.limit else ""
        return f"{says}, or nothing (null, in Python None)" if self.optional else says

    def check(self, value: object, where: str = "") -> object:
        """The value as it is kept, or a ConfigError; types are strict (True is no number, "5" is no 5)."""
        if self.optional and (value is None or (value == "None" and value in self.choices)):
            return None
        if self.path and isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not self._has_right_type(value) or (self.limit and not self.limit.holds(value)):
            raise self.refused(value, where)
        return value

    def _has_right_type(self, value: object) -> bool:
        if self.choices:
            return isinstance(value, str) and value in self.choices
        if self.kind is bool or isinstance(value, bool):
            return self.kind is bool and isinstance(value, bool)
        if self.kind is str:
            return isinstance(value, str) and value.strip() != "" and "\0" not in value
        if isinstance(value, int):
            return abs(value) < 2**63
        return self.kind is float and isinstance(value, float) and math.isfinite(value)

    def from_text(self, text: str, where: str) -> object:
        """Reads what was typed in the environment or on the command line; `null` or `none` is no value."""
        word = text.strip()
        value: object = word
        if self.optional and word.lower() in _NULL and word not in self.choices:
            return None
        if self.kind is bool and word.lower() in _TRUE | _FALSE:
            value = word.lower() in _TRUE
        elif self.kind is int and re.fullmatch(r"[+-]?[0-9]{1,19}", word):
            value = int(word)
        elif self.kind is float and re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", word):
            value = float(word)
        return self.check(value, where)

    def refused(self, value: object, where: str = "") -> ConfigError:
        given = "null" if value is None else repr(value)
        kind = "" if value is None else f" ({type(value).__name__})"
        place = f" (from {where})" if where else ""
        return ConfigError(f"{self.key}: given {given}{kind}{place}, allowed is {self.allowed}.")


def setting(
    default: T, meaning: str, *, unit: str = "", limit: Limit | None = None, path: bool = False
) -> T:  # the type a dataclass field is declared with, as `dataclasses.field` pretends too
    """Declares a field of a configuration, with what `Setting` needs beside type and name."""
    return field(default=default, metadata={"meaning": meaning, "unit": unit, "limit": limit, "path": path})


@functools.cache
def settings_of(config: type) -> tuple[Setting, ...]:
    """The fields of a configuration class, in order. Its `SECTION` names it in files and variables."""
    hints = get_type_hints(config)
    return tuple(_described(config, entry, hints[entry.name]) for entry in fields(config))


def _described(config: Any, entry: Any, hint: Any) -> Setting:
    if get_origin(hint) in (Union, UnionType):
        parts = [part for part in get_args(hint) if part is not NoneType]
        optional = len(parts) < len(get_args(hint))
    else:
        parts, optional = [hint], False
    assert len(parts) == 1, f"{entry.name}: one type, or one type and None"
    assert entry.default is not MISSING, f"{entry.name}: every field has a default"
    choices = get_args(parts[0]) if get_origin(parts[0]) is Literal else ()
    return Setting(
        section=config.SECTION,
        name=entry.name,
        kind=str if choices else parts[0],
        choices=choices,
        optional=optional,
        default=entry.default,
        **entry.metadata,
    )


@dataclass(frozen=True)
class Rule:
    """A rule across fields: the field that is refused, when, and the sentence for the error and the documentation."""

    name: str
    says: str
    broken: Callable[[Any], bool]


def check_all(config: Any, rules: tuple[Rule, ...]) -> None:
    """Checks every field, then every rule; replaces paths by str. Raises the first ConfigError."""
    kind: type = type(config)
    for entry in settings_of(kind):
        setattr(config, entry.name, entry.check(getattr(config, entry.name)))
    for rule in rules:
        if rule.broken(config):
            given = getattr(config, rule.name)
            raise ConfigError(f"{config.SECTION}.{rule.name}: given {given!r}, but {rule.says}.")
