"""Inventories as JSON: how a node tells the leader what it holds."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from resilience.planning.inventory import Inventory
from resilience.planning.typed_json import from_plain, parsed

__all__ = ["inventories_from_json", "inventories_to_json", "to_json"]

_WHAT = "what a rank told of the saves that it sees"


def to_json(told: Any) -> bytes:
    """A dataclass; `typed_json.from_json` gives it back."""
    return json.dumps(dataclasses.asdict(told), separators=(",", ":")).encode()


def inventories_to_json(inventories: list[Inventory]) -> bytes:
    return json.dumps([dataclasses.asdict(each) for each in inventories], separators=(",", ":")).encode()


def inventories_from_json(content: bytes) -> list[Inventory]:
    """What `inventories_to_json` gave, on a live peer of this job; DivergedRanksError if it is anything else."""
    found = from_plain(tuple[Inventory, ...], parsed(content, _WHAT), _WHAT)
    return list(found)
