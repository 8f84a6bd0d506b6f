"""Whether a pickle asks for more memory or time than its bytes justify: looked at before the unpickler obeys it.

Six bytes are enough to have Python's unpickler make room for two thousand million remembered objects, or for a string
of any length. So every length is held against what is left of the stream, and every number under which something is to
be remembered against how much has been remembered so far; a pickler counts on from 0.

A tuple that is fetched from there twice into the next one, and so on, has 2^n values after n steps, and a dictionary
that is given it as a key counts them all. Streams that fetch tuples often are told apart, to be read with care.
"""

from __future__ import annotations

import pickletools
import re
from dataclasses import dataclass
from typing import Final

__all__ = ["Bounds", "bounds_of"]

_FEW_FETCHES: Final = 32  # with so many no tuple comes to more than 3^11 values, whatever was done with them
_SLACK: Final = 1024  # of a pickler that leaves numbers out
_WIDTHS: Final = {-2: 1, -3: 4, -4: 4, -5: 8}  # of a length, by how pickletools marks an argument that has one
_ABSENT, _PLAIN, _TUPLE = 0, 1, 2  # what is remembered under a number

_DUP, _PUT, _LONG_BINPUT = b"2"[0], b"p"[0], b"r"[0]
_TUPLES: Final = b"t\x85\x86\x87"
_APART: Final = frozenset((_DUP, _PUT, _LONG_BINPUT))
_MEASURED: Final = {
    ord(op.code): _WIDTHS[op.arg.n] for op in pickletools.opcodes if op.arg is not None and op.arg.n in _WIDTHS
}


def _any_of(codes: bytes) -> bytes:
    return b"[" + b"".join(b"\\x%02x" % code for code in codes) + b"]"


def _of_width(width: int, *, but: bytes = b"") -> bytes:
    codes = {ord(op.code) for op in pickletools.opcodes if (op.arg.n if op.arg else 0) == width}
    return bytes(sorted(codes - _APART - set(but)))


def _operations(*, but: bytes = b"") -> bytes:
    """Those whose length needs no arithmetic. Two of them have two lines."""
    fixed = [_any_of(codes) + b"." * width for width in (0, 1, 2, 4, 8) if (codes := _of_width(width, but=but))]
    one_line = _any_of(_of_width(-1, but=but + b"ci")) + b"[^\\n]*+\\n"
    return b"|".join((*fixed, one_line, b"[ci][^\\n]*+\\n[^\\n]*+\\n"))


#: As many operations in a row as possible; and of such a row what puts into the memory and what fetches from it (or its
#: end, lest what follows the last one is looked through again from each byte).
_ROW: Final = re.compile(b"(?>" + _operations() + b")*+", re.DOTALL)
_TOUCHING: Final = re.compile(
    b"(?>(?!" + _any_of(_TUPLES) + b"[\\x94q])(?:" + _operations(but=b"\x94qhjg") + b"))*+"
    b"(" + _any_of(_TUPLES) + b"?(?:\\x94|q.)|h.|j....|g[^\\n]*+\\n|\\Z)",
    re.DOTALL,
)  # fmt: skip


@dataclass(frozen=True)
class Bounds:
    """`problem`: what is out of proportion ("": nothing). `careful`: its keys may unfold to any number of values."""

    problem: str = ""
    careful: bool = False


def bounds_of(content: bytes) -> Bounds:
    """Without running anything. A stream that is broken is left to the unpickler, which says so."""
    memory = _Memory()
    at, end, problem, duplicates = 0, len(content), "", False
    while not problem:
        row = _ROW.match(content, at)
        stop = row.end() if row else at
        for token in _TOUCHING.findall(content, at, stop):
            if token:
                memory.touch(token)
        follows_a_tuple = stop > at and content[stop - 1] in _TUPLES  # or an argument that looks like one
        code = content[stop] if stop < end else -1
        if code in _MEASURED:
            width = _MEASURED[code]
            nbytes = int.from_bytes(content[stop + 1 : stop + 1 + width], "little")
            at = stop + 1 + width + nbytes
            if at > end:
                problem = f"it announces {nbytes} bytes where {max(0, end - stop - 1 - width)} are left"
        elif code in (_PUT, _LONG_BINPUT):
            number, at = _number(content, stop, code)
            problem = memory.put(number, _TUPLE if follows_a_tuple else _PLAIN)
        elif code == _DUP:
            duplicates, at = True, stop + 1
        else:
            break
    return Bounds(problem or memory.problem, duplicates or memory.fetched > _FEW_FETCHES)


class _Memory:
    """What the unpickler would have remembered: one byte for each."""

    def __init__(self) -> None:
        self._kinds = bytearray()
        self._count = 0
        self.fetched = 0  # tuples
        self.problem = ""

    def touch(self, token: bytes) -> None:
        kind, code = (_TUPLE, token[1:2]) if token[0] in _TUPLES else (_PLAIN, token[:1])
        if code == b"\x94":
            self.put(self._count, kind)
        elif code == b"q":
            self.problem = self.put(token[-1], kind) or self.problem
        else:
            number = _line_number(token[1:]) if code == b"g" else int.from_bytes(token[1:], "little")
            self.fetched += number < len(self._kinds) and self._kinds[number] == _TUPLE

    def put(self, number: int, kind: int) -> str:
        """Returns what is wrong with that."""
        if number > 2 * self._count + _SLACK:
            return f"it remembers something as number {number} after {self._count} others"
        if number >= len(self._kinds):
            self._kinds.extend(bytes(number + 1 - len(self._kinds)))
        self._count += self._kinds[number] == _ABSENT
        self._kinds[number] = kind
        return ""


def _number(content: bytes, at: int, code: int) -> tuple[int, int]:
    """Under which number something is remembered, and where the stream goes on."""
    if code == _LONG_BINPUT:
        return int.from_bytes(content[at + 1 : at + 5], "little"), at + 5
    line_end = content.find(b"\n", at)
    stop = line_end + 1 if line_end >= 0 else len(content)
    return _line_number(content[at + 1 : stop]), stop


def _line_number(text: bytes) -> int:
    digits = text.strip()
    return int(digits) if digits.isdigit() and len(digits) <= 18 else 10**18
