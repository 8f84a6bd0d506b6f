"""Inventories as JSON: how a node tells the leader what it holds."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from resilience.planning.inventory import (
    AttemptLog,
    Inventory,
    NodeSave,
    ParityCopy,
    ParityCover,
    SaveId,
    SharedSave,
)

__all__ = ["inventories_from_json", "inventories_to_json"]


def inventories_to_json(inventories: list[Inventory]) -> bytes:
    return json.dumps([dataclasses.asdict(each) for each in inventories], separators=(",", ":")).encode()


def inventories_from_json(content: bytes) -> list[Inventory]:
    """What `inventories_to_json` gave; it comes from a live peer of this job, not from a disk."""
    return [_inventory(fields) for fields in json.loads(content)]


def _inventory(fields: dict[str, Any]) -> Inventory:
    return Inventory(
        **fields
        | {
            "node_saves": tuple(_node_save(each) for each in fields["node_saves"]),
            "shared_saves": tuple(_record(SharedSave, each) for each in fields["shared_saves"]),
            "attempts": tuple(_attempt(each) for each in fields["attempts"]),
            "certificates": tuple(SaveId(**each) for each in fields["certificates"]),
            "notes": tuple(fields["notes"]),
            "foreign_runs": tuple(fields["foreign_runs"]),
        }
    )


def _node_save(fields: dict[str, Any]) -> NodeSave:
    return _record(NodeSave, fields | {"parity": [_parity(each) for each in fields["parity"]]})  # type: ignore[no-any-return]


def _parity(fields: dict[str, Any]) -> ParityCopy:
    cover: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields["cover"].items()
    }
    return ParityCopy(**fields | {"cover": ParityCover(**cover)})


def _record(kind: type[Any], fields: dict[str, Any]) -> Any:
    lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
    return kind(**fields | lists | {"save": SaveId(**fields["save"])})


def _attempt(fields: dict[str, Any]) -> AttemptLog:
    saves = {key: SaveId(**fields[key]) if fields[key] else None for key in ("base", "completed")}
    return AttemptLog(**fields | saves | {"fork": tuple(fields["fork"]) if fields["fork"] else None})
