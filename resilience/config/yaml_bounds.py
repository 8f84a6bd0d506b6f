"""How many values a YAML document has when its aliases are written out: a few lines may stand for any number.

Whatever walks, prints or writes such a document would never come to an end, so it is measured before anybody does.
"""

from __future__ import annotations

from typing import Any, Final

__all__ = ["unfolds_too_far"]

_MOST_VALUES: Final = 1_000_000  # a training script's whole configuration has a few thousand


def unfolds_too_far(document: object) -> bool:
    """Whether it has more values than any configuration, or contains itself. Linear in what was read."""
    known: dict[int, int] = {}
    under_way: set[int] = set()

    def size(value: Any) -> int:
        if not isinstance(value, dict | list | tuple | set):
            return 1
        if id(value) in known:
            return known[id(value)]
        if id(value) in under_way:
            return _MOST_VALUES + 1
        under_way.add(id(value))
        parts = [*value, *value.values()] if isinstance(value, dict) else list(value)
        known[id(value)] = total = 1 + sum(size(part) for part in parts)
        under_way.discard(id(value))
        return total

    return size(document) > _MOST_VALUES
