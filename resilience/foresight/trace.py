"""Failures that were observed, read from a file: CSV with a heading, or JSON Lines.

    hours,nodes                       {"hours": 3.5, "nodes": [17]}
    3.5,17                            {"hours": 9.25}
    9.25,                             {"hours": 40, "nodes": [32, 33, 34, 35]}
    40,32 33 34 35

`hours` since the job's first start (or `seconds`); `nodes` that lost what they held, none where only a process died.
Further columns are left alone.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from resilience.errors import ConfigError
from resilience.foresight.failures import Failure

__all__ = ["read_trace"]

_UNITS = {"hours": 3600.0, "seconds": 1.0}


def read_trace(path: Path, nodes: int) -> tuple[Failure, ...]:
    """The failures of a job on `nodes` nodes, sorted by time. Raises ConfigError that names the line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8: {error}.") from error
    except OSError as error:
        raise ConfigError(
            f"{path} cannot be read: {error.strerror}.", advice="Name a CSV or JSON Lines file."
        ) from error
    rows = _json_lines(path, text) if text.lstrip().startswith("{") else _csv(path, text)
    found = [_failure(f"{path}, line {line}", row, nodes) for line, row in rows]
    return tuple(sorted(found, key=lambda failure: failure.at_s))


def _csv(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    if not set(_UNITS) & set(reader.fieldnames or ()):
        raise ConfigError(
            f"{path}: the first line names no column `hours` or `seconds`, but {', '.join(reader.fieldnames or ())}."
        )
    try:
        for row in reader:
            yield reader.line_num, row
    except csv.Error as error:
        raise ConfigError(f"{path}, line {reader.line_num}: {error}.") from error


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{path}, line {number} is no JSON: {error}.") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number}: an object is expected, not {type(row).__name__}.")
        yield number, row


def _failure(where: str, row: Mapping[str, Any], nodes: int) -> Failure:
    unit = next((unit for unit in _UNITS if row.get(unit) not in (None, "")), None)
    if unit is None:
        raise ConfigError(f"{where}: neither `hours` nor `seconds` is given.")
    try:
        at_s = float(row[unit]) * _UNITS[unit]
    except (TypeError, ValueError):
        at_s = math.nan
    if not (math.isfinite(at_s) and at_s >= 0):
        raise ConfigError(f"{where}: {unit} is {row[unit]!r}, a number from 0 on is expected.")
    struck = _nodes(where, row.get("nodes"))
    if beyond := [node for node in struck if not 0 <= node < nodes]:
        raise ConfigError(f"{where}: there is no node {beyond[0]}; this job has nodes 0…{nodes - 1}.")
    return Failure(at_s, struck)


def _nodes(where: str, given: Any) -> tuple[int, ...]:
    words = given.replace(";", " ").split() if isinstance(given, str) else [] if given is None else given
    if not isinstance(words, list):
        words = [words]
    try:
        found = [int(word) for word in words if not isinstance(word, float | bool)]
    except (TypeError, ValueError):
        found = []
    if len(found) != len(words):
        raise ConfigError(f"{where}: nodes is {given!r}, numbers of nodes are expected.")
    return tuple(sorted(set(found)))
