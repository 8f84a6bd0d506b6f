"""Every exception a user can meet, in one hierarchy.

Each class also subclasses the built-in that a caller would already catch. A message says what was found, what was
expected, where, and what to do next; `advice` carries the last part on its own, for the command line's JSON.
"""

from __future__ import annotations

__all__ = [
    "AnotherJobError",
    "CheckpointNotFoundError",
    "CommandError",
    "ConfigError",
    "CorruptCopyError",
    "DivergedRanksError",
    "EvictedError",
    "ForgedMessageError",
    "LayoutMismatchError",
    "MemoryBudgetError",
    "MissingCheckpointExit",
    "MissingKeysError",
    "NoProgressError",
    "NoUsableSaveError",
    "NotAuthenticError",
    "PeerLostError",
    "ResilienceError",
    "SaveFailedError",
    "SaveStuckError",
    "SourceUnavailableError",
    "StoppedExit",
    "StoreError",
    "UnsafePathError",
    "UnsupportedStateError",
]


class ResilienceError(Exception):
    """Base of all errors raised by this package."""

    def __init__(self, message: str, *, advice: str = "") -> None:
        super().__init__(f"{message} {advice}".strip())
        self.advice = advice


class ConfigError(ResilienceError, ValueError):
    """A field of the configuration is wrong: names it, what was given and what is allowed."""


class MemoryBudgetError(ConfigError, MemoryError):
    """The node cannot hold what the configuration asks for; the message spells out the sum."""


class UnsupportedStateError(ResilienceError, TypeError):
    """A piece of training state cannot be stored without pickle; the message names the item."""


class LayoutMismatchError(ResilienceError, ValueError):
    """What was saved does not fit what is to be loaded: another model, another optimizer, other shapes."""


class MissingKeysError(ResilienceError, KeyError):
    """Items that were asked for are not in the checkpoint; lists the keys on both sides."""

    def __str__(self) -> str:
        return str(self.args[0])


class StoreError(ResilienceError, OSError):
    """Storage refused an operation (full, read-only, broken); the cause is chained."""


class UnsafePathError(StoreError, PermissionError):
    """A path is a link, belongs to somebody else or leaves its directory."""


class CorruptCopyError(ResilienceError, ValueError):
    """Stored bytes do not parse or do not match their digest."""


class NotAuthenticError(CorruptCopyError):
    """Something on a node or from a peer has no valid MAC of this job's key; it counts as not there."""


class CheckpointNotFoundError(ResilienceError, FileNotFoundError):
    """A checkpoint that was asked for by name or iteration is not there; says what is."""


class AnotherJobError(ResilienceError, BlockingIOError):
    """Another live process holds this run's directory."""


class EvictedError(ResilienceError, PermissionError):
    """A newer start of this run took over the shared directory; this one must not write any more."""


class PeerLostError(ResilienceError, ConnectionError):
    """A peer died or made no progress within `exchange_timeout_s`; `rank` says which, where that is known."""

    def __init__(self, message: str, *, advice: str = "", rank: int | None = None) -> None:
        super().__init__(message, advice=advice)
        self.rank = rank


class ForgedMessageError(PeerLostError):
    """What came from a peer has no valid MAC of this job's key: altered on the way, repeated, or somebody else's."""


class DivergedRanksError(ResilienceError, RuntimeError):
    """Ranks disagree on what must be equal everywhere (iteration, decision, structure)."""


class SaveFailedError(ResilienceError, RuntimeError):
    """A save failed and `on_save_failure="raise"`."""


class SaveStuckError(ResilienceError, TimeoutError):
    """Saves in the making did not move on any rank, for too long; says which one waits for what."""


class SourceUnavailableError(ResilienceError, OSError):
    """A source of saves could not be read, so that what it holds is unknown."""


class NoUsableSaveError(ResilienceError, RuntimeError):
    """This run once completed a save, and none is usable now; starting afresh would lose it silently."""


class NoProgressError(ResilienceError, RuntimeError):
    """Several restarts in a row completed no newer save."""


class CommandError(ResilienceError, RuntimeError):
    """A command could not do what it was asked; carries its exit status."""

    def __init__(self, message: str, *, advice: str = "", status: int = 3) -> None:
        super().__init__(message, advice=advice)
        self.status = status


def error_like(kind: str, message: str) -> ResilienceError:
    """What another rank raised, told by its class's name: of the same class here, so that all ranks raise alike."""
    known = globals().get(kind)
    made = known if isinstance(known, type) and issubclass(known, ResilienceError) else ResilienceError
    return made(message)


class MissingCheckpointExit(SystemExit):
    """Nothing to load and `exit_on_missing_checkpoint=True`; exit status 1."""

    def __init__(self, message: str) -> None:
        super().__init__(message)


class StoppedExit(SystemExit):
    """The job saved and stopped early on request; exit status 75, or 0 under an elastic agent."""


def in_short(error: BaseException) -> str:
    """Its kind and its words, as far as a person reads: some errors repeat all the bytes that they could not parse."""
    words = str(error)
    return f"{type(error).__name__}: {words[:300]}{'…' if len(words) > 300 else ''}"
