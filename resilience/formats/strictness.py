"""What happens when the keys that are asked for and the keys of a checkpoint differ: the eight modes.

*Unexpected*: asked for and not in the checkpoint. *Missing*: in the checkpoint and not asked for. These are Megatron's
words, the reverse of torch's.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import dataclass

from resilience.errors import ConfigError, MissingKeysError

__all__ = ["STRICTNESS", "KeyDifference", "judge_keys", "looks_at_missing", "raises"]

STRICTNESS = (
    "assume_ok_unexpected",
    "log_unexpected",
    "log_all",
    "raise_unexpected",
    "raise_all",
    "return_unexpected",
    "return_all",
    "ignore_all",
)

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeyDifference:
    """Keys of the checkpoint that nobody asked for, and keys that were asked for in vain."""

    missing: frozenset[str] = frozenset()
    unexpected: frozenset[str] = frozenset()


def judge_keys(unexpected: Collection[str], missing: Collection[str], strictness: str) -> KeyDifference:
    """The difference as `strictness` reports it. MissingKeysError where the mode says so, and for no other.

    An unexpected key that is let pass keeps its initial value. `*_unexpected` and `assume_ok_unexpected` do not look at
    missing keys.
    """
    reported = frozenset(missing) if looks_at_missing(strictness) else frozenset()
    if raises(strictness) and (unexpected or reported):
        raise MissingKeysError(_in_words(reported, unexpected), advice="See dist_ckpt_strictness for other ways.")
    if strictness.startswith("log_") and (unexpected or reported):
        _log.warning(_in_words(reported, unexpected))
    return KeyDifference(reported, frozenset(unexpected))


def looks_at_missing(strictness: str) -> bool:
    """Whether the mode looks at keys that nobody asked for; to know them, all ranks must tell what they ask for."""
    if strictness not in STRICTNESS:
        raise ConfigError(f"strictness is {strictness!r}; allowed are {', '.join(STRICTNESS)}.")
    return strictness.endswith("_all")


def raises(strictness: str) -> bool:
    """Whether the mode makes an error of a difference that it looks at."""
    return strictness == "assume_ok_unexpected" or strictness.startswith("raise_")


def _in_words(missing: Collection[str], unexpected: Collection[str]) -> str:
    parts = []
    if unexpected:
        parts.append(f"asked for and not in the checkpoint (unexpected): {_listed(unexpected)}")
    if missing:
        parts.append(f"in the checkpoint and not asked for (missing): {_listed(missing)}")
    return f"Keys differ. {'; '.join(parts)}."


def _listed(keys: Collection[str]) -> str:
    shown = ", ".join(sorted(keys)[:30])
    return f"{shown} and {len(keys) - 30} more" if len(keys) > 30 else shown
