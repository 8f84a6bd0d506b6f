"""`python -m benchmarks.digests`: what authentication costs: rates of both digests and of a copy, and of a MAC.

In processor time of one core, so that other work on the machine does not count.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from resilience.stores.authentication import Key
from resilience.stores.digest import ALGORITHM, STRONG, digest_of

__all__ = ["main"]

_BYTES: Final = 256 << 20
_ROUNDS: Final = 5
_MACS: Final = 2000


def main() -> None:
    content = memoryview(bytes(range(256)) * (_BYTES // 256))
    into = memoryview(bytearray(_BYTES))

    def copy() -> None:
        into[:] = content

    works = {name: lambda name=name: digest_of(content, name) for name in (ALGORITHM, STRONG)}  # type: ignore[misc]
    for name, work in {"a copy": copy, **works}.items():
        print(f"{name:16s} {_BYTES / _seconds(work) / 1e9:6.2f} GB/s")
    key = Key(b"a secret for the sake of measuring")
    for nbytes in (128, 65536):
        message = content[:nbytes]
        spent = _seconds(lambda message=message: [key.mac("message", b"group", message) for _ in range(_MACS)])  # type: ignore[misc]
        print(f"a MAC of {nbytes:5d} B {spent / _MACS * 1e6:6.1f} µs")


def _seconds(work: Callable[[], object]) -> float:
    """The best of a few rounds."""
    spent = []
    for _ in range(_ROUNDS):
        began = time.process_time()
        work()
        spent.append(time.process_time() - began)
    return min(spent)


if __name__ == "__main__":
    main()
