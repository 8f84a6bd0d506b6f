"""Saves side by side, as a picture: how long each makes training wait, and when it is complete, beside the limits.

python -m benchmarks.saves_chart bench-out/figures.json docs/saves.svg
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks.log_axis import share
from benchmarks.peers import PEERS
from resilience.observe.svg import picture, tag

__all__ = ["chart"]

Samples = Mapping[str, Sequence[float]]

_LEFT, _TOP, _WIDTH, _ROW = 300.0, 66.0, 660.0, 27.0
_TICKS_MS: Final = (10, 30, 100, 300, 1000, 3000)
_STYLE: Final = (
    "text { font: 13px system-ui, sans-serif; fill: #444 } .ours { font-weight: 600; fill: #0b5cad } "
    ".grid { stroke: #ddd } .limit { stroke: #222; stroke-dasharray: 5 4 } .between { stroke: #bbb; stroke-width: 3 } "
    ".stall { fill: #0b5cad } .complete { fill: #c2410c } rect.paper { fill: #fff }"
)
#: (label, the wait, complete); of a synchronous save both are one.
_ROWS: Final = (
    ("ours, own node", "ours_local.stall", "ours_local"),
    ("ours, 2-fold", "ours_replicated.stall", "ours_replicated"),
    ("torch.save", "torch_save", "torch_save"),
    ("DCP save", "dcp_save", "dcp_save"),
    ("DCP async_save", "dcp_async.stall", "dcp_async"),
    ("DCP async_save, a process", "dcp_process.stall", "dcp_process"),
    ("NVRx, own node", "nvrx_local", "nvrx_local"),
    ("NVRx, 2-fold", "nvrx_replicated", "nvrx_replicated"),
    *((f"{each.name} save", f"{each.module}_save", f"{each.module}_save") for each in PEERS),
    *(
        (
            f"{each.name} async{', 2-fold' if each.replicates else ''}",
            f"{each.module}_async.stall",
            f"{each.module}_async",
        )
        for each in PEERS
    ),
)
_LIMITS: Final = (("memcpy", ("memcpy",)), ("gloo + memcpy", ("gloo", "memcpy")), ("disk", ("disk",)))


def chart(found: Samples) -> str:
    """`found`: what `figures.json` has under `measured_s` and `saves`. What was not measured is left out."""
    rows = [each for each in _ROWS if each[1] in found and each[2] in found]
    bottom = _TOP + _ROW * len(rows)
    parts = [tag("style", _STYLE), tag("rect", x=0, y=0, width=1000, height=bottom + 40, class_="paper")]
    for x, class_, words in ((_LEFT, "stall", "training waits"), (_LEFT + 150, "complete", "the save is complete")):
        parts += [tag("circle", cx=x + 6, cy=16.0, r=5, class_=class_), tag("text", words, x=x + 18, y=21.0)]
    for ms in _TICKS_MS:
        x = _x(ms / 1e3)
        parts.append(tag("line", x1=x, x2=x, y1=_TOP - 8, y2=bottom, class_="grid"))
        parts.append(tag("text", f"{ms:,} ms", x=x, y=bottom + 20, text_anchor="middle"))
    for label, names in _LIMITS:
        if not all(map(found.__contains__, names)):
            continue
        x = _x(sum(median(found[name]) for name in names))
        parts.append(tag("line", x1=x, x2=x, y1=_TOP - 12, y2=bottom, class_="limit"))
        parts.append(tag("text", label, x=x, y=_TOP - 17, text_anchor="middle"))
    for number, (label, wait, complete) in enumerate(rows):
        parts += _row(_TOP + _ROW * (number + 0.6), label, median(found[wait]), median(found[complete]))
    words = "For each kind of save, how long training waits and when the save is complete, in milliseconds."
    return picture("saves", "Saves side by side", words, bottom + 40, *parts) + "\n"


def _row(y: float, label: str, wait_s: float, complete_s: float) -> list[str]:
    return [
        tag("text", label, x=_LEFT - 14, y=y + 4, text_anchor="end", class_="ours" if "ours" in label else "other"),
        tag("line", x1=_x(wait_s), x2=_x(complete_s), y1=y, y2=y, class_="between"),
        tag("circle", cx=_x(complete_s), cy=y, r=5, class_="complete"),
        tag("circle", cx=_x(wait_s), cy=y, r=5, class_="stall"),
    ]


def _x(seconds: float) -> float:
    return _LEFT + _WIDTH * share(1e3 * seconds, _TICKS_MS[0], _TICKS_MS[-1])


def main(arguments: Sequence[str]) -> None:
    source, target = map(Path, arguments)
    target.write_text(chart(json.loads(source.read_text())["measured_s"]["saves"]))


if __name__ == "__main__":
    main(sys.argv[1:])
