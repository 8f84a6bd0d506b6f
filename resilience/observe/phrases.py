"""How an event reads as a sentence: the words for a terminal and for the report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Event = dict[str, Any]

#: Rank 0 speaks for all; of these every rank has something of its own to say.
ANYONE_MAY_SAY = frozenset({"save_failed", "hang", "exception", "unequal_items", "replication_down", "metrics_failed"})

TIER_WORDS = {
    "in_memory": "node memory",
    "local": "node disk",
    "global": "shared storage (non-persistent)",
    "persistent": "persistent checkpoint",
}


def human_bytes(count: float) -> str:
    """`1.5 GB`: powers of 1,000, as storage is sold."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 999.5 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def human_seconds(seconds: float) -> str:
    """`850 µs`, `12 ms`, `1.2 s`, `3 min 20 s`."""
    if seconds < 0.000_999_5:
        return f"{seconds * 1e6:.0f} µs"
    if seconds < 0.9995:
        milliseconds = seconds * 1000
        return f"{milliseconds:.1f} ms" if milliseconds < 9.95 else f"{milliseconds:.0f} ms"
    if seconds < 99.5:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes / 60:.1f} h"


def tier_words(tier: Any) -> str:
    return TIER_WORDS.get(str(tier), str(tier))


def shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "…"


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def resume_sentence(event: Event) -> str:
    """Where an attempt resumed, what it moved for that, and what it passed over."""
    text = f"resumed at iteration {event.get('iteration')} from {tier_words(event.get('tier'))}"
    if event.get("seconds") is not None:
        text += f" in {human_seconds(event['seconds'])}"
    if event.get("retrieved_bytes"):
        text += f", {human_bytes(event['retrieved_bytes'])} fetched from other nodes"
    passed_over = [item for item in event.get("passed_over") or [] if isinstance(item, dict)]
    if passed_over:
        first = passed_over[0]
        text += f"; passed over iteration {first.get('iteration')}: {first.get('reason')}"
        if len(passed_over) > 1:
            text += f" (and {plural(len(passed_over) - 1, 'more save')})"
    return text


_PHRASES: dict[str, Callable[[Event], str]] = {
    "start": lambda e: f"start of {plural(int(e.get('world_size') or 1), 'rank')}, run {e.get('run_id')}",
    "resume": resume_sentence,
    "fresh": lambda e: f"fresh start: {e.get('reason')}",
    "complete": lambda e: (
        f"iteration {e.get('iteration')} is complete in {tier_words(e.get('tier'))}"
        if e.get("tier") in ("persistent", "global")
        else ""  # node-local saves complete every few steps: events, not news
    ),
    "save_failed": lambda e: f"the save of iteration {e.get('iteration')} failed: {e.get('error')}; training goes on",
    "save_skipped": lambda e: f"the save of iteration {e.get('iteration')} was skipped: {e.get('reason')}",
    "replication_down": lambda e: f"replication is down ({e.get('error')}); it will be rebuilt",
    "unequal_items": lambda e: f"items differ between data-parallel ranks, kept per rank: {e.get('keys')}",
    "warning": lambda e: f"warning: {e.get('what')} {e.get('advice') or ''}".rstrip(),
    "caution": lambda e: f"caution: {e.get('what')} {e.get('advice') or ''}".rstrip(),
    "metrics_failed": lambda e: f"{e.get('outlet')} cannot be written ({e.get('error')}); training goes on without it",
    "stop_requested": lambda e: f"stop requested by {e.get('by')}",
    "stopped": lambda e: (
        f"stopped on request at iteration {e.get('iteration')}, "
        + ("saved" if e.get("saved", True) else "but its last save failed")
    ),
    "finished": lambda e: f"finished at iteration {e.get('iteration')}",
    "hang": lambda e: f"no progress for {human_seconds(float(e.get('seconds') or 0))}: this process ends now",
    "exception": lambda e: f"training raised {e.get('error')}",
}


def phrase(event: Event) -> str:
    """One line for a person, or nothing where an event is no news. Never raises on odd fields."""
    make = _PHRASES.get(str(event.get("event")))
    if make is None:
        return ""
    try:
        return " ".join(make(event).split())
    except (TypeError, ValueError):
        return f"{event.get('event')}"
