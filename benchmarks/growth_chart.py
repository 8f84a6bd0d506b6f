"""How saves grow, as a picture: ratios to the limits over bytes, tensors, ranks and what is frozen.

python -m benchmarks.growth_chart bench-out/figures.json docs/growth.svg
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.log_axis import share
from resilience.observe.svg import picture, tag

__all__ = ["chart"]

_LEFT, _TOP, _WIDTH, _HEIGHT, _RIGHT_PANEL, _NEXT_ROW = 62.0, 62.0, 380.0, 190.0, 520.0, 290.0
_LOW, _HIGH = 0.01, 10.0
_STYLE: Final = (
    "text { font: 13px system-ui, sans-serif; fill: #444 } .title { font-weight: 600; fill: #222 } "
    ".grid { stroke: #ddd } .limit { stroke: #222; stroke-dasharray: 5 4 } .line { fill: none; stroke-width: 2.5 } "
    "rect.paper { fill: #fff }"
)
#: (label, colour, measured, limits that are added up)
_LINES: Final = (
    ("eager stall / memcpy", "#0b5cad", "eager.stall", ("eager.memcpy",)),
    ("overlapped stall / memcpy", "#15803d", "overlapped.stall", ("overlapped.memcpy",)),
    ("committed / (gloo + memcpy)", "#c2410c", "eager.committed", ("eager.gloo", "eager.memcpy")),
)
_PANELS: Final = (
    ("bytes", "MB of each rank", lambda entry: entry["shard_bytes"] / (1 << 20)),
    ("tensors", "tensors of each rank (256 MB)", lambda entry: entry["tensors"]),
    ("ranks", "ranks on two cores (16 MB each)", lambda entry: entry["ranks"]),
    ("frozen", "% of 256 MB that never changes", lambda entry: 100 * entry["frozen"]),
)


def chart(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """`found`: what `figures.json` has under `measured_s` and `growth`."""
    parts = [tag("style", _STYLE), tag("rect", x=0, y=0, width=1000, height=640, class_="paper")]
    for number, (label, colour, _, _) in enumerate(_LINES):
        parts.append(tag("rect", x=_LEFT + 250 * number, y=12, width=14, height=4, fill=colour))
        parts.append(tag("text", label, x=_LEFT + 250 * number + 20, y=19))
    for number, (axis, title, place) in enumerate(_PANELS):
        entries = found.get(axis, ())
        if entries:
            left, top = _LEFT + _RIGHT_PANEL * (number % 2), _TOP + _NEXT_ROW * (number // 2)
            parts += _panel(left, top, title, [float(place(entry)) for entry in entries], entries)
    words = "Stalls and commits as multiples of what the machine can do, over the size of a job. 1 is the limit."
    return picture("growth", "How saves grow", words, 640, *parts) + "\n"


def _panel(
    left: float, top: float, title: str, places: Sequence[float], entries: Sequence[Mapping[str, Any]]
) -> list[str]:
    parts = [tag("text", title, x=left, y=top - 10, class_="title")]
    for power in range(-2, 2):
        y = _y(top, 10.0**power)
        parts.append(tag("line", x1=left, x2=left + _WIDTH, y1=y, y2=y, class_="limit" if power == 0 else "grid"))
        parts.append(tag("text", f"{10.0**power:g} ×", x=left - 8, y=y + 4, text_anchor="end"))
    spots = [left + _WIDTH * (number + 0.5) / len(places) for number in range(len(places))]  # one beside the other
    for spot, value in zip(spots, places, strict=True):
        parts.append(tag("text", f"{value:,.10g}", x=spot, y=top + _HEIGHT + 18, text_anchor="middle"))
    for _, colour, ours, limits in _LINES:
        points = [
            (spot, _y(top, ratio))
            for spot, entry in zip(spots, entries, strict=True)
            if (ratio := _ratio(entry, ours, limits)) is not None
        ]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(tag("polyline", points=path, class_="line", stroke=colour))
        parts += [tag("circle", cx=x, cy=y, r=4, fill=colour) for x, y in points]
    return parts


def _ratio(entry: Mapping[str, Any], ours: str, limits: Sequence[str]) -> float | None:
    """The median over the rounds; None where it was not measured (one rank has no network)."""
    if any(name not in entry for name in (ours, *limits)):
        return None
    rounds = zip(entry[ours], *(entry[limit] for limit in limits), strict=True)
    return median(mine / sum(least) for mine, *least in rounds)


def _y(top: float, ratio: float) -> float:
    return top + _HEIGHT * (1 - share(ratio, _LOW, _HIGH))


def main(arguments: Sequence[str]) -> None:
    source, target = map(Path, arguments)
    target.write_text(chart(json.loads(source.read_text())["measured_s"]["growth"]))


if __name__ == "__main__":
    main(sys.argv[1:])
