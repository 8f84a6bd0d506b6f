"""Hostile inputs are tried in a process of their own, so that a crash, a hang or a huge allocation is seen and named.

The parent notes each input in shared memory before it is tried: whatever ends the child, the input that did it is
known. The child may allocate `SPARE_BYTES` beyond what it has when it starts (inputs are below `LARGEST`), so that a
parser that believes a length in a file is refused by the kernel and the refusal is seen.
"""

from __future__ import annotations

import faulthandler
import json
import mmap
import os
import resource
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from resilience.errors import ResilienceError

__all__ = ["LARGEST", "Notebook", "Tried", "in_a_child"]

LARGEST: Final = 1 << 18
SPARE_BYTES: Final = 192 << 20  # hypothesis and the interpreter take some of it; no parser needs any
STILL_S: Final = 60.0  # no input takes a tenth of a second; the machine may be busy with other things
_HEAD: Final = struct.Struct("<QQ")
_TOLD_BYTES: Final = 1 << 16
_DONE: Final = "all tried"


@dataclass(frozen=True)
class Tried:
    """How a batch went. `problem` "": each input ended in a typed error or a correct read."""

    inputs: int
    problem: str


class Notebook:
    """What the child tries now, where the parent can read it after the child's end."""

    def __init__(self) -> None:
        self._shared = mmap.mmap(-1, _HEAD.size + LARGEST + _TOLD_BYTES)
        self._shared[: _HEAD.size] = _HEAD.pack(0, 0)

    def begin(self, content: bytes) -> None:
        """One more input is about to be tried."""
        count, _ = self._read()
        kept = content[:LARGEST]
        self._shared[_HEAD.size : _HEAD.size + len(kept)] = kept
        self._shared[: _HEAD.size] = _HEAD.pack(count + 1, len(kept))

    @property
    def count(self) -> int:
        return self._read()[0]

    @property
    def latest(self) -> bytes:
        length = self._read()[1]
        return self._shared[_HEAD.size : _HEAD.size + length]

    def _read(self) -> tuple[int, int]:
        count, length = _HEAD.unpack(self._shared[: _HEAD.size])
        return count, length

    def tell(self, words: str) -> None:
        start = _HEAD.size + LARGEST
        self._shared[start:] = words.encode(errors="backslashreplace")[:_TOLD_BYTES].ljust(_TOLD_BYTES, b"\0")

    @property
    def told(self) -> str:
        return self._shared[_HEAD.size + LARGEST :].rstrip(b"\0").decode(errors="replace")


def in_a_child(work: Callable[[Notebook], None], *, spare_bytes: int = SPARE_BYTES) -> Tried:
    """Run `work`, which notes each input and raises at the first that is handled badly."""
    notebook = Notebook()
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        _be_the_child(work, notebook, spare_bytes)
    status = _wait(child, notebook)
    if status is None:
        return Tried(notebook.count, f"nothing moved for {STILL_S:g} s on {_shown(notebook.latest)}")
    if os.WIFSIGNALED(status):
        return Tried(notebook.count, f"signal {os.WTERMSIG(status)} ended the process on {_shown(notebook.latest)}")
    if os.WEXITSTATUS(status):
        return Tried(notebook.count, f"on {_shown(notebook.latest)}:\n{notebook.told}")
    if notebook.told != _DONE:
        return Tried(notebook.count, f"the process ended without a word on {_shown(notebook.latest)}")
    return Tried(notebook.count, "")


def _be_the_child(work: Callable[[Notebook], None], notebook: Notebook, spare_bytes: int) -> None:
    status = 1
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + spare_bytes
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()
        quiet = os.open(os.devnull, os.O_WRONLY)
        for descriptor in (1, 2):
            os.dup2(quiet, descriptor)
        work(notebook)
        notebook.tell(_DONE)
        status = 0
    except BaseException:  # noqa: BLE001 - whatever it is, the parent reports it
        told = traceback.format_exc()
        notebook.tell(told if len(told) < _TOLD_BYTES // 4 else f"{told[:4000]}\n…\n{told[-4000:]}")
    finally:
        os._exit(status)


def _wait(child: int, notebook: Notebook) -> int | None:
    """The child's status; None if it stood still, and was killed."""
    seen, since = -1, time.monotonic()
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return status
        if notebook.count != seen:
            seen, since = notebook.count, time.monotonic()
        elif time.monotonic() - since > STILL_S:
            os.kill(child, 9)
            os.waitpid(child, 0)
            return None
        time.sleep(0.01)


def _shown(content: bytes) -> str:
    return f"{len(content)} bytes {content[:400]!r}" + ("…" if len(content) > 400 else "")


def ask(parse: Callable[[bytes], object], content: bytes, also: tuple[type[Exception], ...] = ()) -> None:
    """Try one input. What it ends in has to be a value, a typed error whose words can be said, or one of `also`."""
    try:
        parse(content)
    except ResilienceError as error:
        if _wanted_memory(error):
            raise AssertionError("it asked for more memory than its bytes justify") from error
        said = str(error)
        assert said.strip(), "an error says something"
        assert len(said) < 20_000, "and no more than a person reads"
        json.dumps(said).encode()
    except also:
        return


def _wanted_memory(error: BaseException | None) -> bool:
    """Caught and turned into a typed error, a refused allocation is still one that was tried."""
    while error is not None:
        if isinstance(error, MemoryError):
            return True
        assert error.__cause__ is not error, "an error is not its own cause"
        error = error.__cause__ or error.__context__
    return False
