"""Where settings come from: a YAML file, then the environment, then the command line; the later one wins.

Every value is checked where it is read, so that an error names the file, the variable or the option.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resilience.config.checkpoint import CheckpointConfig
from resilience.config.resiliency import ResiliencyConfig
from resilience.config.setting import Setting, settings_of
from resilience.config.yaml_bounds import unfolds_too_far
from resilience.errors import ConfigError

if TYPE_CHECKING:
    import jsonargparse

__all__ = ["Override", "load_config", "override_from_env"]

_SETTINGS: dict[str, dict[str, Setting]] = {
    config.SECTION: {entry.name: entry for entry in settings_of(config)}
    for config in (CheckpointConfig, ResiliencyConfig)
}
#: The values of one source: section, then field.
_Values = dict[str, dict[str, object]]


@dataclass(frozen=True)
class Override:
    """A setting that the environment changed although code had given it."""

    key: str
    given: object
    used: object
    variable: str

    def __str__(self) -> str:
        return f"{self.key}: {self.given!r} was given in code, {self.used!r} is used ({self.variable})"


def load_config(
    path: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] = os.environ,
    args: Sequence[str] | None = None,
) -> tuple[CheckpointConfig, ResiliencyConfig]:
    """Both configurations from a YAML file, `RESILIENCE_CHECKPOINT__…` variables and `--checkpoint.…` options.

    `args` is a command line without the program's name; None reads none. Raises ConfigError for what cannot be read,
    unknown names and values that are not allowed; a file that is not there is a ConfigError too.
    """
    values: _Values = {section: {} for section in _SETTINGS}
    sources = [_from_yaml(Path(path))] if path is not None else []
    sources.append(_from_env(env))
    if args is not None:
        sources.append(_from_args(args))
    for source in sources:
        for section, given in source.items():
            values[section].update(given)
    checkpoint: dict[str, Any] = values[CheckpointConfig.SECTION]
    resiliency: dict[str, Any] = values[ResiliencyConfig.SECTION]
    return CheckpointConfig(**checkpoint), ResiliencyConfig(**resiliency)


def override_from_env(
    checkpoint: CheckpointConfig, resiliency: ResiliencyConfig, env: Mapping[str, str]
) -> tuple[CheckpointConfig, ResiliencyConfig, list[Override]]:
    """In a drill the environment wins over what code gave; the third value says what it changed."""
    values = _from_env(env)
    changed = [
        Override(entry.key, getattr(config, name), value, entry.variable)
        for config in (checkpoint, resiliency)
        for name, value in values[config.SECTION].items()
        if getattr(config, name) != value
        for entry in (_SETTINGS[config.SECTION][name],)
    ]
    given_checkpoint: dict[str, Any] = values[CheckpointConfig.SECTION]
    given_resiliency: dict[str, Any] = values[ResiliencyConfig.SECTION]
    return replace(checkpoint, **given_checkpoint), replace(resiliency, **given_resiliency), changed


def _from_env(env: Mapping[str, str]) -> _Values:
    values: _Values = {section: {} for section in _SETTINGS}
    for variable in sorted(env):
        section, separator, name = variable.removeprefix("RESILIENCE_").partition("__")
        if not variable.startswith("RESILIENCE_") or not separator:
            continue
        entry = _SETTINGS.get(section.lower(), {}).get(name.lower())
        if entry is None or entry.variable != variable:
            raise _unknown(variable, section.lower(), name.lower(), lambda entry: entry.variable)
        values[entry.section][entry.name] = entry.from_text(env[variable], variable)
    return values


def _from_args(args: Sequence[str]) -> _Values:
    values: _Values = {section: {} for section in _SETTINGS}
    try:
        parsed = _parser().parse_args(list(args))
    except argparse.ArgumentError as error:
        option = next((arg for arg in args if arg.startswith("--") and arg in str(error)), "").partition("=")[0]
        section, _, name = option.removeprefix("--").rpartition(".")
        if option and name not in _SETTINGS.get(section, {}):
            raise _unknown(option, section, name, lambda entry: f"--{entry.key}") from error
        raise ConfigError(f"command line: {error}.", advice="Options read `--checkpoint.save_interval 10`.") from error
    for section, entries in _SETTINGS.items():
        for name, text in vars(parsed.get(section, argparse.Namespace())).items():
            values[section][name] = entries[name].from_text(text, f"--{section}.{name}")
    return values


def _parser() -> jsonargparse.ArgumentParser:
    """One text option per setting: the same reading of text as in the environment; what is not given stays out."""
    import jsonargparse

    parser = jsonargparse.ArgumentParser(prog="resilience", exit_on_error=False, allow_abbrev=False)
    for entries in _SETTINGS.values():
        for entry in entries.values():
            switch: dict[str, Any] = {"nargs": "?", "const": "true"} if entry.kind is bool else {}
            unit = f" [{entry.unit}]" if entry.unit else ""
            text = f"{entry.meaning}{unit} ({entry.allowed}; default {entry.default})".replace("%", "%%")
            parser.add_argument(f"--{entry.key}", type=str, default=argparse.SUPPRESS, help=text, **switch)
    return parser


def _from_yaml(path: Path) -> _Values:
    values: _Values = {section: {} for section in _SETTINGS}
    document = _read_yaml(path)
    if document is None:
        return values
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: expected the sections checkpoint: and resiliency:, found {document!r}.")
    for section, given in document.items():
        if section not in _SETTINGS:
            raise _unknown_section(path, str(section))
        if given is None:
            continue
        if not isinstance(given, dict):
            raise ConfigError(f"{path}: section {section} must hold names and values, found {given!r}.")
        for name, value in given.items():
            if name not in _SETTINGS[section]:
                raise _unknown(f"{path}: {section}.{name}", section, str(name), lambda entry: entry.key)
            values[section][name] = _SETTINGS[section][name].check(value, str(path))
    return values


def _read_yaml(path: Path) -> object:
    """Plain values as in YAML 1.2: only true and false are booleans, so that `verify_load: off` is a text."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[str] = set()
            for key, _ in node.value:
                if str(key.value) in seen:
                    raise ConfigError(f"{path}, line {key.start_mark.line + 1}: {key.value} is given twice.")
                seen.add(str(key.value))
            return super().construct_mapping(node, deep)

    Loader.yaml_implicit_resolvers = {}
    for tag, pattern, first in (
        ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
        ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
        ("int", r"[-+]?[0-9]+", list("-+0123456789")),
        ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
    ):
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"(?:{pattern})\Z"), first)
    Loader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))
    Loader.add_constructor("tag:yaml.org,2002:float", lambda loader, node: float(node.value))
    try:
        document = yaml.load(path.read_text(encoding="utf-8"), Loader)  # a SafeLoader
        if unfolds_too_far(document):
            raise ConfigError(f"{path}: its aliases stand for more values than a configuration has.")
        return document
    except OSError as error:
        raise ConfigError(f"{path}: the configuration cannot be read: {error.strerror}.") from error
    except ConfigError:
        raise
    except RecursionError as error:
        raise ConfigError(f"{path}: this is nested too deeply.") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: not UTF-8, or `!!int` before what is none
        raise ConfigError(f"{path}: this is not YAML: {error}.") from error


def _unknown(given: str, section: str, name: str, spelled: Callable[[Setting], str]) -> ConfigError:
    """For a name that is no setting; suggests the nearest one, spelled as its source spells it."""
    everywhere = {entry.name: entry for known in _SETTINGS.values() for entry in known.values()}
    searched = everywhere if name in everywhere else _SETTINGS.get(section, everywhere)
    nearest = difflib.get_close_matches(name, searched, n=1)
    advice = (
        f"Did you mean {spelled(searched[nearest[0]])}?" if nearest else "docs/configuration.md lists all settings."
    )
    return ConfigError(f"{given} is no setting.", advice=advice)


def _unknown_section(path: Path, section: str) -> ConfigError:
    nearest = difflib.get_close_matches(section, _SETTINGS, n=1)
    advice = f"Did you mean {nearest[0]}?" if nearest else f"The sections are {' and '.join(_SETTINGS)}."
    return ConfigError(f"{path}: {section} is no section.", advice=advice)
