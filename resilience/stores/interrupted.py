"""A system call that a signal interrupted is made again.

Python does so by itself for the calls that POSIX lets be interrupted. A file system that lives in another process or on
another machine may answer any call with EINTR.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

__all__ = ["again", "close", "close_quietly"]

P = ParamSpec("P")
T = TypeVar("T")

_ATTEMPTS: Final = 100  # a storm of signals; then the caller hears of it like of any other failure


def again(call: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """What `call` returns or raises, however often it is interrupted (within a bound)."""
    for _ in range(_ATTEMPTS):
        try:
            return call(*arguments, **options)
        except InterruptedError:
            continue
    return call(*arguments, **options)


def close(fd: int) -> None:
    """Close a descriptor once: after EINTR it is closed all the same, and its number may be another's already."""
    try:
        os.close(fd)
    except InterruptedError:
        return


def close_quietly(fd: int) -> None:
    """Of a descriptor through which nothing was written that is not durable already."""
    with contextlib.suppress(OSError):
        os.close(fd)
